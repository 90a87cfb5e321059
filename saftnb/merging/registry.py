"""The list of merge methods: a decorated function is a method, its signature is its schema.

A method takes the task vectors first and its hyperparameters by keyword, each annotated with what it may be:
`Annotated[float, Range(0, 1)]`, `Annotated[int, Range(0)]`, `bool` or `Literal["mean", "sum"]`.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from torch import Tensor

from saftnb.merging.spans import first_not_finite
from saftnb.task_vector import TaskVector, require_same_parameters

SPACES = ("weights",)
REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`, each end included unless it is open."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and -math.inf < value < math.inf

    def __str__(self) -> str:
        if math.isinf(self.low) and math.isinf(self.high):
            return "any finite"
        left = "(" if self.open_low or math.isinf(self.low) else "["
        right = ")" if self.open_high or math.isinf(self.high) else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class Hyperparameter:
    """One keyword of a method: its type (float, int, bool, or str for a choice), bounds and default."""

    name: str
    type: type
    allowed: Range | tuple[str, ...]
    default: object = REQUIRED

    def __str__(self) -> str:
        if isinstance(self.allowed, tuple):
            kind = " or ".join(map(repr, self.allowed))
        else:
            kind = {float: f"number {self.allowed}", int: f"integer {self.allowed}", bool: "True or False"}
            kind = kind[self.type]
        return f"{self.name}: {kind}" + ("" if self.default is REQUIRED else f", default {self.default!r}")

    def check(self, value: object) -> object:
        """`value` as this hyperparameter's own type; raises ValueError if it is not an allowed one.

        An int or a numpy scalar passes as a float; a bool never passes as a number.
        """
        accepted = {float: Real, int: Integral}.get(self.type, self.type)
        valid = isinstance(value, accepted) and (self.type is bool or not isinstance(value, bool))
        try:
            own = self.type(value) if valid else value
        except OverflowError:  # an int beyond all floats
            valid = False
        if not valid or (self.type is not bool and own not in self.allowed):
            raise ValueError(f"{self.name} = {value!r} is not allowed ({self})")
        return own


@dataclass(frozen=True)
class Method:
    """A registered merge method: its function, its hyperparameters by name, and whether it needs statistics."""

    name: str
    function: Callable[..., TaskVector]
    hyperparameters: dict[str, Hyperparameter]
    needs_statistics: bool = False

    def __str__(self) -> str:
        return f"{self.name}({'; '.join(map(str, self.hyperparameters.values()))})"

    def check(self, given: dict[str, object]) -> dict[str, object]:
        """The complete hyperparameters, defaults filled in. Raises ValueError naming the allowed ones."""
        unknown = [name for name in given if name not in self.hyperparameters]
        if unknown:
            allowed = "; ".join(map(str, self.hyperparameters.values())) or "none"
            raise ValueError(f"{self.name} has no hyperparameter {unknown[0]!r}; allowed are {allowed}")
        complete = {}
        for name, hyperparameter in self.hyperparameters.items():
            value = given.get(name, hyperparameter.default)
            if value is REQUIRED:
                raise ValueError(f"{self.name} needs the hyperparameter {hyperparameter}")
            try:
                complete[name] = hyperparameter.check(value)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
        return complete


_METHODS: dict[str, Method] = {}


def method(function: Callable[..., TaskVector]) -> Callable[..., TaskVector]:
    """Registers a function as the merge method of its name. Raises TypeError on an unusable annotation."""
    hints = typing.get_type_hints(function, include_extras=True)
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    schema = {p.name: _hyperparameter(p.name, hints[p.name], p.default) for p in keywords}
    needs = "statistics" in inspect.signature(function).parameters
    _METHODS[function.__name__] = Method(function.__name__, function, schema, needs)
    return function


def _hyperparameter(name: str, hint: object, default: object) -> Hyperparameter:
    kind, allowed = hint, Range()
    if typing.get_origin(hint) is typing.Annotated:
        kind, allowed = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        kind, allowed = str, typing.get_args(hint)
    if kind not in (float, int, bool, str) or (kind is str) != isinstance(allowed, tuple):
        raise TypeError(f"hyperparameter {name} is annotated {hint}: give a float, int, bool or Literal")
    return Hyperparameter(name, kind, allowed, default)


def methods() -> dict[str, Method]:
    """Every merge method by name; `print(*methods().values(), sep="\\n")` shows them with their schemas."""
    return dict(_METHODS)


def merge(
    vectors: Sequence[TaskVector],
    method: str,
    *,
    space: str = "weights",
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
    **hyperparameters: object,
) -> TaskVector:
    """One task vector out of n, to be added to the base model: `merge(...).apply_to(model)`.

    vectors: task vectors of equal names and shapes, all on one device. A parameter may have any floating
        dtype; it is computed in float32 at least, and the result has its dtype (promoted where they differ).
    method: a name in `methods()`. hyperparameters: the method's own, each with a default.
    space: where the method works; only "weights", the task vectors themselves, for now.
    statistics: one mapping from parameter names to tensors for each task, for a method that needs them; see there.

    Raises ValueError, in one line, on an unknown method, space or hyperparameter, a value out of range,
    vectors that do not fit together, and values that are not finite.
    """
    if method not in _METHODS:
        raise ValueError(f"there is no merge method {method!r}; allowed are {', '.join(sorted(_METHODS))}")
    if space not in SPACES:
        raise ValueError(f"there is no merge space {space!r}; allowed are {', '.join(SPACES)}")
    chosen = _METHODS[method]
    complete = chosen.check(hyperparameters)
    vectors = _checked(vectors)
    if (statistics is not None) != chosen.needs_statistics:
        raise ValueError(f"{method} {'needs' if chosen.needs_statistics else 'takes no'} statistics")
    if statistics is not None and len(statistics) != len(vectors):
        raise ValueError(f"{method}: {len(vectors)} task vectors, but statistics of {len(statistics)}")
    merged = chosen.function(vectors, *([statistics] if chosen.needs_statistics else []), **complete)
    if bad := first_not_finite([merged]):
        name = bad[1]
        raise ValueError(f"{method}: the merged {name!r} overflows {merged[name].dtype}; use a smaller scale")
    return merged


def _checked(vectors: Sequence[TaskVector]) -> list[TaskVector]:
    vectors = list(vectors)
    if not vectors:
        raise ValueError("merge needs at least one task vector, got none")
    for i, vector in enumerate(vectors):
        if not isinstance(vector, TaskVector):
            raise ValueError(f"merge takes a list of TaskVectors; its item {i} is a {type(vector).__name__}")
        require_same_parameters(vectors[0], vector, "vector 0", f"vector {i}")
    devices = {str(delta.device) for vector in vectors for delta in vector.values()}
    if len(devices) > 1:
        raise ValueError(f"the task vectors lie on {' and '.join(sorted(devices))}: move them to one device")
    if bad := first_not_finite(vectors):
        raise ValueError(f"vector {bad[0]} has NaN or infinite values in {bad[1]!r}")
    return vectors
