"""`learn`: merging coefficients learned on pictures without labels.

The merged model θ(c) = θ0 + Σt c_t ∘ τ_t (see `saftnb.merging.coefficients`) is to answer on each task's pictures as
the task's own model does, or with confidence. A step takes a batch of every task and sums the tasks' mean losses:

    distillation   KL(p_t ‖ p_c) = Σ p_t (log p_t − log p_c), p_t of the task's own model, both at one temperature
                   (SAMerging, Dalili & Mahdavi 2025, arXiv 2512.21288)
    entropy        −Σ p_c log p_c (AdaMerging, Yang et al. 2024, arXiv 2310.02575)

Test pictures are never seen: the pictures are those of validation, and their labels only draw the curve.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saftnb.backbones import Tokens, resolve_device, threads
from saftnb.evaluate import hits, logits
from saftnb.finetune import SharpnessAware, store
from saftnb.finetune.resume import Saves, load_state, save_state
from saftnb.finetune.sharpness_aware import DEFAULT_RHO
from saftnb.finetune.train import CPU_THREADS
from saftnb.merging.coefficients import KINDS, AtOutputs, InWeights, Values
from saftnb.progress import progress_bar
from saftnb.suites import PairSuite, Suite
from saftnb.suites.task import random_resized_crop
from saftnb.task_vector import TaskVector

LEARNING_VERSION = 1  # raise it whenever a change of this code changes what is learned
OBJECTIVES = ("distillation", "entropy")
OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("cosine", "constant")
VIEWS = 512  # pictures and crops of them, a task
CROP = 0.7  # smallest share of a picture's area that a crop keeps
LOOKS = 4  # at the validation accuracy, after the one at the start
LOOK_AT = 200  # pictures a task, at most, for such a look
# Adam's learning rates, chosen in notebooks/appendix/learning_search.ipynb on a seed that no result uses.
RATES = {"channel": 3e-2, "parameter": 3e-1, "task": 1e-2, "weights": 3e-4}

# The two papers' settings: `learn(suite, vectors, **PRESETS["adamerging"])`. SAMerging's are those of its released
# code, which steps SGD with momentum and perturbs as ASAM does. AdaMerging's authors learned on the test pictures.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "adamerging": {
        "objective": "entropy", "by": "parameter", "steps": 500, "batch_size": 16, "lr": 1e-3, "start": 0.3,
        "clamp": (0.0, 1.0), "schedule": "constant", "views": 0,
    },
    "samerging": {
        "objective": "distillation", "by": "parameter", "steps": 1000, "batch_size": 16, "lr": 1e-3, "start": 0.0,
        "temperature": 2.0, "rho": 0.07, "perturbation": "asam", "optimizer": "sgd", "momentum": 0.99,
        "weight_decay": 5e-4, "schedule": "constant", "views": 0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The settings of `learn`, checked."""

    objective: str
    by: str
    rho: float | None
    steps: int
    pictures: int
    views: int
    batch_size: int
    lr: float
    start: float
    temperature: float
    optimizer: str
    momentum: float
    weight_decay: float
    perturbation: str
    clamp: tuple[float, float] | None
    schedule: str

    def __post_init__(self):
        def need(good: bool, rule: str) -> None:
            if not good:
                raise ValueError(f"learn: {rule}")

        def one_of(name: str, allowed: tuple[str, ...]) -> None:
            given = getattr(self, name)
            need(given in allowed, f"{name} is one of {', '.join(allowed)}, not {given!r}")

        one_of("objective", OBJECTIVES)
        one_of("by", KINDS)
        one_of("optimizer", OPTIMIZERS)
        one_of("schedule", SCHEDULES)
        one_of("perturbation", tuple(DEFAULT_RHO))
        need(self.rho is None or 0 <= self.rho < math.inf, f"rho is a number from 0, or None, not {self.rho}")
        need(self.steps >= 1 and self.batch_size >= 1, "steps and batch_size are at least 1")
        need(self.pictures >= 0, f"pictures is a number a task, or 0 for all, not {self.pictures}")
        need(self.views >= 0, f"views is a number a task, or 0 for no crops, not {self.views}")
        need(0 < self.lr < math.inf, f"lr is above 0, not {self.lr}")
        need(math.isfinite(self.start), f"start is a finite number, not {self.start}")
        need(0 < self.temperature < math.inf, f"temperature is above 0, not {self.temperature}")
        need(0 <= self.momentum < 1, f"momentum lies in 0 to 1 (not included), not {self.momentum}")
        need(0 <= self.weight_decay < math.inf, f"weight_decay is 0 or more, not {self.weight_decay}")
        need(self.clamp is None or self.clamp[0] < self.clamp[1], f"clamp is two rising numbers, not {self.clamp}")
        need(self.clamp is None or self.by != "weights", "clamp bounds coefficients, not all weights")

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, …: constant, or 20 steps of warm-up and then half a cosine down to 0."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def build(self, values: Values) -> torch.optim.Optimizer:
        """The optimizer over the values, sharpness-aware where there is a ρ."""
        named = list(values.learned.items())
        if self.optimizer == "adam":
            base = torch.optim.Adam(named, lr=self.lr, weight_decay=self.weight_decay)
        else:
            base = torch.optim.SGD(named, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        return SharpnessAware(base, self.rho, self.perturbation) if self.rho else base


@dataclass(frozen=True, eq=False)
class Learned:
    """A merge that was learned.

    Attributes:
        vector: the merged task vector, to be added to θ0. With coefficients, low-rank where the given ones are.
        coefficients: a row a parameter ("all" for by="task"), a column a task; with by="channel" columns (task, "mean")
            and (task, "spread"), the standard deviation over the channels; empty with by="weights".
        curve: at every look: step (steps done), loss (mean of the steps since the look before; at step 0 that of the
            first step) and validation_accuracy, the mean over the tasks, 0 to 1.
        values: parameter -> coefficients (tasks, blocks); with by="weights" the merged deltas.
        seconds: time it took, looks included. fingerprint: hash of everything that decides the result, `inputs`.
    """

    vector: TaskVector
    coefficients: pd.DataFrame
    curve: pd.DataFrame
    values: dict[str, Tensor]
    seconds: float
    fingerprint: str
    inputs: dict


def learn(
    suite: Suite | PairSuite,
    vectors: Mapping[str, TaskVector],
    *,
    objective: str = "distillation",
    by: str = "channel",
    rho: float | None = None,
    steps: int = 400,
    pictures: int = 0,
    seed: int = 0,
    views: int = VIEWS,
    batch_size: int = 16,
    lr: float | None = None,
    start: float | None = None,
    temperature: float = 1.0,
    optimizer: str = "adam",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    perturbation: str = "sam",
    clamp: tuple[float, float] | None = None,
    schedule: str = "cosine",
    tangent: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> Learned:
    """Learn how to merge, or load what was learned before: the module gives the losses.

    The last step is taken. On a CPU the same inputs give the same bits, also when the learning was cut off and gone on
    with.

    Args:
        suite: for sentence pairs, with the tasks' heads (`PairSuite.with_heads`).
        vectors: task -> its task vector: full, of the attention alone, or low-rank. Their tasks are learned from.
        objective: "distillation" or "entropy".
        by: what has a number of its own: "channel", "parameter", "task"; or "weights", the control: all weights are
            learned, from the average of the task vectors.
        rho: radius of a sharpness-aware step on the learned numbers; None: a plain one. perturbation: "sam" or "asam".
        pictures: validation pictures (pairs) of each task, drawn by the seed; 0: all of them.
        seed: decides which pictures, their crops and their order.
        views: where there are fewer pictures of a task, random crops of them, `CROP` of the area at least, make so many
            in all (whole rounds of the pictures); 0: no crops. Pairs have none.
        batch_size: pictures of each task in a step.
        lr: peak learning rate; None: `RATES[by]`. start: every coefficient at first; None: 1 / number of tasks.
        temperature: of the distillation's two softmaxes.
        optimizer: "adam", or "sgd" with `momentum`; both with torch's own weight decay.
        clamp: bounds of the coefficients that count.
        schedule: "cosine", with a short warm-up, or "constant".
        tangent: whether these are task vectors of the tangent model (see `Recipe.tangent`).

    Raises:
        ValueError: a setting out of its range, a task without pictures, or vectors that do not belong to the suite;
            before any work. KeyError: no such task.
        FloatingPointError: a loss or gradient that is not finite. The last good values are kept, and named.
    """
    plan = Plan(
        objective=objective, by=by, rho=rho, steps=steps, pictures=pictures, views=views, batch_size=batch_size,
        lr=RATES.get(by, 1.0) if lr is None else lr, start=1 / max(len(vectors), 1) if start is None else start,
        temperature=temperature, optimizer=optimizer, momentum=momentum, weight_decay=weight_decay,
        perturbation=perturbation, clamp=clamp, schedule=schedule,
    )  # fmt: skip
    where = resolve_device(device)
    vectors = _checked(suite, vectors, tangent)
    inputs = _describe(suite, vectors, plan, seed, tangent, where)
    values = Values(list(vectors.values()), by, plan.start, where, clamp)

    def take(folder: Path, manifest: dict) -> Learned:
        _fill(values, load_file(folder / "values.safetensors"))
        return _learned(values, vectors, pd.read_csv(folder / "curve.csv"), manifest["seconds"], inputs)

    files = ("values.safetensors", "curve.csv")
    with threads(CPU_THREADS):  # a sum over the tasks has other bits with other counts
        if (found := store.read(inputs, take, files)) is not None:
            return found
        with store.locked(inputs):
            if (found := store.read(inputs, take, files)) is not None:
                return found
            learning = Learning(suite, vectors, values, plan, seed, tangent, where)
            return learning.finish(inputs, progress)


def pool(size: int, pictures: int, seed: int) -> Tensor:
    """Which of a task's validation pictures are learned from, int64: so many of a shuffle, which knows no labels, or
    all where `pictures` is 0. Smaller pools lie in larger ones."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: pictures or None]


class Learning:
    """A learning in progress, which can be saved and gone on from at any step."""

    def __init__(self, suite, vectors, values: Values, plan: Plan, seed: int, tangent: bool, device: torch.device):
        self.suite, self.values, self.plan, self.seed, self.device = suite, values, plan, seed, device
        if isinstance(suite, PairSuite):
            tower = suite.tower()
            tower.model.to(device)
            self.model = AtOutputs(tower, values)
        else:
            self.model = InWeights(suite.tower(tangent=tangent).to(device), values)
        self.models = {task: suite.classifier(task, self.model.tower).to(device) for task in vectors}
        self.pools = {task: self._pool(task) for task in vectors}
        self.teachers = {}
        if plan.objective == "distillation":
            self.teachers = {task: self._teacher(task, vector, tangent) for task, vector in vectors.items()}
        self.optimizer = plan.build(values)
        self.next_step, self.seconds = 0, 0.0
        self.losses: list[float] = []  # since the last look
        self.curve: list[tuple[int, float, float]] = []

    def _pool(self, task: str) -> Tensor | Tokens:
        """What is learned from: the chosen pictures or pairs, and crops of the pictures after them."""
        chosen = pool(len(self.suite.tasks[task].validation), self.plan.pictures, self.seed)
        found = self.suite.tasks[task].validation.inputs
        if len(chosen) < len(found):  # all of them may be a file of some GB, and stay there
            found = found[chosen]
        rounds = self.plan.views // len(chosen) - 1
        if rounds < 1 or not isinstance(found, Tensor):
            return found
        crops = torch.Generator().manual_seed((self.seed + 1) * 7_368_787)
        drawn = [(255 * random_resized_crop(found, CROP, crops)).round().to(torch.uint8) for _ in range(rounds)]
        return torch.cat([found, *drawn])

    @torch.no_grad()
    def _teacher(self, task: str, vector: TaskVector, tangent: bool) -> Tensor:
        """log p of the task's own model on the pool, (pictures, classes that it has)."""
        model = self.suite.classifier(task, self.suite.tower(vector, tangent=tangent))
        return self._log_shares(logits(model, self.pools[task], device=str(self.device))).to(self.device)

    def _log_shares(self, given: Tensor) -> Tensor:
        known = ~torch.isneginf(given[0])  # a class that the task does not have is masked
        return (given[:, known] / self.plan.temperature).log_softmax(dim=1)

    def batch(self, task: str, step: int) -> Tensor:
        """Which of the pool, in a step: epochs of fresh shuffles, the last short batch dropped."""
        size = min(self.plan.batch_size, len(self.pools[task]))
        epoch, position = divmod(step, len(self.pools[task]) // size)
        shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.pools[task]), generator=shuffle)[position * size : (position + 1) * size]

    def loss(self, task: str, step: int) -> Tensor:
        """The task's mean loss on a step's batch, at the model as it stands."""
        chosen = self.batch(task, step)
        log_shares = self._log_shares(self.models[task](self.pools[task][chosen].to(self.device)))
        if self.plan.objective == "entropy":
            return -(log_shares.exp() * log_shares).sum(dim=1).mean()
        theirs = self.teachers[task][chosen.to(self.device)]
        return (theirs.exp() * (theirs - log_shares)).sum(dim=1).mean()

    def step(self) -> float:
        """One optimizer step; returns the loss at the values before it, without their perturbation."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.next_step)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            self.model.place()
            total = torch.zeros((), device=self.device)
            for task in self.models:
                loss = self.loss(task, self.next_step)
                loss.backward()
                total += loss.detach()
            if not total.isfinite():
                raise FloatingPointError(f"the loss is {total.item()}")
            self.model.collect()
            return total

        loss = float(self.optimizer.step(closure))
        self.next_step += 1
        self.losses.append(loss)
        return loss

    @torch.no_grad()
    def accuracy(self) -> float:
        """Mean validation accuracy of the merged model, 0 to 1, on at most `LOOK_AT` pictures a task."""
        self.model.place()
        found = [
            hits(model, self.suite.tasks[task].validation[:LOOK_AT], device=str(self.device))
            for task, model in self.models.items()
        ]
        return sum(one.double().mean().item() for one in found) / len(found)

    def look(self) -> None:
        """Note the mean loss since the last look, and the validation accuracy."""
        self.curve.append((self.next_step, sum(self.losses) / len(self.losses), self.accuracy()))
        self.losses = []

    def state(self) -> dict:
        return {
            "values": {key: p.detach().clone() for key, p in self.values.learned.items()},
            "optimizer": self.optimizer.state_dict(), "next_step": self.next_step, "losses": list(self.losses),
            "curve": list(self.curve), "seconds": self.seconds,
        }  # fmt: skip

    def load_state(self, state: dict) -> None:
        _fill(self.values, state["values"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curve = [tuple(row) for row in state["curve"]]
        for name in ("next_step", "losses", "seconds"):
            setattr(self, name, state[name])

    def finish(self, inputs: dict, progress: bool) -> Learned:
        """Learn to the end, from where an earlier try was cut off, and put the result into the store."""
        file = store.partial_file(inputs)
        if (state := load_state(file)) is not None:
            self.load_state(state)
        try:
            self._run(Saves(lambda state: save_state(state, file)), inputs["name"], progress)
        except FloatingPointError as error:
            kept = store.partial_file(inputs, ".safetensors")
            save_file({key: p.detach().contiguous() for key, p in self.values.learned.items()}, kept)
            raise FloatingPointError(
                f"learn: {error} at step {self.next_step + 1}; the values after {self.next_step} steps are kept in the "
                f"checkpoint store as {kept.parent.name}/{kept.name}"
            ) from None
        curve = pd.DataFrame(self.curve, columns=["step", "loss", "validation_accuracy"])

        def fill(folder: Path) -> None:
            save_file({key: p.detach().cpu().contiguous() for key, p in self.values.learned.items()},
                      folder / "values.safetensors")  # fmt: skip
            curve.to_csv(folder / "curve.csv", index=False)

        store.write(inputs, fill, seconds=self.seconds)
        file.unlink(missing_ok=True)
        return _learned(self.values, self.models, curve, self.seconds, inputs)

    def _run(self, saves: Saves, label: str, progress: bool) -> None:
        steps = self.plan.steps
        looks = {math.ceil(steps * number / LOOKS) for number in range(1, LOOKS + 1)}
        bar = progress_bar(total=steps, initial=self.next_step, desc=label, disable=not progress, mininterval=1)
        with bar:
            while self.next_step < steps:
                begun = time.perf_counter()
                at_start = self.accuracy() if self.next_step == 0 else None
                loss = self.step()
                if at_start is not None:
                    self.curve.append((0, loss, at_start))
                if self.next_step in looks:
                    self.look()
                    bar.set_postfix_str(f"validation {self.curve[-1][2]:.3f}", refresh=False)
                self.seconds += time.perf_counter() - begun
                if self.next_step < steps:
                    saves.after(self.next_step, self.state)
                bar.update()


def _checked(suite: Suite | PairSuite, vectors: Mapping[str, TaskVector], tangent: bool) -> dict[str, TaskVector]:
    """The vectors in the order of the suite's tasks, so that their own order decides nothing."""
    if not isinstance(vectors, Mapping) or not vectors or isinstance(vectors, TaskVector):
        raise ValueError("learn takes task vectors by task, {task: TaskVector, …}, at least one")
    for task in vectors:
        if len(suite.tasks[task].validation) == 0:
            raise ValueError(f"learn: the task {task!r} has no validation pictures to learn from")
    first = next(iter(vectors.values()))
    for task, vector in vectors.items():
        if {n: d.shape for n, d in vector.items()} != {n: d.shape for n, d in first.items()}:
            raise ValueError(
                f"learn: the task vectors of {next(iter(vectors))!r} and {task!r} have different parameters"
            )
    if isinstance(suite, PairSuite):
        suite.tower(first)  # says what is of another base
    else:
        known = {name: p.shape for name, p in suite.tower(tangent=tangent).named_parameters()}
        for name, delta in first.items():
            if name not in known or known[name] != delta.shape:
                raise ValueError(
                    f"learn: the task vectors do not belong to suite {suite.name!r}: its backbone "
                    f"{suite.backbone.name} has no parameter {name!r} {tuple(delta.shape)}"
                )
    return {task: vectors[task] for task in suite.tasks if task in vectors}


def _describe(suite, vectors: Mapping[str, TaskVector], plan: Plan, seed: int, tangent: bool, device) -> dict:
    """Everything that decides what is learned: its hash is the checkpoint's fingerprint."""
    tasks = {
        task: {
            "data": suite.tasks[task].validation.sha256,
            "vector": vector.checksum(),
            "head": _hash(suite.head(task)),
        }
        for task, vector in vectors.items()
    }
    return {
        "name": f"{suite.name}-learned-{plan.by}-{plan.objective}-s{seed}", "suite": suite.name, "tasks": tasks,
        "backbone": suite.backbone.sha256, "plan": dataclasses.asdict(plan), "tangent": tangent, "seed": seed,
        "version": LEARNING_VERSION, "device": device.type, "threads": CPU_THREADS if device.type == "cpu" else None,
    }  # fmt: skip


def _hash(head: Tensor) -> str:
    return TaskVector({"head": head}).checksum()


@torch.no_grad()
def _fill(values: Values, found: Mapping[str, Tensor]) -> None:
    for key, p in values.learned.items():
        p.copy_(found[key])


def _learned(values: Values, tasks, curve: pd.DataFrame, seconds: float, inputs: dict) -> Learned:
    raw = {key: p.detach().cpu() for key, p in values.learned.items()}
    shown = {} if values.by == "weights" else {key: values.bounded(key) for key in raw}
    return Learned(
        values.vector(), _table(shown, list(tasks), values.by), curve, raw, seconds, store.fingerprint(inputs), inputs
    )


def _table(values: Mapping[str, Tensor], tasks: list[str], by: str) -> pd.DataFrame:
    if by != "channel":
        rows = {key: value[:, 0].tolist() for key, value in values.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=tasks).rename_axis(
            index="parameter", columns="task"
        )
    rows = {
        key: torch.stack([value.mean(dim=1), value.std(dim=1, correction=0)], dim=1).flatten().tolist()
        for key, value in values.items()
    }
    columns = pd.MultiIndex.from_product([tasks, ["mean", "spread"]], names=["task", "over channels"])
    return pd.DataFrame.from_dict(rows, orient="index").set_axis(columns, axis=1).rename_axis(index="parameter")
