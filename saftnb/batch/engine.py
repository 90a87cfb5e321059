"""A grid, run: the plan, its execution where an engine has room, and what came of it."""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from saftnb.batch.display import Display, Lines, Overview, Row
from saftnb.batch.grid import Grid, GridError, Run
from saftnb.batch.kept import take
from saftnb.batch.local import Local
from saftnb.batch.plan import LATER, Plan, Step, plan
from saftnb.batch.run import Elsewhere, Stopped

PAUSE = 0.5  # seconds between two looks at what runs
OVER = ("done", "left out")


class Engine(Protocol):
    """Where runs are executed."""

    @property
    def width(self) -> int: ...
    @property
    def pool(self) -> Executor: ...  # for small things that need no share of it

    def check(self, runs: list[Run]) -> None: ...
    def describe(self, grid: Grid) -> str: ...
    def start(self, run: Run, again: bool) -> Future[dict[str, Any]] | None: ...
    def release(self, run: Run) -> None: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


def open_engine(kind: str, jobs: int | None = None, address: str | None = None) -> Engine:
    """The engine called ``kind``: local, or ray (at ``address``, see `OnRay`). Raises GridError."""
    if kind == "local":
        return Local(jobs)
    try:
        from saftnb.batch.cluster import OnRay
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise GridError("the engine ray needs Ray: pip install 'saftnb[cluster]'") from None
    return OnRay(address, jobs)


def run_grid(
    grid: Grid,
    jobs: int | None = None,
    force: bool = False,
    say: Callable[[str], None] | None = None,
    *,
    fresh: bool = False,
    only: Sequence[str] = (),
    retry_failed: bool = False,
    engine: Engine | None = None,
    address: str | None = None,
    display: Display | None = None,
    after_each: Callable[[], None] | None = None,
) -> dict[str, str]:
    """Execute what is missing of ``grid`` and return the status of every run by its id.

    ``force``, ``fresh``, ``only``, ``retry_failed``: see `plan`. ``engine``: by default the grid's, with ``jobs``
    or the grid's jobs at a time; Ray's at ``address``. ``say`` gets every line, ``display`` the lines and the state of
    the grid. ``after_each`` is called when a run has ended, and must not take long.

    The statuses are those of the manifests, and three more: ``blocked`` (a run that it waits for is not done),
    ``not started`` (stopped by Ctrl-C before) and ``left out`` (not asked for). One failure stops no other run.
    Raises GridError where a run needs more than there is, OSError where the folder of runs cannot be written.
    """
    started = time.monotonic()
    planned = plan(grid, force, fresh, only, retry_failed)
    engine = engine or open_engine(grid.engine, jobs or grid.jobs, address)
    try:
        engine.check([step.run for step in planned.steps if step.executes])
        grid.claim()
        with display or Lines(say) as shown:
            head = f"grid {grid.name}: {_plural(len(grid.runs))}"
            about = planned.estimate(engine.width)
            shown.say(f"{head}, {len(planned.todo)} to do, {engine.describe(grid)}{about}")
            execution = _Execution(planned, engine, shown, after_each or (lambda: None))
            try:
                execution.work()
            except KeyboardInterrupt:
                shown.say("stopping: ending the notebooks that are running")
                execution.interrupt()
            for line in planned.outdated():
                shown.say(line)
            tally = ", ".join(f"{n} {status}" for status, n in Counter(execution.statuses.values()).items())
            shown.say(f"{head}: {tally}, in {time.monotonic() - started:.1f} s")
    finally:
        engine.close()
    return execution.statuses


@dataclass(eq=False)
class _Task:
    """One run while its grid is worked on."""

    step: Step
    status: str = ""  # how it ended
    future: Future[dict[str, Any]] | None = None  # while an engine has it
    token: str | None = None  # of the attempt that was in its folder when it was handed over
    began: float | None = None  # when it was seen to begin, by the monotonic clock
    look: float = 0.0  # another launcher has it: when to look again

    @property
    def run(self) -> Run:
        return self.step.run


