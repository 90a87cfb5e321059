"""How models combine: `merge(vectors, method, *, space="weights", **hyperparameters)`.

A merge *method* turns n task vectors into one; `methods()` lists them with their hyperparameters, defaults
and ranges. A merge *space* is where that happens, see `spaces()`: "weights" is the task vectors as they are.
`learn(suite, vectors)` learns the coefficients instead, on pictures without labels.
"""

from typing import TYPE_CHECKING, Any

from saftnb.merging import averaging as _averaging  # noqa: F401  (running it registers the methods)
from saftnb.merging import bases as _bases  # noqa: F401  (and the spaces)
from saftnb.merging import spectral as _spectral  # noqa: F401
from saftnb.merging.combine import Representation, merge, represent
from saftnb.merging.registry import methods, spaces
from saftnb.task_vector import LowRank, TaskVector

if TYPE_CHECKING:
    from saftnb.merging.learning import learn

__all__ = ["LowRank", "Representation", "TaskVector", "learn", "merge", "methods", "represent", "spaces"]


def __getattr__(name: str) -> Any:
    if name != "learn":
        raise AttributeError(f"module 'saftnb.merging' has no attribute {name!r}")
    from saftnb.merging.learning import learn  # it needs the suites, which a merge does not

    return learn
