"""The Ray engine: the same `run_one` as Ray tasks, on one machine or many.

Every node needs this project installed in the same version, and the folders of runs, notebooks and checkpoints under
the same paths (a shared file system); that is checked before anything starts. Ray decides where a run goes by its
``resources``: cores (1 by default), GPUs (1 by default where the cluster has any), memory. A run whose node is lost is
started again on another one.
"""

import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import ray
from ray.exceptions import RayError, TaskCancelledError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from saftnb.batch.grid import Grid, GridError, Run
from saftnb.batch.local import Machine
from saftnb.batch.manifest import library_sha256
from saftnb.batch.run import Elsewhere, Stopped, run_lock, run_one
from saftnb.paths import store_root
from saftnb.run_folder import write_json

RETRIES = 5  # of a run whose node or worker is lost
PATIENCE = 60.0  # seconds for a node to answer
SHARED = ("SAFTNB_STORE", "SAFTNB_DATA")  # variables that all nodes get from the launcher


class OnRay:
    """Runs as tasks of a Ray cluster: that at ``address`` (HOST:PORT), or of RAY_ADDRESS, or started on this machine.

    ``jobs`` limits how many tasks are handed to it at a time. Raises GridError where no cluster answers.
    """

    def __init__(self, address: str | None = None, jobs: int | None = None) -> None:
        self.ours = not ray.is_initialized()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            _reach(address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
        except (RayError, OSError, ValueError, RuntimeError) as error:
            raise GridError(f"no Ray cluster at {address or 'this machine'}: {_last_line(error)}") from None
        self.jobs = jobs
        self.tasks: dict[str, Any] = {}  # run id -> Ray's reference to its manifest
        self.pool = ThreadPoolExecutor(4)
        self.environment = {name: str(Path(os.environ[name]).absolute()) for name in SHARED if name in os.environ}
        self.environment["SAFTNB_STORE"] = str(store_root().absolute())
        self.has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        self.narrow = ""  # nodes whose processes may use fewer cores than Ray counts

    def check(self, runs: list[Run]) -> None:
        """Raises GridError, naming the node, where one does not see the folders or has another version of the project;
        and for a run that no node can hold."""
        nodes = [node for node in ray.nodes() if node["Alive"]]
        for run in runs:
            if not any(self._fits(run, node["Resources"]) for node in nodes):
                raise GridError(f"{run.place}: {run.notebook.name} needs {_words(run)}, which no node has")
        with _marks({run.folder.path.parent for run in runs} | {Path(self.environment["SAFTNB_STORE"])}) as marks:
            places = sorted({str(run.notebook.path) for run in runs})
            asked = {node["NodeID"]: _on(node, _problem).remote(marks, places, library_sha256()) for node in nodes}
            for node in nodes:
                name = f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
                try:
                    problem, cores = ray.get(asked[node["NodeID"]], timeout=PATIENCE)
                except (RayError, TimeoutError) as error:
                    raise GridError(f"{name} cannot run the grid: {_last_line(error)}") from None
                if problem:
                    raise GridError(f"{name} {problem}")
                if cores < (counted := node["Resources"].get("CPU", 0)):
                    self.narrow = f"; {name}: Ray counts {counted:g} cores and its processes may use {cores}"
                    self.narrow += " (under Slurm give srun --cpus-per-task)"

    @property
    def width(self) -> int:
        room = int(ray.cluster_resources().get("GPU" if self.has_gpus else "CPU", 1))
        return max(1, min(self.jobs or room, room))

    def describe(self, grid: Grid) -> str:
        """The cluster in words."""
        nodes = sum(node["Alive"] for node in ray.nodes())
        held = ray.cluster_resources()
        gpus = f" and {held['GPU']:g} GPUs" if self.has_gpus else ""
        cores = f"{held.get('CPU', 0):g} cores"
        return f"on Ray: {nodes} {'node' if nodes == 1 else 'nodes'} with {cores}{gpus}{self.narrow}"

    def start(self, run: Run, again: bool) -> Future[dict[str, Any]] | None:
        """Hand the run to Ray, or None where ``jobs`` runs are there already."""
        if self.jobs and len(self.tasks) >= self.jobs:
            return None
        needs = self._needs(run)
        task = _run.options(
            num_cpus=needs["CPU"],
            num_gpus=needs["GPU"],
            memory=needs["memory"] or None,
            max_retries=RETRIES,
            name=run.id,
        ).remote(run, int(needs["CPU"]), needs["GPU"] > 0, again, self.environment)
        self.tasks[run.id] = task
        answer: Future[dict[str, Any]] = Future()
        task.future().add_done_callback(lambda done: self.pool.submit(_settle, answer, run, done))
        return answer

    def release(self, run: Run) -> None:
        """The run has ended."""
        self.tasks.pop(run.id, None)

    def interrupt(self) -> None:
        """End what runs, wherever it does."""
        for task in self.tasks.values():
            ray.cancel(task)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.ours:
            ray.shutdown()

    def _needs(self, run: Run) -> dict[str, float]:
        asked = run.resources
        gpus = asked.gpus if asked.gpus is not None else float(self.has_gpus)
        return {"CPU": asked.cpus or 1, "GPU": gpus, "memory": int((asked.memory or 0) * 2**30)}

    def _fits(self, run: Run, there: dict[str, float]) -> bool:
        return all(there.get(name, 0) >= amount for name, amount in self._needs(run).items())


def _reach(address: str | None) -> None:
    """OSError where nobody listens at HOST:PORT: Ray itself would wait for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "://" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _words(run: Run) -> str:
    asked = run.resources
    words = [f"{asked.cpus or 1} cores"]
    words += [f"{asked.gpus:g} GPUs"] if asked.gpus else []
    words += [f"{asked.memory:g} GiB"] if asked.memory else []
    return ", ".join(words)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _on(node: dict[str, Any], task: Any) -> Any:
    """The task, to be done on this node or not at all."""
    return task.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))


@contextmanager
def _marks(folders: set[Path]) -> Iterator[dict[str, str]]:
    """A file in each folder, with its content: who reads it there sees the same folder."""
    marks = {}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / f".seen-{secrets.token_hex(8)}"
        mark.write_text(secrets.token_hex(8))
        marks[str(mark)] = mark.read_text()
    try:
        yield marks
    finally:
        for mark in marks:
            Path(mark).unlink(missing_ok=True)


@ray.remote
def _problem(marks: dict[str, str], notebooks: list[str], library: str) -> tuple[str | None, int]:
    """What is wrong with the node that this runs on, and how many cores its processes may use."""
    return _fault(marks, notebooks, library), Machine.here().cpus


def _fault(marks: dict[str, str], notebooks: list[str], library: str) -> str | None:
    for mark, value in marks.items():
        if not Path(mark).is_file() or Path(mark).read_text() != value:
            return f"does not see {Path(mark).parent}: it must be on a file system that all nodes share"
    missing = [notebook for notebook in notebooks if not Path(notebook).is_file()]
    if missing:
        return f"does not see {missing[0]}: the project must have the same path on all nodes"
    return "has another version of the project installed" if library_sha256() != library else None


@ray.remote
def _run(run: Run, cpus: int, with_gpus: bool, again: bool, environment: dict[str, str]) -> dict[str, Any]:
    """`run_one` on a node; where it raises, that as data: exceptions may not survive the way back."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a cluster that a script started in its background
    stop = Event()  # ignores it, and would never hear that the run is cancelled
    gpus = None if with_gpus else ()  # Ray has named those that it gives
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_one, run, cpus, gpus, stop, again)
        try:
            while not running.done():
                time.sleep(0.1)
        except KeyboardInterrupt:  # how Ray cancels a task
            stop.set()
        try:
            return running.result()
        except (Elsewhere, Stopped, OSError) as error:
            return {"raised": type(error).__name__, "error": str(error)}


