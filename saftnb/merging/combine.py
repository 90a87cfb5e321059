"""`merge`, and `represent` for many merges of the same task vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from saftnb.delta import dense, is_finite, largest
from saftnb.merging.registry import Method, methods, spaces
from saftnb.merging.spans import first_not_finite
from saftnb.task_vector import LowRank, TaskVector, require_same_parameters

Experts = Sequence[TaskVector] | Mapping[str, TaskVector]  # in the order of the tasks, or by task
Statistics = Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]]  # likewise


@dataclass(frozen=True, eq=False)
class Representation:
    """Task vectors in a merge space, decomposed once for any number of merges.

    Attributes:
        space: the space's name.
        vectors: what a method works on there, one a task.
        back: the map from a merged one to a task vector of weights; linear.
        shapes: those of the weights, by name.
    """

    space: str
    vectors: tuple[TaskVector, ...]
    back: Callable[[TaskVector], TaskVector]
    shapes: Mapping[str, Size]

    def merge(self, method: str, *, statistics: Statistics | None = None, **hyperparameters: object) -> TaskVector:
        """As `merge`, in this space."""
        chosen, complete = _chosen(self.space, method, hyperparameters)
        if (statistics is not None) != chosen.needs_statistics:
            raise ValueError(f"{method} {'needs' if chosen.needs_statistics else 'takes no'} statistics")
        given: dict[str, object] = {}
        if statistics is not None:
            if isinstance(statistics, Mapping):  # by task, in the order of the vectors
                statistics = list(statistics.values())
            if len(statistics) != len(self.vectors):
                raise ValueError(f"{method}: {len(self.vectors)} task vectors, but statistics of {len(statistics)}")
            given["statistics"] = statistics
        if chosen.needs_shapes:
            given["shapes"] = self.shapes
        merged = self.back(chosen.function(self.vectors, **given, **complete))
        if bad := first_not_finite([merged]):
            name = bad[1]
            raise ValueError(f"{method}: the merged {name!r} overflows {merged[name].dtype}; use a smaller scale")
        for name, delta in merged.items():
            risky = isinstance(delta, LowRank) and 2 * largest(delta) > torch.finfo(delta.dtype).max
            if risky and not is_finite(dense(delta)):
                raise ValueError(f"{method}: the product of the merged {name!r} overflows {delta.dtype}: use float32")
        return merged


def represent(vectors: Experts, space: str = "weights", **options: object) -> Representation:
    """Take task vectors to a merge space. `merge` does this each time; a search does it once.

    Args:
        vectors: task vectors of equal names and shapes, all on one device, in a sequence or by task. A parameter may
            have any floating dtype.
        space: a name in `spaces()`; see `saftnb.merging.bases` for what each does. options: the space's own.

    Raises:
        ValueError: as `merge`.
    """
    if not isinstance(space, str) or space not in spaces():
        raise ValueError(f"there is no merge space {space!r}; allowed are {', '.join(sorted(spaces()))}")
    complete = spaces()[space].check(options)
    vectors = _checked(vectors)
    represented, back = spaces()[space].function(vectors, **complete)
    return Representation(space, tuple(represented), back, {name: delta.shape for name, delta in vectors[0].items()})


def merge(
    vectors: Experts,
    method: str,
    *,
    space: str = "weights",
    statistics: Statistics | None = None,
    **hyperparameters: object,
) -> TaskVector:
    """One task vector out of n, to be added to the base model: `merge(...).apply_to(model)`.

    vectors: task vectors of equal names and shapes, all on one device, in a sequence or by task. A parameter may have
        any floating dtype; it is computed in float32 at least, and the result has its dtype (promoted where they
        differ).
    method: a name in `methods()`. hyperparameters: the method's and the space's own, each with a default.
    space: where the method works, a name in `spaces()`: the task vectors themselves ("weights"), or the bases in which
        "knots" or "core" align them; there the merged matrices are low-rank where the given ones were.
    statistics: one mapping from parameter names to tensors for each task, in a sequence or by task, for a method that
        needs them; see there.

    Raises ValueError, in one line, on an unknown method, space or hyperparameter, a value out of range,
    vectors that do not fit together, and values that are not finite.
    """
    if isinstance(vectors, Mapping) and isinstance(statistics, Mapping):
        if missing := [task for task in vectors if task not in statistics]:
            raise ValueError(f"{method}: there are no statistics of {missing[0]!r}")
        statistics = [statistics[task] for task in vectors]
    known = isinstance(space, str) and space in spaces()
    own = spaces()[space].hyperparameters if known else {}
    options = {name: value for name, value in hyperparameters.items() if name in own}
    others = {name: value for name, value in hyperparameters.items() if name not in own}
    if known:
        _chosen(space, method, others)  # before the work of going to the space
    return represent(vectors, space, **options).merge(method, statistics=statistics, **others)


def _chosen(space: str, method: str, hyperparameters: dict[str, object]) -> tuple[Method, dict[str, object]]:
    """A method and its complete hyperparameters, or the error that there is none, or none in this space."""
    if not isinstance(method, str) or method not in methods():
        raise ValueError(f"there is no merge method {method!r}; allowed are {', '.join(sorted(methods()))}")
    chosen = methods()[method]
    if chosen.needs_statistics and space != "weights":
        raise ValueError(
            f"{method} works in the space 'weights' alone, not in {space!r}: its statistics are of weights"
        )
    return chosen, chosen.check(hyperparameters)


def _checked(vectors: Experts) -> list[TaskVector]:
    if isinstance(vectors, TaskVector):
        raise ValueError("merge takes several task vectors, in a list or by task, and got one TaskVector")
    if not isinstance(vectors, Iterable):
        raise ValueError(f"merge takes task vectors, in a list or by task, not a {type(vectors).__name__}")
    vectors = list(vectors.values() if isinstance(vectors, Mapping) else vectors)
    if not vectors:
        raise ValueError("merge needs at least one task vector, got none")
    for i, vector in enumerate(vectors):
        if not isinstance(vector, TaskVector):
            raise ValueError(f"merge takes a list of TaskVectors; its item {i} is a {type(vector).__name__}")
        require_same_parameters(vectors[0], vector, "vector 0", f"vector {i}")
    names = list(vectors[0])  # in the order of which DARE draws
    vectors = [v if list(v) == names else TaskVector({name: v[name] for name in names}) for v in vectors]
    devices = {str(delta.device) for vector in vectors for delta in vector.values()}
    if len(devices) > 1:
        raise ValueError(f"the task vectors lie on {' and '.join(sorted(devices))}: move them to one device")
    if devices == {"meta"}:
        raise ValueError("the task vectors lie on meta, which has no values: load them on a device")
    if bad := first_not_finite(vectors):
        raise ValueError(f"vector {bad[0]} has NaN or infinite values in {bad[1]!r}")
    return vectors
