"""What a grid has to do, and how long that takes."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from saftnb.batch.grid import Grid, GridError, Run
from saftnb.batch.kept import Entry, entry_sha256, fits, read_kept
from saftnb.batch.manifest import library_sha256, reason_to_run
from saftnb.batch.notebooks import NotebookError, read_notebook
from saftnb.run_folder import RunFolder

LATER = "a run before it is to be done"
FAILED = ("failed", "killed", "interrupted", "running")  # statuses that `--retry-failed` takes up again


@dataclass(frozen=True)
class Step:
    """What is to be done about one run.

    ``reason``: why it is executed, None where it is done and unchanged. ``entry``: of the kept list, which then stands
    in for it. ``left_out``: it was not asked for. ``again``: it is executed although it is done and unchanged.
    ``seconds``: what it took when it was last done, or else its budget.
    """

    run: Run
    reason: str | None
    entry: Entry | None
    left_out: bool
    again: bool
    seconds: float | None

    @property
    def executes(self) -> bool:
        return self.reason is not None and self.entry is None and not self.left_out


@dataclass(frozen=True)
class Plan:
    """What a grid has to do, run by run in the order of its file; ``library``: the library's hash."""

    grid: Grid
    steps: tuple[Step, ...]
    library: str

    @property
    def todo(self) -> set[str]:
        """The ids of the runs that are executed."""
        return {step.run.id for step in self.steps if step.executes}

    def lines(self) -> Iterator[str]:
        """One line a run: what will happen to it, and why."""
        for step in self.steps:
            if step.entry and self.grid.kept:
                yield f"take     {step.run.label}: done before, in {self.grid.kept.name}"
            else:
                what = "left out" if step.left_out else "run" if step.reason else "skip"
                yield f"{what:<8} {step.run.label}: {step.reason or 'done before'}"

    def estimate(self, jobs: int) -> str:
        """How long the runs will take by their budgets, in words; "" where one has none."""
        executed = [step.run.budget for step in self.steps if step.executes]
        budgets = [budget for budget in executed if budget is not None]
        if not budgets or len(budgets) < len(executed):
            return ""
        seconds = max(sum(budgets) / jobs, max(budgets))
        hours, minutes = divmod(math.ceil(seconds / 60), 60)
        return f", about {f'{hours} h ' if hours else ''}{minutes} min by their budgets"

    def outdated(self) -> Iterator[str]:
        """A line for what was edited since: runs from before are stale."""
        for notebook in {run.notebook.path: run.notebook for run in self.grid.runs}.values():
            try:
                same = read_notebook(notebook.path).sha256 == notebook.sha256
            except (NotebookError, OSError):
                same = False
            if not same:
                yield f"changed  {notebook.name}: its notebook was edited meanwhile; run the grid again"
        if library_sha256() != self.library:
            yield "changed  the library was edited meanwhile; run the grid again for the runs from before"


def plan(
    grid: Grid, force: bool = False, fresh: bool = False, only: Sequence[str] = (), retry_failed: bool = False
) -> Plan:
    """What is to be done.

    ``force`` runs everything again, ``fresh`` what was taken from the list of kept runs. ``only`` are patterns (as of
    file names) for notebooks and run ids: what they match, and what that comes after. ``retry_failed``: what failed,
    was killed, interrupted or cut off, what waited for it, and what it comes after. Raises GridError where a pattern
    matches nothing, or the folder is another grid's.
    """
    grid.check_owner()
    library, here = library_sha256(), {run.id: run.folder for run in grid.runs}
    before = {run.id: run.after for run in grid.runs}
    behind: dict[str, list[str]] = {run_id: [] for run_id in before}
    for run_id, others in before.items():
        for other in others:
            behind[other].append(run_id)
    asked = _asked(grid, only)
    if retry_failed:  # and what was never run after it: it was blocked
        failed = {run_id for run_id, folder in here.items() if folder.manifest.get("status") in FAILED}
        asked &= _reached(failed, lambda run_id: (i for i in behind[run_id] if not here[i].manifest))
    wanted = _reached(asked, before.__getitem__)
    listed = {} if force or fresh else read_kept(grid)
    steps = []
    for run in grid.runs:
        folder, entry = here[run.id], listed.get(run.id)
        entry = entry if fits(run, entry) else None
        anyway = "forced" if force and run.id in asked else _newer(folder, entry, fresh)
        reason = reason_to_run(run, library, here) or anyway
        seconds = folder.seconds or run.budget
        steps.append(Step(run, reason, entry if reason else None, run.id not in wanted, anyway is not None, seconds))
    later = _reached({step.run.id for step in steps if step.reason}, behind.__getitem__)
    after = (replace(step, reason=step.reason or LATER) if step.run.id in later else step for step in steps)
    return Plan(grid, tuple(after), library)


