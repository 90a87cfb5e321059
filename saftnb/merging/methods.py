"""The merge methods, one formula each: τ₁ … τ_n are the task vectors, λ is `scale`.

Whatever takes λ is linear in it: merge(…, scale=s) is s · merge(…, scale=1). A search over λ therefore merges
once for each setting of the others and multiplies: `merged = merge(v, "ties", keep=0.2)`, then `s * merged`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from saftnb.merging.registry import Range, method
from saftnb.merging.spans import promoted_dtype
from saftnb.merging.ties import trim_elect_merge
from saftnb.task_vector import Delta, LowRank, TaskVector


@method
def average(vectors: Sequence[TaskVector]) -> TaskVector:
    """(1/n) Σ τ_t. Parameters that are low-rank in every vector stay low-rank."""
    return _scaled_sum(vectors, 1 / len(vectors))


@method
def task_arithmetic(vectors: Sequence[TaskVector], *, scale: Annotated[float, Range()] = 1.0) -> TaskVector:
    """λ Σ τ_t (Ilharco et al. 2023, arXiv 2212.04089). What is low-rank in every vector stays low-rank."""
    return _scaled_sum(vectors, scale)


@method
def ties(
    vectors: Sequence[TaskVector],
    *,
    keep: Annotated[float, Range(0, 1, open_low=True)] = 0.2,
    scale: Annotated[float, Range()] = 1.0,
    aggregate: Literal["mean", "sum"] = "mean",
) -> TaskVector:
    """λ · TIES(τ₁ … τ_n): trim to the largest `keep`, elect signs, merge what agrees.

    Yadav et al. 2023, arXiv 2306.01708; exact rules in `saftnb.merging.ties`. The result is dense.
    """
    return trim_elect_merge(vectors, keep=keep, scale=scale, aggregate=aggregate)


@method
def dare_task_arithmetic(
    vectors: Sequence[TaskVector],
    *,
    drop: Annotated[float, Range(0, 1, open_high=True)] = 0.9,
    seed: Annotated[int, Range(0)] = 0,
    scale: Annotated[float, Range()] = 1.0,
) -> TaskVector:
    """λ Σ DARE(τ_t): entries dropped at random, the kept ones divided by the share kept, see `_dropped`."""
    return _scaled_sum(_dropped(vectors, drop, seed), scale)


@method
def dare_ties(
    vectors: Sequence[TaskVector],
    *,
    drop: Annotated[float, Range(0, 1, open_high=True)] = 0.9,
    seed: Annotated[int, Range(0)] = 0,
    keep: Annotated[float, Range(0, 1, open_low=True)] = 1.0,
    scale: Annotated[float, Range()] = 1.0,
    aggregate: Literal["mean", "sum"] = "mean",
) -> TaskVector:
    """λ · TIES(DARE(τ_1) … DARE(τ_n)), which by default trims nothing after DARE."""
    return trim_elect_merge(_dropped(vectors, drop, seed), keep=keep, scale=scale, aggregate=aggregate)


@method
def fisher(vectors: Sequence[TaskVector], statistics: Sequence[Mapping[str, Tensor]]) -> TaskVector:
    """Σ F_t τ_t / Σ F_t, entry by entry (Matena & Raffel 2022, arXiv 2111.09832, eq. 3, from a shared θ0).

    `statistics`: for each task the diagonal of its Fisher information, parameter by parameter, in the parameter's shape
    (`saftnb.merging.statistics.fisher_diagonal`). Where all are 0: the plain mean.
    """
    merged = {}
    for name, delta in vectors[0].items():
        dtype = promoted_dtype([v[name] for v in vectors], at_least=torch.float32)
        weights = torch.stack([_statistic(one, name, delta.shape).to(delta.device, dtype) for one in statistics])
        deltas = torch.stack([_matrix(v[name]).to(dtype) for v in vectors])
        total = weights.sum(0)
        mixed = (weights * deltas).sum(0) / torch.where(total > 0, total, torch.ones_like(total))
        merged[name] = torch.where(total > 0, mixed, deltas.mean(0)).to(promoted_dtype(v[name] for v in vectors))
    return TaskVector(merged)


@method
def regmean(
    vectors: Sequence[TaskVector],
    statistics: Sequence[Mapping[str, Tensor]],
    *,
    off_diagonal: Annotated[float, Range(0, 1)] = 0.9,
) -> TaskVector:
    """(Σ Δ_t G_t)(Σ G_t)⁻¹ for the layers y = W x with G_t = Σ x xᵀ, the others averaged (Jin et al. 2023,
    arXiv 2212.09849, eq. 2 and 3, from a shared θ0).

    `statistics`: for each task the matrices G_t (I, I) by their weight's name
    (`saftnb.merging.statistics.gram_matrices`), whose off-diagonal entries are multiplied by `off_diagonal`. A singular
    Σ G_t is inverted where it can be.
    """
    merged = {}
    for name, delta in vectors[0].items():
        if name not in statistics[0]:
            merged[name] = _scaled_delta_sum([v[name] for v in vectors], 1 / len(vectors))
            continue
        side = delta.shape[1]
        shrunk = []
        for one in statistics:
            gram = _statistic(one, name, (side, side)).to(delta.device, torch.float64)
            shrunk.append(off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal()))
        pulled = sum(_matrix(v[name]).double() @ gram for v, gram in zip(vectors, shrunk, strict=True))
        merged[name] = _divided(pulled, sum(shrunk)).to(promoted_dtype(v[name] for v in vectors))
    return TaskVector(merged)


@method
def iso_c(vectors: Sequence[TaskVector], *, scale: Annotated[float, Range()] = 1.0) -> TaskVector:
    """λ σ̄ U Vᵀ of Σ Δ_t = U Σ Vᵀ: every direction gets the mean singular value (Marczak et al. 2025, arXiv 2502.04959).

    Every 2-D parameter is such a matrix; the others follow task arithmetic.
    """

    def flattened(deltas: Sequence[Tensor]) -> Tensor:
        u, values, vt = torch.linalg.svd(sum(deltas), full_matrices=False)
        return scale * values.mean() * (u @ vt)

    return _by_matrix(vectors, flattened, scale)


@method
def tsv_m(vectors: Sequence[TaskVector], *, scale: Annotated[float, Range()] = 1.0) -> TaskVector:
    """λ U⊥ blockdiag(Σ_t) V⊥ᵀ: the leading singular vectors of all tasks, made orthogonal (Gargiulo et al. 2025,
    arXiv 2412.00081).

    Each Δ_t = U_t Σ_t V_tᵀ is cut to its first rank/n components (one at least); U = [U_1 … U_n] = P D Qᵀ becomes
    U⊥ = P Qᵀ, the nearest orthogonal matrix, and V likewise. Every 2-D parameter is such a matrix; the others follow
    task arithmetic.
    """

    def orthogonal(parts: Sequence[Tensor]) -> Tensor:
        p, _, qt = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
        return p @ qt

    def combined(deltas: Sequence[Tensor]) -> Tensor:
        count = max(1, min(deltas[0].shape) // len(deltas))
        parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
        left = orthogonal([u[:, :count] for u, _, _ in parts])
        right = orthogonal([vt[:count].T for _, _, vt in parts])
        return scale * (left * torch.cat([values[:count] for _, values, _ in parts])) @ right.T

    return _by_matrix(vectors, combined, scale)


def _dropped(vectors: Sequence[TaskVector], drop: float, seed: int) -> list[TaskVector]:
    """DARE (Yu et al. 2024, arXiv 2311.03099): each entry stays with probability 1 − drop and is divided by 1 − drop.

    Drawn on the CPU by a generator of its own for each task, so that every device drops the same entries.
    """
    result = []
    for number, vector in enumerate(vectors):
        generator = torch.Generator().manual_seed(seed * 10_007 + number)
        thinned = {}
        for name, delta in vector.items():
            kept = torch.rand(delta.shape, generator=generator) >= drop
            thinned[name] = _matrix(delta) * kept.to(delta.device) / (1 - drop)
        result.append(TaskVector(thinned))
    return result


def _by_matrix(
    vectors: Sequence[TaskVector], combine: Callable[[Sequence[Tensor]], Tensor], scale: float
) -> TaskVector:
    """`combine` on the deltas of every 2-D parameter, task arithmetic on the others."""
    merged = {}
    for name, first in vectors[0].items():
        deltas = [v[name] for v in vectors]
        if len(first.shape) == 2 and first.numel():
            dtype = promoted_dtype(deltas, at_least=torch.float32)
            merged[name] = combine([_matrix(delta).to(dtype) for delta in deltas]).to(promoted_dtype(deltas))
        else:
            merged[name] = _scaled_delta_sum(deltas, scale)
    return TaskVector(merged)


def _matrix(delta: Delta) -> Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta


def _statistic(one: Mapping[str, Tensor], name: str, shape: Sequence[int]) -> Tensor:
    if name not in one or tuple(one[name].shape) != tuple(shape):
        found = tuple(one[name].shape) if name in one else "nothing"
        raise ValueError(f"the statistics of {name!r} must be of shape {tuple(shape)}, got {found}")
    return one[name]


def _divided(matrix: Tensor, gram: Tensor) -> Tensor:
    """matrix · gram⁻¹ for a symmetric gram; by its pseudo-inverse where it is singular."""
    solved, fault = torch.linalg.solve_ex(gram, matrix, left=False)
    if fault.any() or not solved.isfinite().all():
        return matrix @ torch.linalg.pinv(gram, hermitian=True)
    return solved


def _scaled_sum(vectors: Sequence[TaskVector], scale: float) -> TaskVector:
    return TaskVector({name: _scaled_delta_sum([v[name] for v in vectors], scale) for name in vectors[0]})


def _scaled_delta_sum(deltas: Sequence[Delta], scale: float) -> Delta:
    """scale · Σ deltas: λ[B₁ … B_n] [A₁; …; A_n] if all are low-rank, else one running dense sum."""
    if all(isinstance(delta, LowRank) for delta in deltas):
        return LowRank(scale * torch.cat([d.B for d in deltas], dim=1), torch.cat([d.A for d in deltas]))
    dtype = promoted_dtype(deltas, at_least=torch.float32)
    total = torch.zeros(deltas[0].shape, dtype=dtype, device=deltas[0].device)
    for delta in deltas:
        if isinstance(delta, LowRank):
            total.addmm_(delta.B.to(dtype), delta.A.to(dtype))
        else:
            total.add_(delta)
    return total.mul_(scale).to(promoted_dtype(deltas))
