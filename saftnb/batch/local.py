"""The local engine: the runs of a grid in processes on this machine, so many at a time."""

import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event

from saftnb.batch.grid import Grid, Run
from saftnb.batch.manifest import LOG, library_sha256, reason_to_run
from saftnb.batch.run import Stopped, run_one
from saftnb.run_folder import CURRENT, write_json


def _print(line: str) -> None:
    print(line, flush=True)


def plan(grid: Grid, force: bool = False) -> dict[str, str | None]:
    """For each run's id why it has to be executed, or None for one that is done and unchanged."""
    library = library_sha256()
    return {run.id: reason_to_run(run, library) or ("forced" if force else None) for run in grid.runs}


def run_grid(
    grid: Grid, jobs: int | None = None, force: bool = False, say: Callable[[str], None] = _print
) -> dict[str, str]:
    """Execute what is missing of ``grid`` and return the status of every run by its id.

    The statuses are those of the manifests, and two for runs without one: ``blocked`` (a run that it
    waits for is not done) and ``not started`` (stopped by Ctrl-C before). One failure stops no other run.
    """
    started = time.monotonic()
    engine = _Engine(grid, jobs or grid.jobs, plan(grid, force), say)
    todo = sum(reason is not None for reason in engine.reasons.values())
    say(f"grid {grid.name}: {_plural(len(grid.runs))}, {todo} to do, {engine.jobs} at a time")
    for folder in {run.folder.parent for run in grid.runs}:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CURRENT, [run.id for run in grid.runs])
    try:
        engine.work()
    except KeyboardInterrupt:
        say("stopping: ending the notebooks that are running")
        engine.interrupt()
    finally:
        engine.stop.set()
        engine.pool.shutdown(cancel_futures=True)
    tally = ", ".join(f"{count} {status}" for status, count in Counter(engine.status.values()).items())
    say(f"grid {grid.name}: {_plural(len(grid.runs))}: {tally}, in {time.monotonic() - started:.1f} s")
    return engine.status


class _Engine:
    """The state of one call of `run_grid`; only the calling thread changes it."""

    def __init__(self, grid: Grid, jobs: int, reasons: dict[str, str | None], say: Callable[[str], None]) -> None:
        self.grid, self.jobs, self.reasons, self.say = grid, jobs, reasons, say
        self.threads = grid.threads or (1 if jobs > 1 else None)
        self.waiting = list(grid.runs)
        self.status: dict[str, str] = {}
        self.running: dict[Future[dict], Run] = {}
        self.stop = Event()
        self.pool = ThreadPoolExecutor(jobs)

    def work(self) -> None:
        while self.waiting or self.running:
            self.waiting = [run for run in self.waiting if not self._advance(run)]
            if self.running:
                done, _ = wait(self.running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    self._collect(future)

    def interrupt(self) -> None:
        self.stop.set()
        for future in list(self.running):
            self._collect(future)
        for run in self.grid.runs:
            self.status.setdefault(run.id, "not started")

    def _advance(self, run: Run) -> bool:
        """Start, skip or block the run if it is time to; returns whether it is off the waiting list."""
        missing = [other for other in run.after if self.status.get(other, "done") != "done"]
        if missing:
            self.status[run.id] = "blocked"
            self.say(f"blocked  {run.id}: {missing[0]} is {self.status[missing[0]]}")
            return True
        if any(other not in self.status for other in run.after):
            return False
        reason = self.reasons[run.id]
        if reason is None:
            self.status[run.id] = "done"
            self.say(f"skip     {run.id}: done before")
            return True
        if len(self.running) >= self.jobs:
            return False
        given = ", ".join(f"{name}={value}" for name, value in run.overrides.items())
        self.say(f"start    {run.id}{f' ({given})' if given else ''}: {reason}")
        self.running[self.pool.submit(run_one, run, self.threads, self.stop, self.say)] = run
        return True

    def _collect(self, future: Future[dict]) -> None:
        run = self.running.pop(future)
        try:
            manifest = future.result()
        except Stopped:
            self.status[run.id] = "not started"
            return
        except OSError as error:  # a full disk, say: this run cannot go on, others perhaps can
            self.status[run.id] = "failed"
            self.say(f"failed   {run.id}: {error}")
            return
        self.status[run.id] = manifest["status"]
        took = f"{manifest['status']:<8} {run.id} after {manifest['seconds']:.1f} s"
        done = manifest["status"] == "done"
        self.say(took if done else f"{took}: {manifest['reason']}; see {os.path.relpath(run.folder / LOG)}")


def _plural(runs: int) -> str:
    return f"{runs} run" if runs == 1 else f"{runs} runs"
