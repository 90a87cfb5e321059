"""`finetune`: a task model from the checkpoint store, trained first where the store lacks it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from saftnb.backbones import require_bf16, resolve_device
from saftnb.finetune import store
from saftnb.finetune.published import Published, read_published
from saftnb.finetune.recipes import Recipe
from saftnb.finetune.recipes import recipe as named_recipe
from saftnb.finetune.resume import State, load_state, save_state
from saftnb.finetune.train import CPU_THREADS, Training
from saftnb.suites import AnySuite, conditions
from saftnb.task_vector import TaskVector

TRAINING_VERSION = 1  # raise it whenever a change of the training code changes what it trains


def describe(suite: AnySuite, task: str, plan: Recipe, seed: int, device: torch.device) -> store.Inputs:
    """Everything that decides a fine-tuned model: its hash is the checkpoint's fingerprint."""
    given = {name: value for name, value in conditions(suite).items() if name != "precision"}  # which is the recipe's
    return {
        "suite": suite.name, "task": task, "data": suite.tasks[task].sha256, "backbone": suite.backbone.sha256,
        "recipe": plan.inputs(), "seed": seed, "version": TRAINING_VERSION,
        "device": device.type, "threads": CPU_THREADS if device.type == "cpu" else None,
        **given,
    }  # fmt: skip


def finetune(
    suite: AnySuite,
    task: str,
    recipe: Recipe | Published | str = "sgd",
    seed: int = 0,
    *,
    device: str = "auto",
    progress: bool = True,
) -> store.FineTuned:
    """Fine-tune the suite's backbone on one task, or load the result if it was trained before.

    Args:
        recipe: a `Recipe`, or the name of one; a `Published`, for which nothing is trained.
        seed: decides the order of the data and the crops; θ0 is the same for all.
        progress: show a bar while training.

    On a CPU the same inputs give the same bits, also when the training was cut off and gone on with.

    Raises:
        KeyError: the suite has no such task. ValueError: no such recipe or device, one without bfloat16 for a recipe
            that wants it, a seed that is none, or words or pictures that the backbone does not take.
        FloatingPointError: a loss, gradient, weight or logit that is not finite. The line names suite, task, recipe,
            seed, step, the first parameter, and the last good state that is kept.
    """
    plan = named_recipe(recipe, suite) if isinstance(recipe, str) else recipe
    if not isinstance(plan, Recipe | Published):
        raise ValueError(f"recipe is a Recipe or the name of one, not {recipe!r}")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed is a whole number from 0, not {seed!r}")
    where = resolve_device(device)
    if isinstance(plan, Published):
        return read_published(suite, task, plan, device=where)
    if plan.precision == "bf16":
        require_bf16(where)
    inputs = describe(suite, task, plan, seed, where)
    found = store.load(inputs)
    if found is not None:
        return found
    suite.classifier(task, nn.Identity())  # says what is wrong with its words or pictures before anything is written
    with store.locked(inputs):
        return store.load(inputs) or _train(suite, task, plan, seed, where, inputs, progress)


def task_vectors(
    suite: AnySuite,
    recipe: Recipe | Published | str = "sgd",
    seed: int = 0,
    *,
    tasks: Sequence[str] = (),
    device: str = "auto",
    progress: bool = True,
) -> dict[str, TaskVector]:
    """Every task's own task vector τ = θ_tuned − θ0, by task: fine-tuned now, or loaded where that was done before.

    Args:
        tasks: those to train, in place of all. The rest as in `finetune`, with the same errors.
    """
    return {
        task: finetune(suite, task, recipe, seed, device=device, progress=progress).task_vector
        for task in tasks or suite.tasks
    }


class TaskVectors(Mapping[tuple[str, int], dict[str, TaskVector]]):
    """(recipe, seed) -> task -> task vector. All are trained at the start, or found; one (recipe, seed) at a time is in
    memory, read anew from the store when asked for: at full size there is no room for them all.

    Attributes:
        plans: the recipes by name. tasks: those that were trained.

    Args:
        plans: a recipe by its name. seeds: training seeds. tasks: those of the suite to train; () is all of them.
    """

    def __init__(
        self, suite: AnySuite, plans: Mapping[str, Recipe | Published], seeds: Sequence[int],
        tasks: Sequence[str] = (), *, device: str = "auto", progress: bool = True,
    ):  # fmt: skip
        self._suite, self.plans, self._device, self._progress = suite, dict(plans), device, progress
        self.tasks = tuple(tasks or suite.tasks)
        self._keys = list(dict.fromkeys(itertools.product(self.plans, seeds)))
        self._last: tuple[tuple[str, int] | None, dict[str, TaskVector]] = (None, {})
        self._fingerprints: dict[tuple[str, int], dict[str, str]] = {}
        for name, seed in self._keys:
            found = {task: self._find(name, seed, task).fingerprint for task in self.tasks}
            self._fingerprints[name, seed] = found

    def _find(self, name: str, seed: int, task: str) -> store.FineTuned:
        plan = self.plans[name]
        return finetune(self._suite, task, plan, seed, device=self._device, progress=self._progress)

    def fingerprints(self, name: str, seed: int) -> dict[str, str]:
        """By task, the hash of everything that decides the task's model."""
        return self._fingerprints[name, seed]

    def heads(self, name: str, seed: int) -> dict[str, Tensor]:
        """Of sentence pairs: every task's own head, see `PairSuite.with_heads`; {} for pictures."""
        found = {task: self._find(name, seed, task).head for task in self.tasks}
        return {task: head for task, head in found.items() if head is not None}

    def __getitem__(self, key: tuple[str, int]) -> dict[str, TaskVector]:
        if key not in self._keys:
            raise KeyError(key)
        if self._last[0] != key:
            self._last = (None, {})  # free the old ones first
            self._last = key, {task: self._find(*key, task).task_vector for task in self.tasks}
        return self._last[1]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _train(
    suite: AnySuite, task: str, plan: Recipe, seed: int, where: torch.device, inputs: store.Inputs, progress: bool
) -> store.FineTuned:
    state_file = store.partial_file(inputs)
    model = suite.classifier(task, suite.tower(tangent=plan.tangent))
    training = Training(model, suite.tasks[task], plan, seed, where)
    saved = 0

    def save(state: State) -> None:
        nonlocal saved
        save_state(state, state_file)
        saved = state["next_step"]

    try:
        if (state := load_state(state_file)) is not None:
            training.load_state(state)
            saved = state["next_step"]
        training.run(save, label=f"{task} {plan.name} seed {seed}", progress=progress)
    except FloatingPointError as error:
        kept = f"the state after step {saved} is kept in the checkpoint store as .partial/{state_file.name}"
        kept = kept if saved else "no state was saved before"
        raise FloatingPointError(f"{suite.name}, {task}, {plan.name}, seed {seed}: {error}; {kept}") from None
    finally:
        training.close()
    result = store.FineTuned(
        training.task_vector(),
        pd.DataFrame(training.history, columns=["step", "loss", "validation_accuracy"]),
        training.best_accuracy, training.seconds, store.fingerprint(inputs), inputs,
        head=training.best_head,
    )  # fmt: skip
    result = store.save(result)
    state_file.unlink(missing_ok=True)
    return result