def _asked(grid: Grid, only: Sequence[str]) -> set[str]:
    if not only:
        return {run.id for run in grid.runs}
    found: set[str] = set()
    for pattern in only:
        match = {r.id for r in grid.runs if fnmatchcase(r.id, pattern) or fnmatchcase(r.notebook.name, pattern)}
        if not match:
            names = ", ".join(dict.fromkeys(run.notebook.name for run in grid.runs))
            raise GridError(f"--only {pattern} matches no run of grid {grid.name}; its notebooks are: {names}")
        found |= match
    return found


def _reached(ids: set[str], following: Callable[[str], Iterable[str]]) -> set[str]:
    """``ids``, and all that comes of going on from them."""
    found, new = set(ids), set(ids)
    while new:
        new = {other for run_id in new for other in following(run_id)} - found
        found |= new
    return found


def _newer(folder: RunFolder, entry: Entry | None, fresh: bool) -> str | None:
    """Why a run that was taken from the list is not to stay, None where it is."""
    if folder.taken and fresh:
        return "taken before"
    if folder.taken and entry and folder.manifest.get("taken_sha256") != entry_sha256(entry):
        return "the kept run is another now"
    return None


@dataclass(frozen=True)
class Work:
    """What one run has to do, for a dry run.

    Attributes:
        flops: of its gradients. pictures: that a training draws from its decoded files, each a crop of that share.
        entries: of all tasks' models, times the merges. cpus: cores that it has.
    """

    training: bool
    flops: float
    pictures: float
    crop: float
    entries: float
    cpus: int

    def seconds(
        self, speed: float, feed: Callable[[float], float], merging: Callable[[int], float]
    ) -> dict[str, float]:
        """By what it spends them on; a training's pictures are drawn beside its steps, by processes of their own.

        `speed` in FLOP a second, `feed` in pictures a second and process, by crop, `merging` in entries a second, by
        cores.
        """
        step = self.flops / speed
        drawn = self.pictures / (feed(self.crop) * min(self.cpus, 16)) if self.pictures else 0.0
        if self.training:
            return {"feed": drawn} if drawn > step else {"step": step}
        return {"search": step, "merging": self.entries / merging(self.cpus)}


