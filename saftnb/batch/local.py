"""The local engine: the runs of a grid in processes on this machine, so many at a time."""

import math
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event

from saftnb.batch.grid import Grid, Run
from saftnb.batch.kept import entry_sha256, fits, read_kept, take
from saftnb.batch.manifest import LOG, library_sha256, read_manifest, reason_to_run
from saftnb.batch.run import Stopped, run_one
from saftnb.run_folder import CURRENT, write_json


def _print(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True)
class Plan:
    """What a grid has to do: for each run's id the reason to execute it, or None where it is done and unchanged; and
    the entries of the kept list that stand in for runs that would have to be executed."""

    reasons: dict[str, str | None]
    kept: dict[str, dict]

    @property
    def todo(self) -> set[str]:
        return {run_id for run_id, reason in self.reasons.items() if reason and run_id not in self.kept}


def plan(grid: Grid, force: bool = False, fresh: bool = False) -> Plan:
    """What is to be done. ``force`` runs everything again, ``fresh`` what was taken from the list of kept runs."""
    library = library_sha256()
    reasons = {run.id: reason_to_run(run, library) or ("forced" if force else None) for run in grid.runs}
    here = {run.id: read_manifest(run.folder) or {} for run in grid.runs}
    listed = {} if force or fresh else read_kept(grid)
    kept = {}
    for run in grid.runs:
        taken, entry = "taken" in here[run.id], listed.get(run.id)
        if taken and fresh:
            reasons[run.id] = reasons[run.id] or "taken before"
        if taken and fits(run, entry) and here[run.id].get("taken_sha256") != entry_sha256(entry):
            reasons[run.id] = reasons[run.id] or "the kept run is another now"
        if reasons[run.id] and fits(run, entry):
            kept[run.id] = entry
    return Plan(_with_later(grid, reasons), kept)


def _with_later(grid: Grid, reasons: dict[str, str | None]) -> dict[str, str | None]:
    """The reasons, where a run that comes after one that is to be done or taken is to be done as well."""
    later = {run.id: run.after for run in grid.runs}
    for _ in grid.runs:  # as often as a chain can be long
        for run_id, before in later.items():
            if reasons[run_id] is None and any(reasons[other] for other in before):
                reasons[run_id] = "a run before it is to be done"
    return reasons


def estimate(grid: Grid, todo: set[str], jobs: int) -> str:
    """How long the runs will take by their budgets, in words; "" where one has none."""
    budgets = [run.budget for run in grid.runs if run.id in todo]
    if not budgets or None in budgets:
        return ""
    seconds = max(sum(budgets) / jobs, max(budgets))
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f", about {f'{hours} h ' if hours else ''}{minutes} min by their budgets"


def measured_hours(grid: Grid, todo: set[str], say: Callable[[str], None] = _print) -> str:
    """The hours that the runs' `gradients` take on this machine's device, in words; "" where a run has none.

    One training step of the first run's backbone and recipe is timed; what its gradient takes in floating-point
    operations, and those of the other backbones and scopes, is counted. Budgets, in seconds, are added.
    """
    runs = [run for run in grid.runs if run.id in todo]
    if not any(run.gradients for run in runs) or not all(run.gradients or run.budget for run in runs):
        return ""
    from saftnb.backbones import OPENAI_BACKBONES, POCKET_BACKBONES, resolve_device
    from saftnb.finetune import recipe
    from saftnb.finetune.measure import flops_per_second, gradient_flops, pair_flops_per_second, pair_gradient_flops
    from saftnb.suites.nli6 import NLI6_BACKBONE

    work, kinds = 0.0, []
    for run in runs:
        if run.gradients:
            given = run.parameters
            firsts = {"vision8": OPENAI_BACKBONES, "nli6": (NLI6_BACKBONE,)}.get(given["suite"], POCKET_BACKBONES)
            names = [given.get("recipe"), *given.get("recipes", []), given.get("base_recipe"), given.get("low_rank")]
            plan = recipe(next((name for name in names if name), "sgd"), given["suite"])
            kinds.append((given["backbone"] or next(iter(firsts)), plan))
            pairs = given["suite"] == "nli6"
            each = pair_gradient_flops(kinds[-1][0]) if pairs else gradient_flops(kinds[-1][0], plan.scope)
            work += run.gradients * plan.batch_size * each
    device, (backbone, plan) = resolve_device("auto").type, kinds[0]
    pairs = runs[0].parameters["suite"] == "nli6"
    speed = pair_flops_per_second(backbone) if pairs else flops_per_second(backbone, plan)
    say(
        f"measured here, on {device}: a step of {backbone} with {plan.name} does {speed / 1e12:.3g} TFLOP/s; "
        f"the work is {work:.2g} FLOP"
    )
    hours = (work / speed + sum(run.budget or 0.0 for run in runs)) / 3600
    return f", about {hours:,.0f} {'GPU' if device == 'cuda' else 'CPU'} hours at that speed"


def run_grid(
    grid: Grid,
    jobs: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = _print,
    *,
    fresh: bool = False,
) -> dict[str, str]:
    """Execute what is missing of ``grid`` and return the status of every run by its id.

    The statuses are those of the manifests, and two for runs without one: ``blocked`` (a run that it
    waits for is not done) and ``not started`` (stopped by Ctrl-C before). One failure stops no other run.
    """
    started = time.monotonic()
    engine = _Engine(grid, jobs or grid.jobs, plan(grid, force, fresh), say)
    todo = engine.plan.todo
    about = estimate(grid, todo, engine.jobs)
    say(f"grid {grid.name}: {_plural(len(grid.runs))}, {len(todo)} to do, {engine.jobs} at a time{about}")
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

    def __init__(self, grid: Grid, jobs: int, plan: Plan, say: Callable[[str], None]) -> None:
        self.grid, self.jobs, self.plan, self.say = grid, jobs, plan, say
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
        reason = self.plan.reasons[run.id]
        if reason is None:
            self.status[run.id] = "done"
            self.say(f"skip     {run.id}: done before")
            return True
        if len(self.running) >= self.jobs:
            return False
        if run.id in self.plan.kept:
            entry, source = self.plan.kept[run.id], self.grid.kept.name
            self.running[self.pool.submit(take, run, entry, source, self.stop, self.say)] = run
            return True
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
        if "taken" in manifest:
            self.say(f"take     {run.id}: done before, in {manifest['taken']}")
            return
        took = f"{manifest['status']:<8} {run.id} after {manifest['seconds']:.1f} s"
        done = manifest["status"] == "done"
        self.say(took if done else f"{took}: {manifest['reason']}; see {os.path.relpath(run.folder / LOG)}")


def _plural(runs: int) -> str:
    return f"{runs} run" if runs == 1 else f"{runs} runs"
