"""`finetune`: a task model from the checkpoint store, trained first where the store lacks it."""

import warnings

import pandas as pd
import torch

from saftnb.backbones import require_bf16, resolve_device
from saftnb.finetune import store
from saftnb.finetune.recipe import Recipe
from saftnb.finetune.recipe import recipe as named_recipe
from saftnb.finetune.train import CPU_THREADS, Training, save_state
from saftnb.suites import Suite
from saftnb.task_vector import TaskVector

TRAINING_VERSION = 1  # raise it whenever a change of the training code changes what it trains


def describe(suite: Suite, task: str, plan: Recipe, seed: int, device: torch.device) -> dict:
    """Everything that decides a fine-tuned model: its hash is the checkpoint's fingerprint."""
    return {
        "suite": suite.name, "task": task, "data": suite.tasks[task].sha256, "backbone": suite.backbone.sha256,
        "recipe": plan.inputs(), "seed": seed, "version": TRAINING_VERSION,
        "device": device.type, "threads": CPU_THREADS if device.type == "cpu" else None,
    }  # fmt: skip


def finetune(
    suite: Suite,
    task: str,
    recipe: Recipe | str = "sgd",
    seed: int = 0,
    *,
    device: str = "auto",
    progress: bool = True,
) -> store.FineTuned:
    """Fine-tune the suite's backbone on one task, or load the result if it was trained before.

    Args:
        recipe: a `Recipe`, or the name of one.
        seed: decides the order of the data and the crops; θ0 is the same for all.
        progress: show a bar while training.

    On a CPU the same inputs give the same bits, also when the training was cut off and gone on with.

    Raises:
        KeyError: the suite has no such task. ValueError: no such recipe or device, or one without bfloat16 for a recipe
            that wants it.
    """
    plan = named_recipe(recipe, suite) if isinstance(recipe, str) else recipe
    where = resolve_device(device)
    if plan.precision == "bf16":
        require_bf16(where)
    inputs = describe(suite, task, plan, seed, where)
    found = store.load(inputs)
    if found is not None:
        return found
    with store.locked(inputs):
        return store.load(inputs) or _train(suite, task, plan, seed, where, inputs, progress)


def _train(suite, task, plan, seed, where, inputs, progress) -> store.FineTuned:
    state_file = store.store_root() / ".partial" / f"{store.folder_name(inputs)}.pt"
    model = suite.classifier(task, suite.tower(tangent=plan.tangent))
    training = Training(model, suite.tasks[task], plan, seed, where)
    if state_file.is_file():
        try:
            state = torch.load(state_file, map_location="cpu", weights_only=True)
        except Exception:  # whatever torch makes of a file that is not one of its own
            warnings.warn(f"the training state {state_file.name} cannot be read: training starts anew", stacklevel=3)
        else:
            training.load_state(state)
    training.run(
        lambda state: save_state(state, state_file), label=f"{task} {plan.name} seed {seed}", progress=progress
    )
    start = {name: p.detach() for name, p in suite.backbone.image_tower().named_parameters() if name in training.best}
    result = store.FineTuned(
        TaskVector.between(start, training.best),
        pd.DataFrame(training.history, columns=["step", "loss", "validation_accuracy"]),
        training.best_accuracy, training.seconds, store.fingerprint(inputs), inputs,
    )  # fmt: skip
    result = store.save(result)
    state_file.unlink(missing_ok=True)
    return result