class _Execution:
    """Works through a plan; only the calling thread changes it."""

    def __init__(self, planned: Plan, engine: Engine, display: Display, after_each: Callable[[], None]) -> None:
        self.grid, self.engine, self.display = planned.grid, engine, display
        self.say, self.after_each = display.say, after_each
        self.tasks = {step.run.id: _Task(step) for step in planned.steps}

    @property
    def statuses(self) -> dict[str, str]:
        return {run_id: task.status for run_id, task in self.tasks.items() if task.status}

    def work(self) -> None:
        while waiting := [task for task in self.tasks.values() if not task.status]:
            for task in waiting:
                if task.future is None:
                    self._advance(task)
            running = {task.future: task for task in waiting if task.future is not None}
            for task in running.values():
                self._notice_beginning(task)
            self.display.show(self.overview())
            if running:
                for future in wait(running, timeout=PAUSE, return_when=FIRST_COMPLETED).done:
                    self._collect(running[future])
            elif not all(task.status for task in waiting):
                time.sleep(PAUSE)

    def interrupt(self) -> None:
        self.engine.interrupt()
        for task in self.tasks.values():
            if task.future is not None:
                self._collect(task)
            task.status = task.status or "not started"

    def overview(self) -> Overview:
        """What is done, running and failed, and how long the rest will take."""
        now, going = time.monotonic(), [task for task in self.tasks.values() if not task.status]
        rows = [
            Row(task.run.id, task.run.folder.at, now - task.began, task.step.seconds)
            for task in going
            if task.began is not None
        ]
        ahead = [task.step.seconds for task in going if task.step.executes and task.began is None]
        failed = [(run_id, status) for run_id, status in self.statuses.items() if status not in OVER]
        counts = Counter(self.statuses.values())
        return Overview(self.grid.name, len(self.tasks), counts, rows, failed, ahead, self.engine.width)

    def _advance(self, task: _Task) -> None:
        """Start, skip or block the run if it is time to."""
        step, run = task.step, task.run
        before = [self.tasks[run_id] for run_id in run.after]
        missing = [other for other in before if other.status not in ("", "done")]
        if step.left_out:
            task.status = "left out" if step.reason else "done"
        elif missing:
            task.status = "blocked"
            self.say(f"blocked  {run.id}: {missing[0].run.id} is {missing[0].status}")
        elif not all(other.status for other in before):
            return
        elif step.reason is None:
            task.status = "done"
            self.say(f"skip     {run.id}: done before")
        elif time.monotonic() >= task.look:
            again, task.token = step.again and not task.look, _token(run)
            if step.entry is None:
                task.future = self.engine.start(run, again)
            else:
                assert self.grid.kept is not None  # the entry is from there
                task.future = self.engine.pool.submit(take, run, step.entry, self.grid.kept.name, again)

    def _notice_beginning(self, task: _Task) -> None:
        token = _token(task.run)
        if token in (None, task.token):
            return
        task.token = token
        if task.began is None:
            self._begin(task)
        else:
            task.began = time.monotonic()
            self.say(f"again    {task.run.id}: its node was lost")

    def _begin(self, task: _Task) -> None:
        task.began = time.monotonic()
        self.say(f"start    {task.run.label}: {task.step.reason}")

    def _collect(self, task: _Task) -> None:
        run, future, task.future = task.run, task.future, None
        assert future is not None  # it is only collected where there is one
        self.engine.release(run)
        try:
            manifest = future.result()
        except Stopped:
            task.status = "not started"
            return
        except Elsewhere:
            if not task.look:
                self.say(f"wait     {run.id}: it is being run by another launcher")
            task.look = time.monotonic() + PAUSE
            task.began = None  # it was the other's beginning that we saw
            return
        except OSError as error:  # a full disk, say: this run cannot go on, others perhaps can
            task.status = "failed"
            self.say(f"failed   {run.id}: {error}")
            return
        if task.began is None and not {"found", "taken"} & manifest.keys():
            self._begin(task)
        task.status = manifest["status"]
        self.say(_line(run, manifest, task.step.reason))
        self.after_each()


def _token(run: Run) -> str | None:
    """The mark of the attempt that goes on in the run's folder."""
    return run.folder.manifest.get("token")


def _line(run: Run, manifest: dict[str, Any], reason: str | None) -> str:
    if "found" in manifest:
        why = "the runs before it came out the same" if reason == LATER else "done meanwhile by another launcher"
        return f"skip     {run.id}: {why}"
    if "taken" in manifest:
        return f"take     {run.id}: done before, in {manifest['taken']}"
    took = f"{manifest['status']:<8} {run.id} after {manifest['seconds']:.1f} s"
    if manifest["status"] == "done":
        return took
    return f"{took}: {manifest['reason']}; see {os.path.relpath(run.folder.log_file)}"


def _plural(runs: int) -> str:
    return f"{runs} run" if runs == 1 else f"{runs} runs"
