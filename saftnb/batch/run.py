"""`run_one`: the only way a notebook is executed.

The folder of a run always tells the state of its last attempt. What was complete there before (of another
version of the notebook or library, say) is moved to ``<grid>/.previous/<run>`` first, with its manifest as
``manifest.previous.json``, and removed only when the new attempt is done. POSIX only.
"""

import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import IO, Any

import psutil

import saftnb
from saftnb.batch.grid import Run
from saftnb.batch.manifest import SCHEMA, environment, library_sha256, reason_to_run, results_before
from saftnb.disk import remove_lock, same_file
from saftnb.paths import store_root
from saftnb.run_folder import RESULTS, read_json, write_json
from saftnb.scrub import one_line

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class Stopped(Exception):
    """The user stopped the grid before the run began."""


class Elsewhere(Exception):
    """Another launcher is executing the run."""


def run_one(
    run: Run,
    threads: int | None = None,
    gpus: Sequence[str] | None = None,
    stop: Event | None = None,
    again: bool = True,
) -> dict[str, Any]:
    """Execute ``run`` in a process of its own and return its manifest, whose ``status`` tells how it went.

    ``threads`` limits the numerical libraries; ``gpus`` are the ones that it may see, by their names in
    CUDA_VISIBLE_DEVICES (None: those that this process sees). Setting ``stop`` from another thread ends the run as
    ``interrupted``. Without ``again``, a run that is done and unchanged by now is not executed; its manifest then has
    a key ``found``. Raises Elsewhere while another launcher executes the run, Stopped if ``stop`` was set before it
    began, OSError where its files cannot be written.
    """
    stop = stop or Event()
    with run_lock(run, stop) as lock:
        if not again and reason_to_run(run) is None:
            return run.folder.manifest | {"found": True}
        manifest = _begin(run, threads)
        clock = time.monotonic()
        outcome = _execute(run, threads, gpus, lock, stop)
        manifest["seconds"] = round(time.monotonic() - clock, 3)
        return _finish(run, manifest, outcome)


@contextmanager
def run_lock(run: Run, stop: Event) -> Iterator[int]:
    """Hold the run's lock; yields its descriptor. Raises Elsewhere where it is taken, Stopped where ``stop`` is set.

    The descriptor is handed on to the process that executes the notebook. So when a launcher is killed, the
    lock stays taken until that process has noticed and killed its kernel.
    """
    file = run.folder.lock_file
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Elsewhere(run.id) from None
        if not same_file(descriptor, file):  # its holder took it away a moment ago
            raise Elsewhere(run.id)
        if stop.is_set():
            raise Stopped
        yield descriptor
        remove_lock(file)  # after an error something may still execute, and keeps it
    finally:
        os.close(descriptor)  # no LOCK_UN: that would take the lock from an executing process, too


def _begin(run: Run, threads: int | None) -> dict[str, Any]:
    """Prepare the folder and write the manifest that a crash leaves behind: ``running``."""
    folder = run.folder
    folder.set_aside()
    manifest = {
        "schema": SCHEMA,
        "grid": run.grid,
        "notebook": run.notebook.name,
        "status": "running",
        "reason": None,
        "parameters": run.parameters,
        "overrides": run.overrides,
        "seed": run.parameters.get("seed"),
        "device": run.parameters.get("device"),
        "threads": threads,
        "budget": run.budget,
        "resources": {name: value for name, value in asdict(run.resources).items() if value is not None},
        "notebook_sha256": run.notebook.sha256,
        "code_sha256": run.notebook.code_sha256,
        "library_sha256": library_sha256(),
        "before": results_before(run),
        **environment(),
        "started": _now(),
        "finished": None,
        "seconds": None,
    }
    write_json(folder.manifest_file, manifest | {"pid": os.getpid(), "token": secrets.token_hex(8)})
    folder.notebook_file.write_text(run.notebook.text, encoding="utf-8")
    return manifest


def _execute(run: Run, threads: int | None, gpus: Sequence[str] | None, lock: int, stop: Event) -> dict[str, Any]:
    """Run the notebook in its process and say how that ended: ``status``, ``reason`` and ``peak_memory``."""
    with (
        open(run.folder.log_file, "wb") as log,
        tempfile.TemporaryDirectory(prefix="saftnb-", ignore_cleanup_errors=True) as sockets,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "saftnb.batch.execute", sockets],
            cwd=run.folder.path,
            env=_environment(run, threads, gpus),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
        watch = _Watch(run, process.pid)
        try:
            cwd = str(run.notebook.path.parent)
            _send(process.stdin, {"parameters": run.parameters, "cwd": cwd})
            while process.poll() is None and not stop.wait(0.1) and not watch.over():
                pass
        finally:
            _end(process)
    return _outcome(run, process.returncode, watch.reason, stop) | {"peak_memory": round(watch.peak, 3)}


