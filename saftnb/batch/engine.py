"""A grid's runs in their order: what waits, what runs where an engine has room, what came of it."""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol

from saftnb.batch.display import Display, Lines, Overview, Row
from saftnb.batch.grid import Grid, GridError, Run
from saftnb.batch.kept import take
from saftnb.batch.local import Local
from saftnb.batch.manifest import library_sha256
from saftnb.batch.notebooks import NotebookError, read_notebook
from saftnb.batch.plan import LATER, Plan, estimate, plan
from saftnb.batch.run import Elsewhere, Stopped
from saftnb.run_folder import CURRENT, write_json

PAUSE = 0.5  # seconds between two looks at what runs
OVER = ("done", "left out")


class Engine(Protocol):
    """Where runs are executed."""

    width: int

    def check(self, runs: list[Run]) -> None: ...
    def describe(self, grid: Grid) -> str: ...
    def start(self, run: Run, again: bool) -> Future[dict[str, Any]] | None: ...
    def submit(self, work: Callable[..., dict[str, Any]], *arguments: Any) -> Future[dict[str, Any]]: ...
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
    display: Display | None = None,
    after_each: Callable[[], None] | None = None,
) -> dict[str, str]:
    """Execute what is missing of ``grid`` and return the status of every run by its id.

    ``force``, ``fresh``, ``only``, ``retry_failed``: see `plan`. ``engine``: by default the grid's, with ``jobs``
    or the grid's jobs at a time. ``say`` gets every line, ``display`` the lines and the state of the grid.
    ``after_each`` is called when a run has ended, and must not take long.

    The statuses are those of the manifests, and three more: ``blocked`` (a run that it waits for is not done),
    ``not started`` (stopped by Ctrl-C before) and ``left out`` (not asked for). One failure stops no other run.
    Raises GridError where a run needs more than there is, OSError where the folder of runs cannot be written.
    """
    started = time.monotonic()
    engine = engine or open_engine(grid.engine, jobs or grid.jobs)
    planned = plan(grid, force, fresh, only, retry_failed)
    try:
        engine.check([run for run in grid.runs if run.id in planned.todo])
        for folder in {run.folder.path.parent for run in grid.runs}:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / CURRENT, [run.id for run in grid.runs])
        with display or Lines(say) as shown:
            todo = planned.todo
            about = estimate(grid, todo, engine.width)
            head = f"grid {grid.name}: {_plural(len(grid.runs))}, {len(todo)} to do"
            shown.say(f"{head}, {engine.describe(grid)}{about}")
            state = _State(grid, engine, planned, shown, after_each or (lambda: None))
            try:
                state.work()
            except KeyboardInterrupt:
                shown.say("stopping: ending the notebooks that are running")
                state.interrupt()
            state.tell_what_changed()
            tally = ", ".join(f"{count} {status}" for status, count in Counter(state.status.values()).items())
            took = time.monotonic() - started
            shown.say(f"grid {grid.name}: {_plural(len(grid.runs))}: {tally}, in {took:.1f} s")
    finally:
        engine.close()
    return state.status


