"""Work whose n-th change of the files under a folder fails, or before whose n-th change its process dies.

The kernel itself stops the work at each call that writes (seccomp's user notifications, seccomp_unotify(2)), and asks
this process what comes of it. So faults reach what Python, safetensors and torch do alike, in every thread.
"""

import ctypes
import errno
import fcntl
import io
import os
import platform
import select
import shutil
import signal
import socket
import struct
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Work = Callable[[Path], object]

# A call: its number on x86-64 and on arm64, and what it changes: a descriptor, a path, or a path beside a folder's
# descriptor, by the place among the arguments. Older calls are x86-64's alone.
CALLS = {
    "open": (2, None, "path", 0), "openat": (257, 56, "beside", 0), "creat": (85, None, "path", 0),
    "write": (1, 64, "file", 0), "pwrite64": (18, 68, "file", 0), "writev": (20, 66, "file", 0),
    "sendfile": (40, 71, "file", 0), "copy_file_range": (326, 285, "file", 2),
    "truncate": (76, 45, "path", 0), "ftruncate": (77, 46, "file", 0), "fallocate": (285, 47, "file", 0),
    "fsync": (74, 82, "file", 0), "fdatasync": (75, 83, "file", 0),
    "chmod": (90, None, "path", 0), "fchmod": (91, 52, "file", 0), "fchmodat": (268, 53, "beside", 0),
    "rename": (82, None, "path", 1), "renameat": (264, 38, "beside", 2), "renameat2": (316, 276, "beside", 2),
    "link": (86, None, "path", 1), "linkat": (265, 37, "beside", 2),
    "symlink": (88, None, "path", 1), "symlinkat": (266, 36, "beside", 1),
    "mkdir": (83, None, "path", 0), "mkdirat": (258, 34, "beside", 0),
    "unlink": (87, None, "path", 0), "unlinkat": (263, 35, "beside", 0), "rmdir": (84, None, "path", 0),
}  # fmt: skip
COLUMN = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
NUMBERS = {} if COLUMN is None else {row[COLUMN]: name for name, row in CALLS.items() if row[COLUMN] is not None}
REMOVE = {"unlink", "unlinkat", "rmdir", "chmod", "fchmod", "fchmodat"}  # what works on a disk that is full
OPEN = {"open": 1, "openat": 2}  # where their flags are
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

RECEIVE, SEND = 0xC0502100, 0xC0182101  # ioctl: struct seccomp_notif in, struct seccomp_notif_resp out
NO_NEW_PRIVILEGES, SECCOMP = 38, {"x86_64": 317, "aarch64": 277}.get(platform.machine())
LOAD, EQUAL, RETURN, ALLOW, ASK = 0x20, 0x15, 0x06, 0x7FFF0000, 0x7FC00000


@dataclass(frozen=True)
class Fault:
    """What happens to the n-th change: an error of the system. `lasting`: to all later ones, too."""

    name: str
    error: int
    lasting: bool = False

    def hits(self, call: str, number: int, at: int) -> bool:
        if number != at and not (self.lasting and number > at):
            return False
        return self.error not in (errno.ENOSPC, errno.EDQUOT) or call not in REMOVE


FULL = Fault("disk full", errno.ENOSPC, lasting=True)
READ_ONLY = Fault("read-only", errno.EROFS, lasting=True)
QUOTA = Fault("over quota", errno.EDQUOT)
BROKEN = Fault("broken disk", errno.EIO)
FAULTS = (FULL, READ_ONLY, QUOTA, BROKEN)


@dataclass
class Attempt:
    """How the work ended: "well", "refused" (with an OSError, or a command's one line), or "broke"."""

    ended: str = "killed"
    message: str = ""
    calls: list[str] = field(default_factory=list)  # the changes that it tried, in order


class Refused(OSError):
    """What a command said in its one line."""


def command(*words: str) -> None:
    """`saftnb` with these words. Raises Refused with its line, AssertionError where it is not one."""
    from saftnb.cli import main

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            code = main(words)
    except Exception as error:
        raise AssertionError(f"a traceback: {error!r}") from error
    if code:
        lines = [line for line in said.getvalue().splitlines() if line.startswith("saftnb: ")]
        assert lines == said.getvalue().splitlines()[-1:], said.getvalue()
        raise Refused(*lines)


class Worker:
    """A process that does the work whenever it is told to, under the eyes of this one."""

    def __init__(self, work: Work, root: Path):
        self.root = root
        self.socket, theirs = socket.socketpair()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the child uses none of them
            self.pid = os.fork()
        if self.pid == 0:
            self.socket.close()
            _serve(work, root, theirs)
        theirs.close()
        _, descriptors, *_ = socket.recv_fds(self.socket, 1, 1)
        self.listener = descriptors[0] if descriptors else None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        if self.listener is not None:
            os.close(self.listener)
        os.waitpid(self.pid, 0)

    def attempt(self, fault: Fault | None = None, at: int = 0, before: Callable[[int], None] | None = None) -> Attempt:
        """Do the work once, with the fault at the change number `at`, from 1 on. `before` is called with the number of
        each change, while the work stands still and the change is not made yet."""
        found = Attempt()
        self.socket.sendall(b"!")
        waiting = select.poll()
        waiting.register(self.listener, select.POLLIN)
        waiting.register(self.socket, select.POLLIN)
        while True:
            ready = dict(waiting.poll(60_000))
            if self.listener in ready:
                self._decide(fault, at, before, found.calls)
            elif ready:
                found.ended, found.message = self.socket.recv(1 << 20).decode().split("\0")
                return found
            else:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"the work stands still after {found.calls[-3:]}")

    def _decide(self, fault: Fault | None, at: int, before: Callable[[int], None] | None, calls: list[str]) -> None:
        asked = bytearray(80)
        fcntl.ioctl(self.listener, RECEIVE, asked)
        ticket, thread, _, number, _, _, *arguments = struct.unpack("QIIiIQ6Q", asked)
        error, name = 0, NUMBERS[number]
        target = _target(name, thread, arguments)
        if target is not None and target.is_relative_to(self.root) and _process(thread) == self.pid:
            calls.append(f"{name} {target.relative_to(self.root)}")
            if before is not None:
                before(len(calls))
            if fault is not None and fault.hits(name, len(calls), at):
                error = fault.error
        with suppress(FileNotFoundError):  # a process of the work's that died meanwhile
            fcntl.ioctl(self.listener, SEND, struct.pack("QqiI", ticket, 0, -error, 0 if error else 1))


