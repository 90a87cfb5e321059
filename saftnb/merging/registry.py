"""The lists of merge methods and merge spaces: a decorated function is one, its signature is its schema.

Either takes the task vectors first and its hyperparameters by keyword, each annotated with what it may be:
`Annotated[float, Range(0, 1)]`, `Annotated[int, Range(0)]`, `bool` or `Literal["mean", "sum"]`.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

REQUIRED = inspect.Parameter.empty
Function = TypeVar("Function", bound=Callable[..., object])


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
            return ""
        left = "(" if self.open_low or math.isinf(self.low) else "["
        right = ")" if self.open_high or math.isinf(self.high) else "]"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class Hyperparameter:
    """One keyword of a method: its type (float, int, bool, or str for a choice), bounds and default."""

    name: str
    type: type[Any]
    allowed: Range | tuple[str, ...]
    default: Any = REQUIRED

    def __str__(self) -> str:
        if isinstance(self.allowed, tuple):
            kind = " or ".join(map(repr, self.allowed))
        else:
            kind = {float: f"number {self.allowed}", int: f"integer {self.allowed}", bool: "True or False"}
            kind = kind[self.type].strip()
        return f"{self.name}: {kind}" + ("" if self.default is REQUIRED else f", default {self.default!r}")

    def check(self, value: object) -> Any:
        """`value` as this hyperparameter's own type; raises ValueError if it is not an allowed one.

        An int or a numpy scalar passes as a float; a bool never passes as a number.
        """
        accepted: type[Any] = {float: Real, int: Integral}.get(self.type, self.type)
        valid = isinstance(value, accepted) and (self.type is bool or not isinstance(value, bool))
        try:
            own: Any = self.type(value) if valid else value
        except OverflowError:  # an int beyond all floats
            valid, own = False, value
        if not valid or (self.type is not bool and own not in self.allowed):
            raise ValueError(f"{self.name} = {value!r} is not allowed ({self})")
        return own


@dataclass(frozen=True)
class Schema:
    """A registered function and its hyperparameters by name."""

    name: str
    function: Callable[..., Any]
    hyperparameters: dict[str, Hyperparameter]

    def __str__(self) -> str:
        return f"{self.name}({'; '.join(map(str, self.hyperparameters.values()))})"

    def check(self, given: Mapping[str, object]) -> dict[str, Any]:
        """The complete hyperparameters, defaults filled in. Raises ValueError naming the allowed ones."""
        unknown = [name for name in given if name not in self.hyperparameters]
        if unknown:
            allowed = "; ".join(map(str, self.hyperparameters.values())) or "none"
            raise ValueError(f"{self.name} has no hyperparameter {unknown[0]!r}; allowed are {allowed}")
        complete: dict[str, Any] = {}
        for name, hyperparameter in self.hyperparameters.items():
            value = given.get(name, hyperparameter.default)
            if value is REQUIRED:
                raise ValueError(f"{self.name} needs the hyperparameter {hyperparameter}")
            try:
                complete[name] = hyperparameter.check(value)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
        return complete


@dataclass(frozen=True)
class Method(Schema):
    """A merge method: (vectors, [statistics], [shapes], **hyperparameters) → task vector.

    Attributes:
        needs_statistics: it takes `statistics`, one mapping a task, see `merge`.
        needs_shapes: it takes `shapes`, parameter name → the shape that the weight has outside of any merge space.
    """

    needs_statistics: bool = False
    needs_shapes: bool = False


@dataclass(frozen=True)
class Space(Schema):
    """A merge space: (vectors, **hyperparameters) → (representations, a function from one of those back to weights)."""


_METHODS: dict[str, Method] = {}
_SPACES: dict[str, Space] = {}


def method(function: Function) -> Function:
    """Registers a function as the merge method of its name. Raises TypeError on an unusable annotation."""
    takes = inspect.signature(function).parameters
    _METHODS[function.__name__] = Method(
        function.__name__, function, _schema(function), "statistics" in takes, "shapes" in takes
    )
    return function


def space(function: Function) -> Function:
    """Registers a function as the merge space of its name. Raises TypeError on an unusable annotation."""
    _SPACES[function.__name__] = Space(function.__name__, function, _schema(function))
    return function


def _schema(function: Callable[..., object]) -> dict[str, Hyperparameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: _hyperparameter(p.name, hints[p.name], p.default) for p in keywords}


def _hyperparameter(name: str, hint: Any, default: Any) -> Hyperparameter:
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


def spaces() -> dict[str, Space]:
    """Every merge space by name."""
    return dict(_SPACES)
