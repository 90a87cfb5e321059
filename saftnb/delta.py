"""One parameter's change: a tensor, or `LowRank(B, A)`, the product B A that is never formed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

Scalar = TypeVar("Scalar")


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """The matrix B A, kept as its factors: B is (O, r), A is (r, I), α/r already inside.

    Sums of LowRanks stay low-rank by concatenation, B₁A₁ + B₂A₂ = [B₁ B₂] [A₁; A₂]: ranks add up.
    Raises ValueError unless both factors are 2-D floating tensors of one rank, dtype and device.
    """

    B: Tensor
    A: Tensor
    __array_ufunc__ = None  # so that numpy's scalars leave `*` to us

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.shape))
        return f"LowRank({shape}, rank {self.B.shape[1]}, {str(self.dtype).removeprefix('torch.')})"

    def __post_init__(self) -> None:
        for name in ("B", "A"):
            require_floating(getattr(self, name), f"LowRank's {name}")
            object.__setattr__(self, name, getattr(self, name).detach())
        B, A = self.B, self.A
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(f"LowRank takes B (O, r), A (r, I), got {tuple(B.shape)} and {tuple(A.shape)}")
        if (B.dtype, B.device) != (A.dtype, A.device):
            raise ValueError(f"LowRank's B is {B.dtype} on {B.device}, its A is {A.dtype} on {A.device}")

    @property
    def shape(self) -> torch.Size:
        """(O, I)."""
        return torch.Size((self.B.shape[0], self.A.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        return self.B.device

    def numel(self) -> int:
        """O · I, the entries of the matrix that this stands for."""
        return self.shape.numel()

    def dense(self) -> Tensor:
        """B A, (O, I)."""
        return self.B @ self.A

    def to(self, *args: Any, **kwargs: Any) -> LowRank:
        """Both factors through `Tensor.to`."""
        return LowRank(self.B.to(*args, **kwargs), self.A.to(*args, **kwargs))

    @overload
    def __add__(self, other: LowRank) -> LowRank: ...
    @overload
    def __add__(self, other: Tensor) -> Tensor: ...
    def __add__(self, other: LowRank | Tensor) -> LowRank | Tensor:
        if isinstance(other, Tensor):
            return self.dense() + other
        if not isinstance(other, LowRank):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(f"cannot add LowRanks of shapes {tuple(self.shape)} and {tuple(other.shape)}")
        return LowRank(torch.cat([self.B, other.B], dim=1), torch.cat([self.A, other.A]))

    __radd__ = __add__

    @overload
    def __sub__(self, other: LowRank) -> LowRank: ...
    @overload
    def __sub__(self, other: Tensor) -> Tensor: ...
    def __sub__(self, other: LowRank | Tensor) -> LowRank | Tensor:
        return self + (-other)

    def __rsub__(self, other: Tensor) -> Tensor:
        return other + (-self)

    def __neg__(self) -> LowRank:
        return LowRank(-self.B, self.A)

    def __mul__(self, scalar: float) -> LowRank:
        return LowRank(self.B * finite(scalar), self.A) if isinstance(scalar, Real) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, scalar: float) -> LowRank:
        return self * (1 / finite(scalar))


Delta = Tensor | LowRank


def require_floating(value: object, what: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} must be a floating-point Tensor or a LowRank, got {kind}")
    if value.layout != torch.strided:
        raise ValueError(f"{what} is {value.layout}: it must be a dense Tensor, see Tensor.to_dense, or a LowRank")
    if value.element_size() < 2:
        raise ValueError(f"{what} is {value.dtype}, which PyTorch cannot add: convert it to bfloat16 or float32 first")


def finite(scalar: Scalar) -> Scalar:
    try:
        fits = not isinstance(scalar, Real) or math.isfinite(scalar)
    except OverflowError:  # an int beyond all floats
        fits = False
    if not fits:
        raise ValueError(f"a task vector can be multiplied by finite numbers alone, not by {scalar}")
    return scalar


def summed(target: Tensor, delta: Delta) -> Tensor:
    """target + delta in target's dtype, formed in float32 at least."""
    wide = torch.promote_types(torch.promote_types(target.dtype, delta.dtype), torch.float32)
    return (target + dense(delta.to(target.device, wide))).to(target.dtype)


def dense(delta: Delta, dtype: torch.dtype | None = None) -> Tensor:
    """The delta as a matrix, of this dtype where one is given: half-precision factors are multiplied in it."""
    delta = delta if dtype is None else delta.to(dtype)
    return delta.dense() if isinstance(delta, LowRank) else delta


def frobenius_norm(delta: Delta) -> float:
    """‖Δ‖_F in float64; of a low-rank one without forming it."""
    return squared_norm(delta) ** 0.5


def squared_norm(delta: Delta) -> float:
    if isinstance(delta, Tensor):
        return float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
    B, A = delta.B.double(), delta.A.double()
    return max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0)


def is_finite(delta: Delta) -> bool:
    """Whether a delta is free of NaN and infinity, also in float32 what a low-rank one stands for. Needs memory only
    where factors are so large that their product, which is then formed, may overflow."""
    if isinstance(delta, Tensor):
        return math.isfinite(largest(delta))
    most, wide = largest(delta), torch.promote_types(delta.dtype, torch.float32)
    if 2 * most < torch.finfo(wide).max:
        return True
    return all(is_finite(part) for part in (delta.B, delta.A)) and is_finite(dense(delta, wide))


def largest(delta: Delta) -> float:
    """The largest absolute entry, NaN where there is one; of a low-rank delta a bound of it, from its factors."""
    if isinstance(delta, LowRank):
        return largest(delta.B) * largest(delta.A) * delta.B.shape[1]
    if not delta.numel():
        return 0.0
    wide = delta if delta.element_size() > 1 else delta.float()  # PyTorch cannot compare float8
    return float(torch.stack(torch.aminmax(wide)).abs().amax())
