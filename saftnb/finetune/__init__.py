"""How models are fine-tuned: recipes, sharpness-aware steps, and `finetune`, which remembers what it trained."""

from saftnb.finetune.finetune import TaskVectors, finetune, task_vectors
from saftnb.finetune.recipe import Recipe, matched, recipe
from saftnb.finetune.sharpness_aware import SharpnessAware, ascent_step
from saftnb.finetune.store import FineTuned

__all__ = [
    "FineTuned", "Recipe", "SharpnessAware", "TaskVectors", "ascent_step", "finetune", "matched", "recipe",
    "task_vectors",
]  # fmt: skip
