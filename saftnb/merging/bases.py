"""The merge spaces: where task vectors are brought before a method combines them.

A space is a function of task vectors that returns one representation for each, again a task vector, and the linear map
from a merged representation back to weights. Only matrices (2-D deltas) change; every other parameter represents
itself. Both "knots" and "core" start from two QR decompositions of the low-rank factors, cost O((O + I)(Σr)²) for a
layer O × I, and never form a delta B A; a dense delta is taken as a factor of full rank. They compute in float64; a
representation is in float32 at least, and what comes back has the deltas' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, overload

import torch
from torch import Tensor

from saftnb.delta import dense
from saftnb.merging.deltas import promoted_dtype
from saftnb.merging.registry import Range, space
from saftnb.task_vector import Delta, LowRank, TaskVector

# To these methods a space makes no difference, since it keeps lengths and angles: they add updates up, or work on
# singular vectors alone. EVERY_SPACE stands for the space in tables and figures.
SAME_IN_EVERY_SPACE = frozenset({"average", "task_arithmetic", "iso_c", "iso_cts", "tsv_m"})
EVERY_SPACE = "the same in all"
LARGE = 2**20  # entries of a layer's representations above which KnOTS's stay factored, for their memory
Represented = tuple[list[TaskVector], Callable[[TaskVector], TaskVector]]
Back = Callable[[Delta], LowRank]  # from a merged representation of a matrix to its update


@space
def weights(vectors: Sequence[TaskVector]) -> Represented:
    """The task vectors as they are."""
    return list(vectors), lambda merged: merged


@space
def knots(
    vectors: Sequence[TaskVector],
    *,
    cutoff: Annotated[float, Range(0)] = 1e-5,
    axis: Literal["columns", "rows"] = "columns",
) -> Represented:
    """The joint SVD of all tasks' deltas, layer by layer (KnOTS; Stoica et al. 2025, arXiv 2410.19735, Section 4).

    [Δ_1 … Δ_n] = U Σ [V_1ᵀ … V_nᵀ], of which the k singular values above `cutoff` are kept: U (O, k) is shared, and
    task t is represented by R_t = Σ V_tᵀ, (k, I). A merged R is the update U R, of rank k ≤ Σr at most. With
    axis="rows" the same of the transposed deltas: [Δ_1; …; Δ_n] shares V, and task t is (U_t Σ)ᵀ, (k, O).
    """
    turned = axis == "rows"

    def back(shared: Tensor, merged: Delta, dtype: torch.dtype) -> LowRank:
        low = LowRank(shared @ merged.B, merged.A) if isinstance(merged, LowRank) else LowRank(shared, merged)
        found = low.to(dtype)
        return _turned(found) if turned else found

    def decompose(deltas: Sequence[Delta]) -> tuple[list[Delta], Back]:
        shared, parts = _joint_factors([_turned(delta) for delta in deltas] if turned else deltas, cutoff)
        large = sum(part.numel() for part in parts) > LARGE
        dtype = promoted_dtype(deltas, at_least=torch.float32)
        found = [part.to(dtype) if large else part.dense().to(dtype) for part in parts]
        return found, lambda merged: back(shared, merged, promoted_dtype(deltas))

    return _by_matrix(vectors, decompose)


@space
def core(vectors: Sequence[TaskVector]) -> Represented:
    """Each delta in orthonormal bases of all tasks' column and row spaces (Core Space; Panariello et al. 2025).

    With U the left singular vectors of [B_1 … B_n] and V the right ones of [A_1; …; A_n], which do not depend on the
    order of the tasks, task t is represented by M_t = Uᵀ B_t A_t V, (Σr, Σr) at most; back: U M Vᵀ. Nothing is lost.
    """

    def decompose(deltas: Sequence[Delta]) -> tuple[list[Tensor], Back]:
        dtype, out = promoted_dtype(deltas, at_least=torch.float32), promoted_dtype(deltas)
        factors = [_factors(delta) for delta in deltas]
        left, rights = _basis([b for b, _ in factors])
        right, lefts = _basis([a.T for _, a in factors])
        sizes = [b.shape[1] for b, _ in factors]
        pairs = zip(rights.split(sizes, dim=1), lefts.split(sizes, dim=1), strict=True)
        cores = [(mine @ other.T).to(dtype) for mine, other in pairs]
        outer, inner = left.to(dtype), right.T.to(dtype)
        return cores, lambda merged: LowRank(outer @ dense(merged), inner).to(out)

    return _by_matrix(vectors, decompose)


def _basis(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The left singular vectors U of [P_1 … P_n] and Uᵀ [P_1 … P_n]."""
    wide = torch.cat(list(parts), dim=1)
    basis, corner = torch.linalg.qr(wide)
    turn, _, _ = torch.linalg.svd(corner, full_matrices=False)
    return basis @ turn, turn.T @ corner


