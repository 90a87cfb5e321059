"""How models combine: `merge(vectors, method, *, space="weights", **hyperparameters)`.

A merge *method* turns n task vectors into one; `methods()` lists them with their hyperparameters, defaults
and ranges. A merge *space* is where that happens, see `spaces()`: "weights" is the task vectors as they are.
"""

from saftnb.merging import methods as _methods  # noqa: F401  (running it registers the methods)
from saftnb.merging import spaces as _spaces  # noqa: F401  (and the spaces)
from saftnb.merging import spectral as _spectral  # noqa: F401
from saftnb.merging.merge import Representation, merge, represent
from saftnb.merging.registry import methods, spaces
from saftnb.task_vector import LowRank, TaskVector

__all__ = ["LowRank", "Representation", "TaskVector", "merge", "methods", "represent", "spaces"]