class _State:
    """The state of one call of `run_grid`; only the calling thread changes it."""

    def __init__(
        self, grid: Grid, engine: Engine, planned: Plan, display: Display, after_each: Callable[[], None]
    ) -> None:
        self.grid, self.engine, self.plan, self.display = grid, engine, planned, display
        self.say, self.after_each = display.say, after_each
        self.waiting = list(grid.runs)
        self.status: dict[str, str] = {}
        self.running: dict[Future[dict], Run] = {}
        self.tokens: dict[str, str | None] = {}  # of the attempt that was in a run's folder when it was handed over
        self.began: dict[str, float] = {}  # when a run was seen to begin, by the monotonic clock
        self.elsewhere: dict[str, float] = {}  # runs that another launcher has: when to look again

    def work(self) -> None:
        while self.waiting or self.running:
            self.waiting = [run for run in self.waiting if not self._advance(run)]
            self._notice_beginnings()
            self.display.show(self.overview())
            if self.running:
                done, _ = wait(self.running, timeout=PAUSE, return_when=FIRST_COMPLETED)
                for future in done:
                    self._collect(future)
            elif self.waiting:
                time.sleep(PAUSE)

    def interrupt(self) -> None:
        self.engine.interrupt()
        for future in list(self.running):
            self._collect(future)
        for run in self.grid.runs:
            self.status.setdefault(run.id, "not started")

    def overview(self) -> Overview:
        """What is done, running and failed, and how long the rest will take."""
        now, rows = time.monotonic(), []
        for run in self.running.values():
            if run.id in self.began:
                rows.append(Row(run.id, run.folder.at, now - self.began[run.id], self.plan.seconds[run.id]))
        ahead = [self.plan.seconds[run.id] for run in self.waiting if run.id in self.plan.todo]
        ahead += [self.plan.seconds[run.id] for run in self.running.values() if run.id not in self.began]
        failed = [(run_id, status) for run_id, status in self.status.items() if status not in OVER]
        counts = Counter(self.status.values())
        return Overview(self.grid.name, len(self.grid.runs), counts, rows, failed, ahead, self.engine.width)

    def tell_what_changed(self) -> None:
        """What was edited while the grid ran: the runs from before are stale."""
        for notebook in {run.notebook.path: run.notebook for run in self.grid.runs}.values():
            try:
                same = read_notebook(notebook.path).sha256 == notebook.sha256
            except (NotebookError, OSError):
                same = False
            if not same:
                self.say(f"changed  {notebook.name}: its notebook was edited meanwhile; run the grid again")
        if library_sha256() != self.plan.library:
            self.say("changed  the library was edited meanwhile; run the grid again for the runs from before")

    def _advance(self, run: Run) -> bool:
        """Start, skip or block the run if it is time to; returns whether it is off the waiting list."""
        reason = self.plan.reasons[run.id]
        if run.id in self.plan.left_out:
            self.status[run.id] = "left out" if reason else "done"
            return True
        missing = [other for other in run.after if self.status.get(other, "done") != "done"]
        if missing:
            self.status[run.id] = "blocked"
            self.say(f"blocked  {run.id}: {missing[0]} is {self.status[missing[0]]}")
            return True
        if any(other not in self.status for other in run.after):
            return False
        if reason is None:
            self.status[run.id] = "done"
            self.say(f"skip     {run.id}: done before")
            return True
        if time.monotonic() < self.elsewhere.get(run.id, 0.0):
            return False
        again = run.id in self.plan.again and run.id not in self.elsewhere
        self.tokens[run.id] = _token(run)
        if run.id in self.plan.kept:
            entry, source = self.plan.kept[run.id], self.grid.kept.name
            future = self.engine.submit(take, run, entry, source, again)
        else:
            future = self.engine.start(run, again)
        if future is not None:
            self.running[future] = run
        return future is not None

    def _notice_beginnings(self) -> None:
        for run in self.running.values():
            token = _token(run)
            if token in (None, self.tokens[run.id]):
                continue
            self.tokens[run.id] = token
            if run.id not in self.began:
                self._begin(run)
            else:
                self.began[run.id] = time.monotonic()
                self.say(f"again    {run.id}: its node was lost")

    def _begin(self, run: Run) -> None:
        self.began[run.id] = time.monotonic()
        self.say(f"start    {run.label}: {self.plan.reasons[run.id]}")

    def _collect(self, future: Future[dict]) -> None:
        run = self.running.pop(future)
        self.engine.release(run)
        try:
            manifest = future.result()
        except Stopped:
            self.status[run.id] = "not started"
            return
        except Elsewhere:
            if run.id not in self.elsewhere:
                self.say(f"wait     {run.id}: it is being run by another launcher")
            self.elsewhere[run.id] = time.monotonic() + PAUSE
            self.began.pop(run.id, None)  # it was the other's beginning that we saw
            self.waiting.append(run)
            return
        except OSError as error:  # a full disk, say: this run cannot go on, others perhaps can
            self.status[run.id] = "failed"
            self.say(f"failed   {run.id}: {error}")
            return
        if run.id not in self.began and not {"found", "taken"} & manifest.keys():
            self._begin(run)
        self.status[run.id] = manifest["status"]
        self.say(_line(run, manifest, self.plan.reasons[run.id]))
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
