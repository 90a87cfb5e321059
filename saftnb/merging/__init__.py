"""How models combine: `merge(vectors, method, *, space="weights", **hyperparameters)`.

A merge *method* turns n task vectors into one; `methods()` lists them with their hyperparameters, defaults
and ranges. A merge *space* is where that happens: `weights` is the task vectors as they are.
"""

from saftnb.merging import methods as _definitions  # noqa: F401  (running it registers the methods)
from saftnb.merging.registry import merge, methods
from saftnb.task_vector import LowRank, TaskVector

__all__ = ["LowRank", "TaskVector", "merge", "methods"]
