"""One parameter of several tasks: the dtype, the dense form and the sum of its deltas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from saftnb.delta import Delta, LowRank


def promoted_dtype(deltas: Iterable[Delta], at_least: torch.dtype | None = None) -> torch.dtype:
    """The narrowest dtype that holds every delta (and `at_least`) exactly, by PyTorch's promotion."""
    dtypes = [delta.dtype for delta in deltas] + ([at_least] if at_least else [])
    return reduce(torch.promote_types, dtypes)


def dense(delta: Delta, dtype: torch.dtype) -> Tensor:
    """The delta as a matrix of this dtype; the product of half-precision factors is formed in it, not in theirs."""
    delta = delta.to(dtype)
    return delta.dense() if isinstance(delta, LowRank) else delta


def scaled_sum(deltas: Sequence[Delta], scale: float) -> Delta:
    """scale · Σ deltas: λ[B₁ … B_n] [A₁; …; A_n] if all are low-rank, else a running dense sum in float32 at least."""
    out = promoted_dtype(deltas)
    if all(isinstance(delta, LowRank) for delta in deltas):
        return LowRank(
            scale * torch.cat([d.B.to(out) for d in deltas], dim=1), torch.cat([d.A.to(out) for d in deltas])
        )
    dtype = promoted_dtype(deltas, at_least=torch.float32)
    total = torch.zeros(deltas[0].shape, dtype=dtype, device=deltas[0].device)
    for delta in deltas:
        if isinstance(delta, LowRank):
            total.addmm_(delta.B.to(dtype), delta.A.to(dtype))
        else:
            total.add_(delta)
    return total.mul_(scale).to(out)