@cache
def works_here() -> bool:
    """Whether this system lets one process decide about the calls of another."""
    if COLUMN is None:
        return False
    with Worker(lambda _: None, Path("/nowhere")) as worker:
        return worker.listener is not None


def _serve(work: Work, root: Path, there: socket.socket) -> None:
    """In the child: never returns."""
    try:
        listener = _listener()
        socket.send_fds(there, [b"!"], [listener] if listener >= 0 else [])
        while there.recv(1):
            there.sendall("\0".join(_outcome(work, root)).encode())
    finally:
        os._exit(0)


def _outcome(work: Work, root: Path) -> tuple[str, str]:
    try:
        with redirect_stdout(io.StringIO()):
            work(root)
    except OSError as error:
        return "refused", str(error)
    except BaseException:
        return "broke", traceback.format_exc()
    return "well", ""


def _listener() -> int:
    """From here on the kernel asks whoever reads the descriptor about each call of `CALLS`; -1 where it cannot."""
    libc = ctypes.CDLL(None)
    program = [(LOAD, 0, 0, 0)]  # the call's number
    program += [(EQUAL, len(NUMBERS) - place, 0, number) for place, number in enumerate(NUMBERS)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ASK)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    given = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    return libc.syscall(SECCOMP, 1, 8, given)


def _target(name: str, thread: int, arguments: list[int]) -> Path | None:
    """What the call changes; None where it changes nothing, or no file."""
    kind, place = CALLS[name][2:]
    if name in OPEN and not arguments[OPEN[name]] & WRITING:
        return None
    try:
        if kind == "file":
            return Path(os.readlink(f"/proc/{thread}/fd/{arguments[place] & 0xFFFFFFFF}"))
        folder = "cwd"
        if kind == "beside":
            beside, place = ctypes.c_int(arguments[place] & 0xFFFFFFFF).value, place + 1
            folder = "cwd" if beside == -100 else f"fd/{beside}"
        return Path(os.readlink(f"/proc/{thread}/{folder}")) / _text(thread, arguments[place])
    except OSError:  # it died meanwhile
        return None


def _text(thread: int, address: int) -> str:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return os.fsdecode(memory.read(4096).split(b"\0")[0])


def _process(thread: int) -> int:
    with open(f"/proc/{thread}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Tgid"))


def files(root: Path) -> dict[str, bytes | None]:
    """Every file under a folder with its bytes, every folder with None, by path."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in root.rglob("*")
    }


def survives(
    work: Work, root: Path, look: Callable[[Path], object], again: Work | None = None, faults: Sequence[Fault] = FAULTS,
    but: str = "/",
) -> list[str]:  # fmt: skip
    """Do the work with every fault at every change of the files, and kill it before each, and see each time that

    - what `look` finds is what it found before the work or what it finds after it, and after it where it ended well;
    - an error is an OSError, in one line; on a full disk and over quota nothing half-written is left;
    - the work, done again without a fault, ends well, and leaves the files that it leaves on a healthy disk, no more.

    What a process leaves that is killed before a change is what is there when the change is due: it is copied then.
    `again` is the second attempt where that is another one, `but` begins the names that it may leave. Returns the
    changes on a healthy disk.
    """
    old, left = look(root), root.with_name(f"{root.name}-left")
    shutil.copytree(root, left / "before")
    with Worker(work, root) as worker:
        healthy = worker.attempt(before=lambda number: shutil.copytree(root, left / f"killed at {number}"))
        assert healthy.ended == "well", healthy.message
        new, names = look(root), files(root).keys()
        assert old != new
        found = {f"killed at {number}": Attempt() for number in range(1, len(healthy.calls) + 1)}
        for fault in faults:
            for number in range(1, len(healthy.calls) + 1):
                _reset(root, left / "before")
                found[f"{fault.name} at {number}"] = worker.attempt(fault, number)
                root.rename(left / f"{fault.name} at {number}")
    for case, ended in found.items():  # the worker is gone: what it left may be swept
        number = int(case.split()[-1])
        _reset(root, left / case)
        where = f"{case}, {healthy.calls[number - 1]}: {ended.ended} {ended.message}"
        state = look(root)
        assert ended.ended != "broke", where
        assert state in ([new] if ended.ended == "well" else [old, new]), where
        assert "\n" not in ended.message, where
        if case.startswith((FULL.name, QUOTA.name)):
            assert not [name for name in files(root) if name.endswith(".part")], where
        with redirect_stdout(io.StringIO()):
            (again or work)(root)
        assert look(root) == new, where
        differ = {name for name in files(root).keys() ^ names if not name.startswith(but)}
        assert not differ, f"{where}; {differ}"
    return healthy.calls


def _reset(root: Path, to: Path) -> None:
    if root.exists():
        shutil.rmtree(root)
    shutil.copytree(to, root)
