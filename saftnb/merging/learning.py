"""`learn`: merging coefficients learned on pictures without labels.

The merged model θ(c) = θ0 + Σt c_t ∘ τ_t (see `saftnb.merging.coefficients`) is to answer on each task's pictures as
the task's own model does, or with confidence. A step takes a batch of every task and sums the tasks' mean losses:

    distillation   KL(p_t ‖ p_c) = Σ p_t (log p_t − log p_c), p_t of the task's own model, both at one temperature
                   (SAMerging, Dalili & Mahdavi 2025, arXiv 2512.21288)
    entropy        −Σ p_c log p_c (AdaMerging, Yang et al. 2024, arXiv 2310.02575)

Test pictures are never seen: the pictures are those of validation, and their labels only draw the curve.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from saftnb.backbones import resolve_device, threads
from saftnb.finetune import store
from saftnb.finetune.train import CPU_THREADS
from saftnb.merging.coefficients import Values
from saftnb.merging.learning_loop import VIEWS, Learning, Plan
from saftnb.merging.learning_loop import pool as pool
from saftnb.suites import AnySuite, PairSuite, conditions
from saftnb.task_vector import TaskVector, save_tensors

LEARNING_VERSION = 1  # raise it whenever a change of this code changes what is learned
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
    inputs: store.Inputs


def learn(
    suite: AnySuite,
    vectors: Mapping[str, TaskVector],
    *,
    objective: str = "distillation",
    by: str = "channel",
    rho: float | None = None,
    steps: int = 400,
    examples: int = 0,
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
        examples: validation pictures or pairs of each task, drawn by the seed; 0: all of them.
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
        objective=objective, by=by, rho=rho, steps=steps, examples=examples, views=views, batch_size=batch_size,
        lr=RATES.get(by, 1.0) if lr is None else lr, start=1 / max(len(vectors), 1) if start is None else start,
        temperature=temperature, optimizer=optimizer, momentum=momentum, weight_decay=weight_decay,
        perturbation=perturbation, clamp=clamp, schedule=schedule,
    )  # fmt: skip
    where = resolve_device(device)
    vectors = _checked(suite, vectors, tangent)
    inputs = _describe(suite, vectors, plan, seed, tangent, where)
    values = Values(list(vectors.values()), by, plan.start, where, clamp)

    def take(folder: Path, manifest: store.Manifest) -> Learned:
        values.fill(load_file(folder / "values.safetensors"))
        return _learned(values, vectors, pd.read_csv(folder / "curve.csv"), manifest["seconds"], inputs)

    files = ("values.safetensors", "curve.csv")
    with threads(CPU_THREADS):  # a sum over the tasks has other bits with other counts
        if (found := store.read(inputs, take, files)) is not None:
            return found
        with store.locked(inputs):
            if (found := store.read(inputs, take, files)) is not None:
                return found
            learning = Learning(suite, vectors, values, plan, seed, tangent, where)
            learning.finish(inputs, progress)
            curve = pd.DataFrame(learning.curve, columns=["step", "loss", "validation_accuracy"])

            def fill(folder: Path) -> None:
                save_tensors(values.tensors(), folder / files[0])
                curve.to_csv(folder / files[1], index=False)

            store.write(inputs, fill, seconds=learning.seconds)
            store.partial_file(inputs).unlink(missing_ok=True)
            return _learned(values, vectors, curve, learning.seconds, inputs)


def _checked(suite: AnySuite, vectors: Mapping[str, TaskVector], tangent: bool) -> dict[str, TaskVector]:
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


def _describe(
    suite: AnySuite, vectors: Mapping[str, TaskVector], plan: Plan, seed: int, tangent: bool, device: torch.device
) -> store.Inputs:
    """Everything that decides what is learned: its hash is the checkpoint's fingerprint."""
    tasks = {
        task: {
            "data": suite.tasks[task].validation.sha256,
            "vector": vector.checksum(),
            "head": _hash(suite.head(task)),
        }
        for task, vector in vectors.items()
    }
    settings = dataclasses.asdict(plan)
    settings["pictures"] = settings.pop("examples")  # its name when the first of these were kept
    return {
        "name": f"{suite.name}-learned-{plan.by}-{plan.objective}-s{seed}", "suite": suite.name, "tasks": tasks,
        "backbone": suite.backbone.sha256, "plan": settings, "tangent": tangent, "seed": seed,
        "version": LEARNING_VERSION, "device": device.type, "threads": CPU_THREADS if device.type == "cpu" else None,
        **conditions(suite),
    }  # fmt: skip


def _hash(head: Tensor) -> str:
    return TaskVector({"head": head}).checksum()


def _learned(
    values: Values, tasks: Iterable[str], curve: pd.DataFrame, seconds: float, inputs: store.Inputs
) -> Learned:
    raw = values.tensors()
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
