"""What several processes write, perhaps on several machines: files whole or not at all, and locks.

Imports nothing heavy. A temporary file's name says which process on which machine writes it, so that what a killed one
left behind can be told from what another is writing.
"""

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

HERE = 60.0  # seconds without a change after which the temporary file of a process that is gone counts as left behind
ELSEWHERE = 3600.0  # and that of another machine, whose processes cannot be seen from here
_UMASK = os.umask(0)  # it can be read by setting it alone: once, before there are threads
os.umask(_UMASK)
_HERE, _EXCHANGE = -100, 2  # of renameat2(2): names as they are, and RENAME_EXCHANGE
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without locks answers


@contextmanager
def whole_file(path: Path, *, durable: bool = True, alone: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`. What the block wrote there takes `path`'s place when it ends well, and goes
    away when it does not. Sweeps first what killed writers left.

    Args:
        durable: wait until it is on the disk.
        alone: the path is in a temporary folder, for writers that put files beside theirs, as safetensors does.
    """
    sweep(path)
    temporary = _temporary(path)
    part = temporary / path.name if alone else temporary
    with _removing(temporary), _naming(path, temporary):
        if alone:
            temporary.mkdir()
        yield part
        part.chmod(0o666 & ~_UMASK)  # safetensors gives its files to their owner alone
        if durable:
            sync(part)
        os.replace(part, path)
        if alone:
            temporary.rmdir()  # said aloud where it fails: `path` may be in a folder that becomes a result
        if durable:
            sync(path.parent)


@contextmanager
def whole_folder(path: Path, inside: Path | None = None) -> Iterator[Path]:
    """A new temporary folder, beside `path` or in the folder `inside`. With all that the block put there it takes
    `path`'s place when the block ends well, and goes away when it does not. Sweeps first what killed writers left."""
    restore(path)
    beside = inside / path.name if inside else path
    sweep(beside)
    temporary = _temporary(beside)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(temporary.parent)) from None
    with _removing(temporary), _naming(path, temporary):
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~_UMASK)
            sync(entry)
        _take_place(temporary, path, beside)
        sync(path.parent)


@contextmanager
def _removing(temporary: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):  # on a disk that has become read-only: the error that ended the block says more
            _remove(temporary)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Errors of the disk name what was to be written, not the temporary file."""
    try:
        yield
    except OSError as error:
        named = error.filename is None or str(error.filename).startswith(str(temporary))
        if error.errno is None or not named:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def restore(path: Path) -> None:
    """Put back what a crash between the two renamings of `whole_folder` left under another name."""
    previous = _previous(path)
    if previous.exists() and not path.exists():
        previous.rename(path)


def _take_place(new: Path, path: Path, beside: Path) -> None:
    """In one step where the system can exchange two names; else in two, between which there is no `path`."""
    if not path.exists():
        new.rename(path)
    elif not _exchanged(new, path):
        _forget(path, beside)
        previous = _previous(path)
        path.rename(previous)
        try:
            new.rename(path)
        except BaseException:
            previous.rename(path)
            raise
    _forget(path, beside)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names, as Linux can on most file systems, NFS not among them; False where that is not possible."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _forget(path: Path, beside: Path) -> None:
    """Remove the former `path`, which may be large, under a temporary name: `restore` must not find half of it."""
    previous = _previous(path)
    if previous.exists() or previous.is_symlink():
        gone = _temporary(beside)
        previous.rename(gone)
        _remove(gone)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove the temporary files and folders of `path` that their writers left: a process of this machine that is
    gone, or one of another machine that wrote nothing for an hour."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        written = re.fullmatch(r"(.+)-(\d+)\.[0-9a-f]{8}\.part", left.name.removeprefix(f".{path.name}."))
        if not written:  # of another file, whose name begins like this one's
            continue
        host, pid = written.groups()
        try:
            idle = time.time() - left.stat().st_mtime
            gone = idle > HERE and not _lives(int(pid)) if host == _host() else idle > ELSEWHERE
            if gone:
                _remove(left)
        except OSError:  # gone meanwhile, or not ours to remove
            continue


def sync(path: Path) -> None:
    """Have the operating system put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock file `path`, which goes away afterwards. Where another process has it, wait, and say so in a line.

    A process that dies gives its lock back. On a file system without locks there is a line that says so, and the block
    runs: `whole_file` keeps the results whole, but several processes may do the same work.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquired(path, doing)
    try:
        yield
    finally:
        remove_lock(path)
        with suppress(OSError):  # closing alone would leave it with a forked process that is still there
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def remove_lock(path: Path) -> None:
    """Remove the lock file of work that is done, which stays where its holder was killed between the two."""
    with suppress(OSError):  # on a disk that is read-only by now it stays, unlocked
        path.unlink(missing_ok=True)


def _acquired(path: Path, doing: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that {doing}", flush=True)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if same_file(descriptor, path):
                return descriptor
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(f"{path.parent}: no locks on this file system; another process may do the same", flush=True)
                return descriptor
            if not isinstance(error, FileNotFoundError) and error.errno != errno.ESTALE:  # the holder took it away
                os.close(descriptor)
                raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one that had it took the file away: there may be another by now


def same_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}.{secrets.token_hex(4)}.part")


def _host() -> str:
    """This machine's name, and a hash of where its numbers of processes hold: containers may share a name."""
    name = "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())[:40]
    return f"{name}-{_processes()}"


@cache
def _processes() -> str:
    try:
        booted = Path("/proc/sys/kernel/random/boot_id").read_text()
        where = f"{booted}{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        where = ""
    return hashlib.sha256(where.encode()).hexdigest()[:8]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def lock_fault(folder: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Why locks in a folder would not keep two processes apart, in one line; None where they do. That they hold between
    machines is read from how the file system is mounted, since one machine cannot try it."""
    there = folder
    while not there.exists():
        there = there.parent
    probe = there / f".lock-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with probe.open("w") as one, probe.open("w") as other:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return _only_here(there, mounts)
            return "a lock was given to two at once"
    except OSError as error:
        lustre = "; Lustre needs the mount option flock" if error.errno in NO_LOCKS else ""
        return f"no locks here ({error.strerror}){lustre}"
    finally:
        probe.unlink(missing_ok=True)


def _only_here(folder: Path, mounts: Path) -> str | None:
    lines = mounts.read_text().splitlines() if mounts.is_file() else []
    found = [line.split()[1:4] for line in lines if len(line.split()) >= 4]
    above = [entry for entry in found if folder.resolve().is_relative_to(entry[0])]
    if not above:
        return None
    _, kind, options = max(above, key=lambda entry: len(entry[0]))
    local = {"localflock", "nolock", "local_lock=flock", "local_lock=all"} & set(options.split(","))
    if local:
        return f"{kind} is mounted with {local.pop()}: locks hold on this machine alone"
    return None
