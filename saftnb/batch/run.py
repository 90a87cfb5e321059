"""`run_one`: the only way a notebook is executed.

The folder of a run always tells the state of its last attempt. What was complete there before (of another
version of the notebook or library, say) is moved to ``<grid>/.previous/<run>`` first, with its manifest as
``manifest.previous.json``, and removed only when the new attempt is done. POSIX only.
"""

import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import IO, Any

import saftnb
from saftnb.batch.grid import Run
from saftnb.batch.manifest import (
    LOG,
    MANIFEST,
    NOTEBOOK,
    OUTCOME,
    SCHEMA,
    environment,
    is_done,
    library_sha256,
    one_line,
    read_manifest,
    reason_to_run,
    results_before,
    sha256_of,
)
from saftnb.batch.record import RESULTS
from saftnb.paths import store_root
from saftnb.run_folder import CHECKPOINTS, read_json, write_json

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class Stopped(Exception):
    """The user stopped the grid before the run began."""


def run_one(
    run: Run,
    threads: int | None = None,
    stop: Event | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Execute ``run`` in a process of its own and return its manifest, whose ``status`` tells how it went.

    ``threads`` limits the numerical libraries. Setting ``stop`` from another thread ends the run as
    ``interrupted``. If another launcher has the run, wait for it, and take its result if that is done.
    Raises Stopped if ``stop`` was set before the run began.
    """
    stop = stop or Event()
    with run_lock(run, stop, say) as (lock, waited):
        if waited and reason_to_run(run) is None:
            return read_manifest(run.folder) or {}
        manifest = _begin(run, threads)
        clock = time.monotonic()
        outcome = _execute(run, threads, lock, stop)
        manifest["seconds"] = round(time.monotonic() - clock, 3)
        return _finish(run, manifest, outcome)


@contextmanager
def run_lock(run: Run, stop: Event, say: Callable[[str], None]) -> Iterator[tuple[int, bool]]:
    """Hold the run's lock; yields its descriptor and whether we had to wait.

    The descriptor is handed on to the process that executes the notebook. So when a launcher is killed, the
    lock stays taken until that process has noticed and killed its kernel.
    """
    locks = run.folder.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(locks / f"{run.id}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    waited = False
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    say(f"wait     {run.id}: it is being run by another process")
                waited = True
            if stop.wait(0.2):
                raise Stopped
        if stop.is_set():
            raise Stopped
        yield descriptor, waited
    finally:
        os.close(descriptor)  # no LOCK_UN: that would take the lock from an executing process, too


def set_aside(run: Run) -> None:
    """Make the run's folder empty. A run that was executed to the end is moved away, one from a list is dropped."""
    previous = run.folder.parent / ".previous" / run.id
    if is_done(run.folder) and "taken" not in (read_manifest(run.folder) or {}):
        shutil.rmtree(previous, ignore_errors=True)
        previous.parent.mkdir(exist_ok=True)
        run.folder.rename(previous)
        (previous / MANIFEST).rename(previous / "manifest.previous.json")
    if run.folder.exists():
        shutil.rmtree(run.folder)
    run.folder.mkdir(parents=True)


def _begin(run: Run, threads: int | None) -> dict[str, Any]:
    """Prepare the folder and write the manifest that a crash leaves behind: ``running``."""
    set_aside(run)
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
        "notebook_sha256": run.notebook.sha256,
        "code_sha256": run.notebook.code_sha256,
        "library_sha256": library_sha256(),
        "before": results_before(run),
        **environment(),
        "started": _now(),
        "finished": None,
        "seconds": None,
    }
    write_json(run.folder / MANIFEST, manifest | {"pid": os.getpid(), "token": secrets.token_hex(8)})
    (run.folder / NOTEBOOK).write_text(run.notebook.text, encoding="utf-8")
    return manifest


def _execute(run: Run, threads: int | None, lock: int, stop: Event) -> dict[str, str]:
    """Run the notebook in its process and say how that ended: ``status`` and ``reason``."""
    with (
        open(run.folder / LOG, "wb") as log,
        tempfile.TemporaryDirectory(prefix="saftnb-", ignore_cleanup_errors=True) as sockets,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "saftnb.batch.execute"],
            cwd=run.folder,
            env=_environment(run, threads),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
        try:
            cwd = str(run.notebook.path.parent)
            _send(process.stdin, {"parameters": run.parameters, "cwd": cwd, "sockets": sockets})
            while process.poll() is None and not stop.wait(0.1):
                pass
        finally:
            _end(process)
    outcome = read_json(run.folder / OUTCOME)
    if outcome:
        return outcome
    if stop.is_set():
        return {"status": "interrupted", "reason": "stopped by the user"}
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return {"status": "killed", "reason": f"the notebook's process got {name}"}
    return {"status": "failed", "reason": f"the notebook's process exited with {process.returncode}"}


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


def _environment(run: Run, threads: int | None) -> dict[str, str]:
    """What the notebook's process sees; its library is this process's, its figures go inline."""
    library = str(Path(saftnb.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH")]))
    limits = dict.fromkeys(THREAD_VARIABLES, str(threads)) if threads else {}
    own = {"SAFTNB_RUN_DIR": str(run.folder.resolve()), "SAFTNB_STORE": str(store_root()), "PYTHONPATH": path}
    inherited = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return inherited | limits | own


def _finish(run: Run, manifest: dict[str, Any], outcome: dict[str, str]) -> dict[str, Any]:
    """Complete the manifest, as the last thing that is written."""
    folder = run.folder
    if outcome["status"] == "done" and not (folder / RESULTS).exists():
        write_json(folder / RESULTS, {})
    checkpoints = read_json(folder / CHECKPOINTS, [])
    for name in (OUTCOME, CHECKPOINTS):
        (folder / name).unlink(missing_ok=True)
    reason = outcome.get("reason")
    manifest |= {
        "status": outcome["status"],
        "reason": one_line(reason, folder, run.notebook.path.parent) if reason else None,
        "finished": _now(),
        "checkpoints": sorted(checkpoints, key=lambda entry: entry["name"]),
        "results_sha256": sha256_of(folder / RESULTS),
        "run_sha256": sha256_of(folder / NOTEBOOK),
    }
    write_json(folder / MANIFEST, manifest)
    if manifest["status"] == "done":
        shutil.rmtree(folder.parent / ".previous" / run.id, ignore_errors=True)
    return manifest


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