def measured_hours(grid: Grid, todo: set[str], say: Callable[[str], None] = print) -> str:
    """The hours that the runs' `gradients` and `merges` take on this machine, in words; "" where a run has none.

    Timed are one training step of the first run's backbone and recipe, the crops that one process draws, and a merge by
    TIES; what a gradient takes in floating-point operations is counted, for every backbone and scope. Budgets, in
    seconds, are added. Lines say what bounds which runs, and what the pictures take on the disk.
    """
    runs = [run for run in grid.runs if run.id in todo]
    if not any(run.gradients for run in runs) or not all(run.gradients or run.budget for run in runs):
        return ""
    from saftnb.backbones import resolve_device
    from saftnb.finetune import measure

    kinds = [_kind(run) for run in runs if run.gradients]
    works = [_work(run, *kind) for run, kind in zip([run for run in runs if run.gradients], kinds, strict=True)]
    device, (backbone, plan) = resolve_device("auto").type, kinds[0]
    pairs = runs[0].parameters["suite"] == "nli6"
    speed = measure.pair_flops_per_second(backbone) if pairs else measure.flops_per_second(backbone, plan)
    feed, rate = cache(measure.pictures_per_second), merged_per_second(device)
    seconds = [work.seconds(speed, feed, lambda cpus: rate * (cpus if device == "cpu" else 1)) for work in works]
    total = sum(work.flops for work in works)
    say(
        f"measured here, on {device}: a step of {backbone} with {plan.name} does {speed / 1e12:.3g} TFLOP/s; "
        f"the work is {total:.2g} FLOP"
    )
    counted = [run.notebook.name for run in runs if run.gradients]
    bounds = Counter((max(one, key=one.__getitem__), name) for one, name in zip(seconds, counted, strict=True))
    for what in sorted({what for what, _ in bounds}):
        names = [f"{count} × {name}" for (bound, name), count in bounds.items() if bound == what]
        say(f"bound by {what}: {', '.join(names)}")
    if any(run.parameters.get("suite") == "vision8" for run in runs):
        say(f"the pictures, decoded once, take about {_decoded_size(works):.0f} GiB on the disk for data")
    hours = (sum(sum(one.values()) for one in seconds) + sum(run.budget or 0.0 for run in runs)) / 3600
    return f", about {hours:,.0f} {'GPU' if device == 'cuda' else 'CPU'} hours at that speed"


def _decoded_size(works: Sequence[Work]) -> float:
    """GiB of the decoded pictures that these runs read."""
    from saftnb.prepare import decoded_bytes

    kinds = {"training" if work.crop else "LoRA" for work in works if work.pictures} | {"evaluation"}
    return sum(decoded_bytes()[kind] for kind in kinds) / 2**30


def merged_per_second(device: str = "cpu") -> float:
    """Entries of all task vectors together that one core, or a GPU, merges here by TIES."""
    import torch

    from saftnb.backbones import threads
    from saftnb.delta import dense
    from saftnb.merging import TaskVector, merge

    vectors, times = [TaskVector({"w": torch.randn(1024, 1024, device=device)}) for _ in range(8)], []
    with threads(1):
        for _ in range(3):
            start = time.perf_counter()
            float(dense(merge(vectors, "ties", keep=0.2)["w"])[0, 0])  # when it is there
            times.append(time.perf_counter() - start)
    return 8 * 1024**2 / min(times)


def _kind(run: Run) -> tuple[str, Any]:
    """The run's backbone, and the recipe whose steps are like its own."""
    from saftnb.backbones import OPENAI_BACKBONES, POCKET_BACKBONES
    from saftnb.finetune import Published, recipe
    from saftnb.suites.nli6 import NLI6_BACKBONE

    given = run.parameters
    firsts = {"vision8": OPENAI_BACKBONES, "nli6": (NLI6_BACKBONE,)}.get(given["suite"], POCKET_BACKBONES)
    names = [given.get("recipe"), *given.get("recipes", []), given.get("base_recipe"), given.get("low_rank")]
    plan = recipe(next((name for name in names if name), "sgd"), given["suite"])
    if isinstance(plan, Published):  # not trained here: a plain step of its scope is timed
        plan = recipe("lora" if plan.scope == "lora" else "sgd", given["suite"])
    return given["backbone"] or next(iter(firsts)), plan


def _work(run: Run, backbone: str, plan: Any) -> Work:
    from saftnb.finetune import measure
    from saftnb.suites.nli6 import PAIR_SOURCES
    from saftnb.suites.vision8 import SOURCES

    suite = run.parameters["suite"]
    training = {"task", "recipe"} <= run.parameters.keys()
    each = measure.pair_gradient_flops(backbone) if suite == "nli6" else measure.gradient_flops(backbone, plan.scope)
    steps = run.gradients / plan.gradients if training and suite == "vision8" else 0.0
    tasks = len(PAIR_SOURCES if suite == "nli6" else SOURCES)
    entries = (run.merges or 0.0) * tasks * (measure.merged_entries(backbone, plan.scope) if run.merges else 0)
    flops = run.gradients * plan.batch_size * each
    return Work(training, flops, steps * plan.batch_size, plan.crop, entries, run.resources.cpus or 1)
