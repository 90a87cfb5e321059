"""`Recipe`: how a task model is fine-tuned, and the named recipes of the papers' rows."""

import dataclasses
import math
from dataclasses import dataclass

OPTIMIZERS = ("adamw", "sam", "asam", "asam-kwon")
SCOPES = ("full",)


@dataclass(frozen=True)
class Recipe:
    """Everything, besides suite, task and seed, that decides a fine-tuned model.

    Attributes:
        name: how tables and figures call it.
        optimizer: "adamw", or a sharpness-aware step around AdamW: "sam", "asam" (SAFT's), "asam-kwon".
        scope: which parameters train; "full" is every parameter of the image tower.
        steps: optimizer steps. A sharpness-aware step costs two gradients, a plain one costs one.
        batch_size: pictures a step.
        lr: peak learning rate, after `warmup` linear steps; a cosine then takes it to 0 at the last step.
        weight_decay: AdamW's decoupled weight decay.
        rho: radius ρ of the perturbation; None for "adamw".
        clip_norm: largest L2 norm of the gradient that AdamW receives. For a sharpness-aware step that is the
            second gradient. (SAFT's released code clips the first one, which changes nothing as ε is normalised;
            here both kinds of recipe have their update clipped, so that ρ is all that differs.)
        label_smoothing: share of the target spread over all classes.
        crop: smallest share of a picture's area that the random resized crop of training pictures keeps.
        evaluate_every: steps between looks at validation accuracy; the weights of the best look are kept
            (the earliest one of equals).
        stop_at: training ends at the first look whose validation accuracy is at least this; None: at the last step.
            The learning rate's schedule stays that of all `steps`.

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

    def __post_init__(self):
        def need(good: bool, rule: str) -> None:
            if not good:
                raise ValueError(f"recipe {self.name!r}: {rule}")

        need(self.optimizer in OPTIMIZERS, f"optimizer is one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        need(self.scope in SCOPES, f"scope is one of {', '.join(SCOPES)}, not {self.scope!r}")
        need(self.steps >= 1 and self.batch_size >= 1, "steps and batch_size are at least 1")
        need(self.evaluate_every >= 1, "evaluate_every is at least 1")
        need(0 <= self.warmup < self.steps, f"warmup lies in 0 to steps - 1, not {self.warmup}")
        need(math.isfinite(self.lr) and self.lr >= 0, f"lr is 0 or more, not {self.lr}")
        need(self.weight_decay >= 0, f"weight_decay is 0 or more, not {self.weight_decay}")
        need(self.clip_norm > 0, f"clip_norm is above 0, not {self.clip_norm}")
        need(0 <= self.label_smoothing < 1, f"label_smoothing lies in 0 to 1, not {self.label_smoothing}")
        need(0 < self.crop <= 1, f"crop lies in 0 (not included) to 1, not {self.crop}")
        need(self.stop_at is None or 0 <= self.stop_at <= 1, f"stop_at is an accuracy from 0 to 1, not {self.stop_at}")
        if self.optimizer == "adamw":
            need(self.rho is None, "adamw takes no rho")
        else:
            need(self.rho is not None and self.rho >= 0, f"{self.optimizer} needs rho, 0 or more, not {self.rho}")

    @property
    def gradients(self) -> int:
        """Gradients that one step takes: two for a sharpness-aware one, one for a plain one (also where ρ is 0)."""
        return 2 if self.rho else 1

    def learning_rate(self, step: int) -> float:
        """The learning rate of step 0, 1, … steps − 1: linear warm-up, then a cosine to 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


# suite -> recipe name -> Recipe. The pocket values come from notebooks/appendix/recipe_search.ipynb: the same number
# of settings tried for each recipe, chosen on individual validation accuracy.
_RECIPES = {
    "pocket": [
        Recipe("sgd", "adamw", lr=1e-3),
        Recipe("saft", "asam", lr=1e-3, rho=0.2),
        Recipe("sgd-2x", "adamw", lr=1e-3, weight_decay=0.01, steps=400),
        Recipe("sgd-wd0", "adamw", lr=6e-4, weight_decay=0.0),
        Recipe("sam", "sam", lr=1e-3, rho=0.02),
        Recipe("asam-kwon", "asam-kwon", lr=1e-3, rho=0.1),
    ],
}
_THIMBLE = {"batch_size": 32, "warmup": 4, "evaluate_every": 8}
_RECIPES["thimble"] = [
    dataclasses.replace(plan, steps=48 if plan.name == "sgd-2x" else 24, **_THIMBLE) for plan in _RECIPES["pocket"]
]


def recipe(name: str, suite, **changes) -> Recipe:
    """A named recipe for a suite (a `Suite` or its name), with fields replaced by `changes`.

    "sgd" is the papers' name for the plain baseline, which is AdamW; "saft" is ASAM around AdamW. "sam" and
    "asam-kwon" are the other sharpness-aware steps. Controls: "sgd-2x" takes as many gradients as "saft", "sgd-wd0" has
    no weight decay; see also `matched`. A name may carry changes, and is then the name of the recipe with all of them:
    "saft@lr=3e-4,rho=0.1".

    Raises:
        ValueError: unknown recipe, suite or field, or a value that is no number.
    """
    suite_name = suite if isinstance(suite, str) else suite.name
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
    return dataclasses.replace(named[base], **changes)


def _written_changes(name: str, written: str) -> dict[str, int | float]:
    """The changes in a recipe's name, as numbers: whole ones for the fields that count something."""
    whole = {field.name for field in dataclasses.fields(Recipe) if field.type is int}
    changes = {}
    for part in written.split(","):
        field, _, value = part.partition("=")
        try:
            changes[field] = int(value) if field in whole else float(value)
        except ValueError:
            raise ValueError(f"recipe {name!r}: {part!r} is not FIELD=NUMBER") from None
    return changes


def matched(plan: Recipe, accuracy: float) -> Recipe:
    """`plan`, called "…-matched", stopped as soon as its validation accuracy reaches `accuracy`; a look every 10 steps.

    The control for "it merges better because it has learned less": it stops at the accuracy of the other recipe.
    """
    return dataclasses.replace(plan, name=f"{plan.name}-matched", stop_at=accuracy, evaluate_every=10)