def _settle(answer: Future[dict[str, Any]], run: Run, task: Future[Any]) -> None:
    """Answer with the manifest that the task came to, or with what `run_one` raised."""
    try:
        answer.set_result(_manifest(run, task))
    except BaseException as error:
        answer.set_exception(error)


def _manifest(run: Run, task: Future[Any]) -> dict[str, Any]:
    try:
        found = task.result()
    except TaskCancelledError:
        found = _rest(run, {"status": "interrupted", "reason": "stopped by the user"})
    except RayError as error:
        found = _rest(run, {"status": "killed", "reason": f"lost with its node or worker ({type(error).__name__})"})
    if "raised" in found:
        raise {"Elsewhere": Elsewhere, "Stopped": Stopped}.get(found["raised"], OSError)(found["error"])
    return found


def _rest(run: Run, verdict: dict[str, str]) -> dict[str, Any]:
    """What a task left that nobody answers for: its manifest, which claims no longer that the run goes on."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            with run_lock(run, Event()):
                manifest = run.folder.manifest or {"status": None}
                if manifest["status"] == "running":
                    manifest = {k: v for k, v in manifest.items() if k not in ("pid", "token")} | verdict
                    manifest["seconds"] = manifest["seconds"] or 0.0
                    write_json(run.folder.manifest_file, manifest)
                return manifest if manifest["status"] else {"raised": "Stopped", "error": ""}
        except Elsewhere:  # its notebook is being ended
            time.sleep(0.2)
    return verdict | {"seconds": 0.0}
