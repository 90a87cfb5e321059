"""How models are fine-tuned: recipes, sharpness-aware steps, and `finetune`, which remembers what it trained.

The room can be called like the function that it is named after, since Python gives `saftnb.finetune` to the room:
`sn.finetune(suite, task)` is `saftnb.finetune.finetune(suite, task)`. Each name is loaded when it is first asked for,
so that `SharpnessAware` needs torch alone.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `_PLACES` once more, for type checkers: they do not run `__getattr__`
    from saftnb.finetune.experts import TaskVectors as TaskVectors
    from saftnb.finetune.experts import finetune as finetune
    from saftnb.finetune.experts import task_vectors as task_vectors
    from saftnb.finetune.published import Published as Published
    from saftnb.finetune.recipes import Recipe as Recipe
    from saftnb.finetune.recipes import matched as matched
    from saftnb.finetune.recipes import plans as plans
    from saftnb.finetune.recipes import recipe as recipe
    from saftnb.finetune.sharpness_aware import SharpnessAware as SharpnessAware
    from saftnb.finetune.sharpness_aware import ascent_step as ascent_step
    from saftnb.finetune.store import FineTuned as FineTuned

_PLACES = {
    "FineTuned": "store", "Published": "published", "Recipe": "recipes", "SharpnessAware": "sharpness_aware",
    "TaskVectors": "experts", "ascent_step": "sharpness_aware", "finetune": "experts", "matched": "recipes",
    "plans": "recipes", "recipe": "recipes", "task_vectors": "experts",
}  # fmt: skip
__all__ = list(_PLACES)


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.finetune(*arguments, **options)


sys.modules[__name__].__class__ = _Callable


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'saftnb.finetune' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"saftnb.finetune.{_PLACES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
