"""How models are fine-tuned: recipes, sharpness-aware steps, and `finetune`, which remembers what it trained.

The room can be called like the function that it is named after, since Python gives `saftnb.finetune` to the room:
`sn.finetune(suite, task)` is `saftnb.finetune.finetune(suite, task)`. Each name is loaded when it is first asked for,
so that `SharpnessAware` needs torch alone.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

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
