"""How models are fine-tuned: recipes, sharpness-aware steps, and `finetune`, which remembers what it trained.

The room can be called like the function that it is named after, since Python gives `saftnb.finetune` to the room:
`sn.finetune(suite, task)` is `saftnb.finetune.finetune(suite, task)`.
"""

import sys
from types import ModuleType
from typing import Any

from saftnb.finetune.finetune import TaskVectors, finetune, task_vectors
from saftnb.finetune.published import Published
from saftnb.finetune.recipe import Recipe, matched, plans, recipe
from saftnb.finetune.sharpness_aware import SharpnessAware, ascent_step
from saftnb.finetune.store import FineTuned

__all__ = [
    "FineTuned", "Published", "Recipe", "SharpnessAware", "TaskVectors", "ascent_step", "finetune", "matched", "plans",
    "recipe", "task_vectors",
]  # fmt: skip


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> FineTuned:
        return self.finetune(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
