"""`Recipe`: how a task model is fine-tuned, and the named recipes of the papers' rows."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from saftnb.finetune.published import PREFIX, Published
from saftnb.suites import AnySuite

OPTIMIZERS = ("adamw", "sam", "asam", "asam-kwon")
SCOPES = ("full", "attention", "tangent", "lora")
CLIPS = ("both", "first")
PRECISIONS = ("float32", "bf16")
SCHEDULES = ("cosine", "linear")
Fields = dict[str, Any]  # of a recipe, by name


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_RULES: dict[object, tuple[Callable[[object], bool], str]] = {  # what a field of each type is, and how that is said
    int: (lambda value: type(value) is int, "a whole number"),
    float: (_is_number, "a number"),
    float | None: (lambda value: value is None or _is_number(value), "a number or None"),
    bool: (lambda value: isinstance(value, bool), "True or False"),
}


@dataclass(frozen=True)
class Recipe:
    """Everything, besides suite, task and seed, that decides a fine-tuned model.

    Attributes:
        name: how tables and figures call it.
        optimizer: "adamw", or a sharpness-aware step around AdamW: "sam", "asam" (SAFT's), "asam-kwon".
        scope: what trains. "full": every parameter of the image tower. "attention" (FTLO, Jin et al. 2024): only the
            weights of its attention layers' projections, no bias. "tangent" (FTTS, Ortiz-Jimenez et al. 2023): every
            parameter of the tower's first-order Taylor model; weight decay and ASAM's |w| are taken at θ, not θ − θ0.
            "lora": the factors of adapters on q, k, v and out of every attention layer, by PEFT; a sharpness-aware step
            perturbs the factors A and B, and its ε is 0 while B is (at the first step, for "asam"). The first A is
            drawn by the seed alone, the same for all recipes (see `shared_init`). For sentence pairs a head trains
            beside the factors, which is not perturbed.
        steps: optimizer steps. A sharpness-aware step costs two gradients, a plain one costs one.
        batch_size: pictures a step.
        lr: peak learning rate, after `warmup` linear steps; `schedule` then takes it to 0 at the last step.
        weight_decay: AdamW's decoupled weight decay.
        rho: radius ρ of the perturbation; None for "adamw".
        clip_norm: largest L2 norm of a gradient.
        clip: which gradients of a sharpness-aware step are clipped. "both": also the second, which AdamW receives, so
            that ρ is all that differs from a plain step. "first": as in SAFT's released code, where the update is in
            effect unclipped, since ε is normalised. A plain step has one gradient, which is clipped.
        label_smoothing: share of the target spread over all classes.
        crop: smallest share of a picture's area that the random resized crop of training pictures keeps; 0: no crop,
            training pictures are prepared as for evaluation.
        evaluate_every: steps between looks at validation accuracy, 0: an epoch; the weights of the best look are kept
            (the earliest one of equals).
        stop_at: training ends at the first look whose validation accuracy is at least this; None: at the last step.
            The learning rate's schedule stays that of all `steps`.
        accumulate: parts that a batch is cut into; their gradients add up to that of the whole batch.
        precision: "float32", or "bf16": the tower runs under autocast to bfloat16, weights and losses stay float32.
        compile: whether the model runs through `torch.compile`, which changes roundings; not with "tangent".
        rank, alpha, dropout: of "lora": the factors' rank r, the scale α of (α/r) B A, and the share of an adapter's
            inputs dropped at random while training. Both gradients of a sharpness-aware step share the dropped ones.
        patience: looks without a validation accuracy more than `min_delta` above the best, after which training ends;
            0: never.
        min_delta: see `patience`.
        schedule: how the learning rate falls to 0 after the warm-up, "cosine" or "linear".
        checkpointing: whether a language model's layers are computed again in the backward pass, to save memory.

    Raises:
        ValueError: a value out of its range; the message names the range.
    """

    name: str
    optimizer: str
    scope: str = "full"
    steps: int = 200
    batch_size: int = 64
    lr: float = 3e-4
    weight_decay: float = 0.1
    rho: float | None = None
    warmup: int = 20
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    crop: float = 0.9
    evaluate_every: int = 50
    stop_at: float | None = None
    clip: str = "both"
    accumulate: int = 1
    precision: str = "float32"
    compile: bool = False
    rank: int = 16
    alpha: float = 16
    dropout: float = 0.1
    patience: int = 0
    min_delta: float = 0.0
    schedule: str = "cosine"
    checkpointing: bool = False
    shared_init: bool = True

    def __post_init__(self):
        def need(good: bool, rule: str) -> None:
            if not good:
                raise ValueError(f"recipe {self.name!r}: {rule}")

        word = self.name if isinstance(self.name, str) else ""
        fits = word and not set(word) & set("/\0\n") and len(word.encode()) <= 120
        need(bool(fits), "a recipe's name is text without '/', 120 bytes at most: it is part of a folder's name")
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), _RULES.get(field.type)
            need(rule is None or rule[0](value), f"{field.name} is {rule[1] if rule else ''}, not {value!r}")
        need(self.optimizer in OPTIMIZERS, f"optimizer is one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        need(self.scope in SCOPES, f"scope is one of {', '.join(SCOPES)}, not {self.scope!r}")
        need(
            self.steps >= 1 and self.batch_size >= 1,
            f"steps and batch_size are at least 1, not {self.steps}, {self.batch_size}",
        )
        need(self.evaluate_every >= 0, "evaluate_every is at least 1, or 0 for every epoch")
        need(0 <= self.warmup < self.steps, f"warmup lies in 0 to steps - 1, not {self.warmup}")
        need(math.isfinite(self.lr) and self.lr >= 0, f"lr is 0 or more, not {self.lr}")
        need(0 <= self.weight_decay < math.inf, f"weight_decay is 0 or more, not {self.weight_decay}")
        need(self.clip_norm > 0, f"clip_norm is above 0, not {self.clip_norm}")
        need(0 <= self.label_smoothing < 1, f"label_smoothing lies in 0 to 1, not {self.label_smoothing}")
        need(0 <= self.crop <= 1, f"crop lies in 0 to 1, not {self.crop}")
        need(self.stop_at is None or 0 <= self.stop_at <= 1, f"stop_at is an accuracy from 0 to 1, not {self.stop_at}")
        need(self.clip in CLIPS, f"clip is one of {', '.join(CLIPS)}, not {self.clip!r}")
        need(
            1 <= self.accumulate <= self.batch_size,
            f"accumulate lies in 1 to batch_size, {self.batch_size}, not {self.accumulate}",
        )
        need(self.precision in PRECISIONS, f"precision is one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        need(not (self.compile and self.scope == "tangent"), "torch.compile does not take the tangent scope")
        need(
            self.rank >= 1 and 0 < self.alpha < math.inf,
            f"rank is at least 1 and alpha above 0, not {self.rank}, {self.alpha}",
        )
        need(self.schedule in SCHEDULES, f"schedule is one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        need(0 <= self.dropout < 1, f"dropout lies in 0 to 1 (not included), not {self.dropout}")
        need(
            self.patience >= 0 and 0 <= self.min_delta < math.inf,
            f"patience and min_delta are 0 or more, not {self.patience}, {self.min_delta}",
        )
        if self.optimizer == "adamw":
            need(self.rho is None, "adamw takes no rho")
        else:
            need(
                self.rho is not None and 0 <= self.rho < math.inf,
                f"{self.optimizer} needs rho, 0 or more, not {self.rho}",
            )

    @property
    def gradients(self) -> int:
        """Gradients that one step takes: two for a sharpness-aware one, one for a plain one (also where ρ is 0)."""
        return 2 if self.rho else 1

    @property
    def tangent(self) -> bool:
        """Whether the model is a tangent model, and its task vectors are to be read in one."""
        return self.scope == "tangent"

    def inputs(self) -> dict[str, str | int | float | bool | None]:
        """The fields that decide a result. Those that came after the first checkpoints are left out at their defaults,
        so that what was trained before them is still found."""
        given = dataclasses.asdict(self)
        later = {"clip", "accumulate", "precision", "compile", "rank", "alpha", "dropout", "patience", "min_delta"}
        later |= {"schedule", "checkpointing"}
        if self.scope != "lora":  # of adapters it is always named: once they had separate first A's without saying so
            later |= {"shared_init"}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in given.items() if name not in later or value != defaults[name]}

    def shortened(self, steps: int) -> "Recipe":
        """The same in so many steps, with the warm-up in proportion and two looks at least; 0 steps: as it is."""
        if type(steps) is not int or steps < 0:
            raise ValueError(f"recipe {self.name!r}: steps is a whole number from 0 (its own), not {steps!r}")
        if steps == 0:
            return self
        every = min(self.evaluate_every or steps, max(1, steps // 2))
        warmup = self.warmup * steps // self.steps
        return dataclasses.replace(self, steps=steps, warmup=warmup, evaluate_every=every)

    def learning_rate(self, step: int) -> float:
        """The learning rate of step 0, 1, … steps − 1: linear warm-up, then down to 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "linear":
            return self.lr * (self.steps - step) / (self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


# What SAFT's rows share (arXiv 2504.14662 and its released code). FTTS and FTLO are given no values of their own there,
# so they get the same; ViT-L/14's batches are cut into four, see `recipe`.
_PAPER: Fields = {"steps": 8000, "lr": 1e-5, "batch_size": 128, "warmup": 500, "evaluate_every": 0, "clip": "first"}
# KnOTS's protocol for its adapters (arXiv 2410.19735); ViT-L/14 has another weight decay, see `recipe`. It names no
# clipping: both gradients are clipped, as elsewhere here. Its training pictures are prepared as for evaluation.
_KNOTS: Fields = {
    "steps": 50_000, "lr": 3e-4, "batch_size": 32, "warmup": 500, "evaluate_every": 2000, "patience": 5,
    "min_delta": 1e-3, "crop": 0.0,
}  # fmt: skip
# suite -> its recipes
_RECIPES = {
    # From notebooks/appendix/recipe_search.ipynb: the same number of settings tried for each recipe, chosen on
    # individual validation accuracy.
    "pocket": [
        Recipe("sgd", "adamw", lr=1e-3),
        Recipe("saft", "asam", lr=1e-3, rho=0.2),
        Recipe("sgd-2x", "adamw", lr=1e-3, weight_decay=0.01, steps=400),
        Recipe("sgd-wd0", "adamw", lr=6e-4, weight_decay=0.0),
        Recipe("sam", "sam", lr=1e-3, rho=0.02),
        Recipe("asam-kwon", "asam-kwon", lr=1e-3, rho=0.1),
        Recipe("ftts", "adamw", "tangent", lr=3e-3),
        Recipe("ftts+saft", "asam", "tangent", lr=3e-3, rho=0.5),
        Recipe("ftlo", "adamw", "attention", lr=3e-3, weight_decay=0.01),
        Recipe("ftlo+saft", "asam", "attention", lr=3e-3, rho=0.2),
        Recipe("lora", "adamw", "lora", lr=1e-2),
        Recipe("lora+saft", "asam", "lora", lr=1e-2, rho=0.2),
    ],
    # SAFT's own training protocol; of the controls the paper has only "sam".
    "vision8": [
        Recipe("sgd", "adamw", **_PAPER),
        Recipe("saft", "asam", rho=0.5, **_PAPER),
        dataclasses.replace(Recipe("sgd-2x", "adamw", **_PAPER), steps=16_000),
        Recipe("sgd-wd0", "adamw", weight_decay=0.0, **_PAPER),
        Recipe("sam", "sam", rho=0.05, **_PAPER),
        Recipe("asam-kwon", "asam-kwon", rho=0.5, **_PAPER),
        Recipe("ftts", "adamw", "tangent", **_PAPER),
        Recipe("ftts+saft", "asam", "tangent", rho=0.5, **_PAPER),
        Recipe("ftlo", "adamw", "attention", **_PAPER),
        Recipe("ftlo+saft", "asam", "attention", rho=0.5, **_PAPER),
        Recipe("lora", "adamw", "lora", **_KNOTS),
        Recipe("lora+saft", "asam", "lora", rho=0.5, **_KNOTS),
    ],
}
# KnOTS's protocol for Llama-3-8B (arXiv 2410.19735), which gives the rate, the decay, the schedule and 6 % of warm-up.
# Ours: batches of 32, at most 10,000 steps, a look every 500, and an end after five looks without gain.
_NLI: Fields = {
    "steps": 10_000, "lr": 3e-5, "batch_size": 32, "warmup": 600, "evaluate_every": 500, "patience": 5,
    "schedule": "linear", "checkpointing": True,
}  # fmt: skip
_RECIPES["nli6"] = [
    Recipe("lora", "adamw", "lora", **_NLI),
    Recipe("lora+saft", "asam", "lora", rho=0.5, **_NLI),
]
# Ours. Of the rates 2e-3, 3e-3 and 5e-3, tried on seed 100 with "lora", the first was the only one at which all six
# tasks were learned. ρ was not searched.
_POCKET_NLI: Fields = {
    "steps": 200, "batch_size": 16, "lr": 2e-3, "dropout": 0.0, "warmup": 12, "evaluate_every": 50,
    "schedule": "linear",
}  # fmt: skip
_RECIPES["pocket-nli"] = [
    Recipe("lora", "adamw", "lora", **_POCKET_NLI),
    Recipe("lora+saft", "asam", "lora", rho=0.2, **_POCKET_NLI),
]
_RECIPES["thimble-nli"] = [
    dataclasses.replace(plan, steps=8, batch_size=16, warmup=1, evaluate_every=4) for plan in _RECIPES["pocket-nli"]
]
_THIMBLE: Fields = {"batch_size": 16, "warmup": 4, "evaluate_every": 8}
_RECIPES["thimble"] = [
    dataclasses.replace(plan, steps=48 if plan.name == "sgd-2x" else 24, **_THIMBLE) for plan in _RECIPES["pocket"]
]


def recipe(name: str, suite: AnySuite | str, **changes: Any) -> Recipe | Published:
    """A named recipe for a suite (a `Suite` or its name), with fields replaced by `changes`.

    "sgd" is the papers' name for the plain baseline, which is AdamW; "saft" is ASAM around AdamW. "ftts" and "ftlo"
    train the tangent model and the attention weights alone, "lora" adapters; "ftts+saft", "ftlo+saft" and "lora+saft"
    the same with ASAM. "sam" and "asam-kwon" are the other sharpness-aware steps. Controls: "sgd-2x" takes as many
    gradients as "saft", "sgd-wd0" has no weight decay; see also `matched`. A name may carry changes, and is then the
    name of the recipe with all of them: "saft@lr=3e-4,rho=0.1", "saft@precision=bf16". A suite's precision is that of
    its recipes. "published:SOURCE" stands for models of others, see
    `saftnb.finetune.published`.

    Raises:
        ValueError: unknown recipe, suite or field, or a value of the wrong kind.
    """
    suite_name: Any = suite if isinstance(suite, str) else getattr(suite, "name", suite)
    if not isinstance(name, str):
        raise ValueError(f"a recipe's name is text, not {name!r}")
    if name.startswith(PREFIX):
        return Published(name.removeprefix(PREFIX))
    if suite_name not in _RECIPES:
        raise ValueError(f"no recipes for suite {suite_name!r}; suites: {', '.join(_RECIPES)}")
    named = {plan.name: plan for plan in _RECIPES[suite_name]}
    base, _, written = name.partition("@")
    if base not in named:
        raise ValueError(f"suite {suite_name!r} has no recipe {base!r}; its recipes: {', '.join(named)}")
    if written:
        changes = {"name": name, **_written_changes(name, written), **changes}
    unknown = changes.keys() - {field.name for field in dataclasses.fields(Recipe)}
    if unknown:
        raise ValueError(f"a recipe has no {', '.join(sorted(unknown))}")
    if not isinstance(suite, str) and suite.precision != "float32":
        changes = {"precision": suite.precision, **changes}
    if suite_name == "vision8" and not isinstance(suite, str) and suite.backbone.name.startswith("ViT-L-14"):
        large = {"weight_decay": 1e-4} if named[base].scope == "lora" else {"accumulate": 4}
        changes = {**large, **changes}
    return dataclasses.replace(named[base], **changes)


def plans(
    suite: AnySuite | str, recipes: Sequence[str], *, steps: int = 0, models: str = ""
) -> dict[str, Recipe | Published]:
    """The recipes of these names by their names, in so many steps (0: their own). With `models` ("fusionbench", "knots"
    or a folder with a subfolder a task; several with commas between) models of others stand in for them all: an entry
    for each, nothing to train.

    Raises:
        ValueError: as `recipe`, or two folders have one name.
    """
    if models:
        found = [Published(source.strip()) for source in models.split(",")]
        names = [one.name for one in found]
        if len(set(names)) < len(names):
            raise ValueError(f"models: {', '.join(names)} have one name in tables; give the folders names of their own")
        return dict(zip(names, found, strict=True))
    if isinstance(recipes, str):
        raise ValueError(f"recipes is a list of names, such as [{recipes!r}], not a text")
    return {name: recipe(name, suite).shortened(steps) for name in recipes}


def _written_changes(name: str, written: str) -> dict[str, int | float | bool | str | None]:
    """The changes in a recipe's name, each of its field's kind."""
    read: dict[object, Callable[[str], Any]] = {int: int, float: float, str: str}
    read[bool] = lambda value: {"true": True, "false": False}[value.lower()]
    read[float | None] = lambda value: None if value.lower() == "none" else float(value)
    kinds = {field.name: field.type for field in dataclasses.fields(Recipe)}
    words: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false"}
    words[float | None] = "a number or none"
    changes: dict[str, int | float | bool | str | None] = {}
    for part in written.split(","):
        field, equals, value = part.partition("=")
        if field not in kinds or field == "name":
            raise ValueError(f"a recipe has no {field}" if field != "name" else f"recipe {name!r} is its own name")
        if field in changes:
            raise ValueError(f"recipe {name!r}: {field} is given twice")
        try:
            if not equals:
                raise ValueError
            changes[field] = read[kinds[field]](value)
        except (ValueError, KeyError):
            wanted = words.get(kinds[field], "a value")
            raise ValueError(f"recipe {name!r}: {part!r} is not {field}= and {wanted}") from None
    return changes


def matched(plan: Recipe, accuracy: float) -> Recipe:
    """`plan`, called "…-matched", stopped as soon as its validation accuracy reaches `accuracy`; a look every 10 steps.

    The control for "it merges better because it has learned less": it stops at the accuracy of the other recipe.
    """
    return dataclasses.replace(plan, name=f"{plan.name}-matched", stop_at=accuracy, evaluate_every=10)
