"""One parameter of several tasks: the dtype and the sum of its deltas, and the lowest rank of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import overload

import torch
from torch import Tensor

from saftnb.delta import Delta, LowRank

WHOLE = 1024  # dense matrices of no more rows or columns are searched for their rank


def promoted_dtype(deltas: Iterable[Delta], at_least: torch.dtype | None = None) -> torch.dtype:
    """The narrowest dtype that holds every delta (and `at_least`) exactly, by PyTorch's promotion."""
    dtypes = [delta.dtype for delta in deltas] + ([at_least] if at_least else [])
    return reduce(torch.promote_types, dtypes)


@overload
def scaled_sum(deltas: Sequence[Tensor], scale: float) -> Tensor: ...
@overload
def scaled_sum(deltas: Sequence[Delta], scale: float) -> Delta: ...
def scaled_sum(deltas: Sequence[Delta], scale: float) -> Delta:
    """scale · Σ deltas: λ[B₁ … B_n] [A₁; …; A_n] if all are low-rank, else a running dense sum in float32 at least."""
    out = promoted_dtype(deltas)
    low = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(low) == len(deltas):
        return LowRank(scale * torch.cat([d.B.to(out) for d in low], dim=1), torch.cat([d.A.to(out) for d in low]))
    dtype = promoted_dtype(deltas, at_least=torch.float32)
    total = torch.zeros(deltas[0].shape, dtype=dtype, device=deltas[0].device)
    for delta in deltas:
        if isinstance(delta, LowRank):
            total.addmm_(delta.B.to(dtype), delta.A.to(dtype))
        else:
            total.add_(delta)
    return total.mul_(scale).to(out)


def lowest_rank(delta: Delta, rank: int | None = None) -> LowRank:
    """The same matrix with as few components as hold it to within rounding, or its best approximation of `rank`.

    Singular values below ε · max(O, I) times the largest are rounding (float32's ε). A dense matrix of more than
    `WHOLE` rows and columns is not searched for a low rank unless `rank` is given: it is written as it is, times the
    identity.
    """
    size, least = min(delta.shape), max(delta.shape) * torch.finfo(torch.float32).eps
    if isinstance(delta, LowRank):
        if delta.B.shape[1] >= size:
            return lowest_rank(delta.dense(), rank)
        if rank is None and _has_full_rank(delta, least):
            return delta
        left, upper = torch.linalg.qr(delta.B.double())
        right, lower = torch.linalg.qr(delta.A.T.double())
        u, values, vt = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        u, vt = left @ u, vt @ right.T
    elif size > WHOLE and rank is None:
        eye = torch.eye(size, dtype=delta.dtype)
        return LowRank(eye, delta) if delta.shape[0] == size else LowRank(delta, eye)
    else:
        u, values, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    kept = int((values > least * values[:1]).sum())
    kept = max(1, kept if rank is None else min(kept, rank))
    root = values[:kept].sqrt()
    return LowRank(u[:, :kept] * root, root[:, None] * vt[:kept]).to(delta.dtype)


def _has_full_rank(delta: LowRank, least: float) -> bool:
    """Whether every component of B A counts: from the small BᵀB and A Aᵀ, whose product has the squared values."""
    values, vectors = torch.linalg.eigh((delta.B.T @ delta.B).double())
    root = vectors * values.clamp(min=0).sqrt()
    squares = torch.linalg.eigvalsh(root.T @ (delta.A @ delta.A.T).double() @ root)
    return bool(squares[0] > (10 * least) ** 2 * squares[-1])  # well above: float32's products have their own rounding