def _outcome(run: Run, code: int, over: str, stop: Event) -> dict[str, str]:
    """How the notebook's process ended; what we ended ourselves may still have said that it died."""
    outcome = read_json(run.folder.outcome_file)
    if outcome and (outcome["status"] == "done" or not (over or stop.is_set())):
        return outcome
    if over:
        return {"status": "killed", "reason": f"{over}{_where(run)}"}
    if stop.is_set():
        return {"status": "interrupted", "reason": "stopped by the user"}
    if code < 0:
        name = signal.Signals(-code).name
        return {"status": "killed", "reason": f"the notebook's process got {name}"}
    return {"status": "failed", "reason": f"the notebook's process exited with {code}"}


def _where(run: Run) -> str:
    cell = run.folder.at.get("cell")
    return f" (cell {cell})" if cell else ""


class _Watch:
    """The time that a run takes, and the resident memory of its processes, beside what it may take."""

    EVERY = 0.5  # seconds between two looks at the memory

    def __init__(self, run: Run, pid: int) -> None:
        self.limits, self.process = run.resources, psutil.Process(pid)
        self.began = time.monotonic()
        self.next = self.began
        self.peak, self.reason = 0.0, ""  # GiB

    def over(self) -> bool:
        """Whether the run has taken more than it may; ``reason`` then says what."""
        now = time.monotonic()
        if self.limits.time_limit and now - self.began > self.limits.time_limit:
            self.reason = f"over its time limit of {self.limits.time_limit:g} s"
        if now >= self.next:
            self.next = now + self.EVERY
            used = self._resident() / 2**30
            self.peak = max(self.peak, used)
            if self.limits.memory and used > self.limits.memory:
                self.reason = f"out of memory: its processes took {used:.2f} GiB of {self.limits.memory:g} GiB"
        return bool(self.reason)

    def _resident(self) -> int:
        try:
            family = [self.process, *self.process.children(recursive=True)]
        except psutil.Error:
            return 0
        return sum(map(_resident, family))


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _send(stdin: IO[bytes] | None, job: dict[str, Any]) -> None:
    assert stdin is not None
    try:
        stdin.write(json.dumps(job).encode() + b"\n")
        stdin.flush()
    except BrokenPipeError:  # it is dead already; its exit code tells
        pass


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the pipe, which ends the process and its kernel if they still run."""
    try:
        assert process.stdin is not None
        process.stdin.close()
    except BrokenPipeError:
        pass
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(run: Run, threads: int | None, gpus: Sequence[str] | None) -> dict[str, str]:
    """What the notebook's process sees; its library is this process's, its figures go inline."""
    library = str(Path(saftnb.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")]))
    limits = dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {}
    visible = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    own = {"SAFTNB_RUN_DIR": str(run.folder.path.resolve()), "SAFTNB_STORE": str(store_root()), "PYTHONPATH": path}
    inherited = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return inherited | limits | visible | own


def _finish(run: Run, manifest: dict[str, Any], outcome: dict[str, Any]) -> dict[str, Any]:
    """Complete the manifest, as the last thing that is written."""
    folder = run.folder
    if outcome["status"] == "done":
        if not folder.results_file.exists():
            write_json(folder.results_file, {})
        if not _is_object(folder.results_file):
            outcome = {**outcome, "status": "failed", "reason": f"{RESULTS} is no JSON object: the notebook wrote it"}
    checkpoints = read_json(folder.checkpoints_file, [])
    for file in (folder.outcome_file, folder.progress_file, folder.bar_file, folder.checkpoints_file):
        file.unlink(missing_ok=True)
    reason = outcome.get("reason")
    manifest |= {
        "status": outcome["status"],
        "reason": one_line(reason, [folder.path, run.notebook.path.parent]) if reason else None,
        "finished": _now(),
        "peak_memory": outcome.get("peak_memory"),
        "checkpoints": sorted(checkpoints, key=lambda entry: entry["name"]),
    }
    manifest = folder.seal(manifest)
    if manifest["status"] == "done":
        folder.forget_previous()
    return manifest


def _is_object(file: Path) -> bool:
    try:
        return isinstance(read_json(file), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