def joint_svd(deltas: Sequence[Delta], cutoff: float = 1e-5) -> tuple[Tensor, list[Tensor]]:
    """U and R_1 … R_n of [Δ_1 … Δ_n] = U [R_1 … R_n], by the factored form of its SVD.

    Args:
        deltas: one a task, (O, I) each. cutoff: singular values above it are kept.

    Returns:
        U (O, k), and for each task R_t (k, I), in the deltas' dtype, float32 at least.
    """
    shared, parts = _joint_factors(deltas, cutoff)
    return shared, [part.dense().to(shared.dtype) for part in parts]


def _joint_factors(deltas: Sequence[Delta], cutoff: float) -> tuple[Tensor, list[LowRank]]:
    """U, and every R_t as its factors Σ v⁽ᵗ⁾ᵀ (k, r_t) and Q_tᵀ (r_t, I), these in float64.

    QR of [B_1 … B_n] = Q R and of every A_tᵀ = Q_t L_t leaves the SVD u Σ vᵀ of the small matrix
    [R⁽¹⁾L_1ᵀ | … | R⁽ⁿ⁾L_nᵀ]; then U = Q u and R_t = Σ v⁽ᵗ⁾ᵀ Q_tᵀ. Ranks may differ.
    """
    dtype = promoted_dtype(deltas, at_least=torch.float32)
    factors = [_factors(delta) for delta in deltas]
    basis, corner = torch.linalg.qr(torch.cat([b for b, _ in factors], dim=1))
    own = [torch.linalg.qr(a.T) for _, a in factors]
    blocks = corner.split([b.shape[1] for b, _ in factors], dim=1)
    small = torch.cat([block @ lower.T for block, (_, lower) in zip(blocks, own, strict=True)], dim=1)
    u, values, vt = torch.linalg.svd(small, full_matrices=False)
    kept = values > cutoff
    scaled = values[kept, None] * vt[kept]
    parts = scaled.split([q.shape[1] for q, _ in own], dim=1)
    pairs = zip(parts, own, strict=True)
    return (basis @ u[:, kept]).to(dtype), [LowRank(part, q.T) for part, (q, _) in pairs]


def _factors(delta: Delta) -> tuple[Tensor, Tensor]:
    """B and A of B A = delta, in float64; a dense delta is multiplied by the identity on its smaller side."""
    if isinstance(delta, LowRank):
        return delta.B.double(), delta.A.double()
    dense, (out, into) = delta.double(), delta.shape
    if out < into:
        return torch.eye(out, dtype=torch.float64, device=delta.device), dense
    return dense, torch.eye(into, dtype=torch.float64, device=delta.device)


@overload
def _turned(delta: LowRank) -> LowRank: ...
@overload
def _turned(delta: Delta) -> Delta: ...
def _turned(delta: Delta) -> Delta:
    return LowRank(delta.A.T, delta.B.T) if isinstance(delta, LowRank) else delta.T


def _by_matrix(
    vectors: Sequence[TaskVector], decompose: Callable[[Sequence[Delta]], tuple[Sequence[Delta], Back]]
) -> Represented:
    """`decompose` on the deltas of every 2-D parameter; the others represent themselves."""
    represented: list[dict[str, Delta]] = [{} for _ in vectors]
    backs: dict[str, Back] = {}
    for name, delta in vectors[0].items():
        parts: Sequence[Delta] = [vector[name] for vector in vectors]
        if len(delta.shape) == 2 and delta.numel():
            parts, backs[name] = decompose(parts)
        for found, part in zip(represented, parts, strict=True):
            found[name] = part

    def back(merged: TaskVector) -> TaskVector:
        return TaskVector({name: backs[name](value) if name in backs else value for name, value in merged.items()})

    return [TaskVector(found) for found in represented], back
