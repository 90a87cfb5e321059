"""The merge methods but the spectral ones, one formula each: τ₁ … τ_n are the task vectors, λ is `scale`.

Whatever takes λ is linear in it: merge(…, scale=s) is s · merge(…, scale=1). A search over λ therefore merges
once for each setting of the others and multiplies: `merged = merge(v, "ties", keep=0.2)`, then `s * merged`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from saftnb.delta import Delta, dense, is_finite
from saftnb.merging.dare import ThinnedVector, generators, thinned_by_name
from saftnb.merging.deltas import promoted_dtype, scaled_sum
from saftnb.merging.registry import Range, method
from saftnb.merging.ties import trim_elect_merge
from saftnb.task_vector import TaskVector


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
    """λ Σ DARE(τ_t): entries dropped at random, the kept ones divided by the share kept, see `saftnb.merging.dare`."""
    merged = {name: scaled_sum(parts, scale) for name, parts in thinned_by_name(vectors, drop, seed)}
    return _in_dtype_of(vectors, merged)


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
    drawn = generators(len(vectors), seed)
    thinned = [ThinnedVector(vector, drop, one) for vector, one in zip(vectors, drawn, strict=True)]
    return _in_dtype_of(vectors, trim_elect_merge(thinned, keep=keep, scale=scale, aggregate=aggregate))


@method
def fisher(
    vectors: Sequence[TaskVector], statistics: Sequence[Mapping[str, Tensor]], *, normalize: bool = True
) -> TaskVector:
    """Σ F_t τ_t / Σ F_t, entry by entry (Matena & Raffel 2022, arXiv 2111.09832, eq. 3, from a shared θ0).

    `statistics`: for each task the diagonal of its Fisher information, parameter by parameter, in the parameter's shape
    (`saftnb.merging.statistics.fisher_diagonal`). Where all are 0: the plain mean. With `normalize` each task's is
    first divided by its L2 norm over all entries, as in the authors' code: else the task with the largest gradients
    wins.
    """
    _require_statistics(statistics, {name: delta.shape for name, delta in vectors[0].items()})
    norms = [1.0] * len(vectors)
    if normalize:
        norms = [math.hypot(*(float(one[name].double().norm()) for name in vectors[0])) or 1.0 for one in statistics]
    merged: dict[str, Delta] = {}
    for name, delta in vectors[0].items():
        dtype = promoted_dtype([v[name] for v in vectors], at_least=torch.float32)
        given = [one[name].to(delta.device, torch.float64) / norm for one, norm in zip(statistics, norms, strict=True)]
        weights = torch.stack(given)  # in float64: in float32 small ones would vanish
        total = weights.sum(0)
        equal = torch.full_like(weights, 1 / len(vectors))
        shares = torch.where(total > 0, weights / total.where(total > 0, 1.0), equal).to(dtype)
        parts = (share * dense(v[name], dtype) for share, v in zip(shares, vectors, strict=True))
        mixed = sum(parts, torch.zeros((), dtype=dtype, device=delta.device))
        merged[name] = mixed.to(promoted_dtype(v[name] for v in vectors))
    return TaskVector(merged)


@method
def regmean(
    vectors: Sequence[TaskVector],
    statistics: Sequence[Mapping[str, Tensor]],
    *,
    off_diagonal: Annotated[float, Range(0, 1)] = 0.9,
) -> TaskVector:
    """(Σ Δ_t G_t)(Σ G_t)⁻¹ for the layers y = W x with G_t the mean of x xᵀ, the others averaged (Jin et al. 2023,
    arXiv 2212.09849, eq. 2 and 3, from a shared θ0).

    `statistics`: for each task the matrices G_t (I, I) by their weight's name
    (`saftnb.merging.statistics.gram_matrices`), whose off-diagonal entries are multiplied by `off_diagonal`. Where
    Σ G_t is numerically singular its pseudo-inverse is taken: directions that no input has get no update.
    """
    layers = [name for name in vectors[0] if any(name in one for one in statistics)]
    for name in layers:
        if len(vectors[0][name].shape) != 2:
            raise ValueError(f"the statistics have a matrix for {name!r}, which is no layer's 2-D weight")
    sides = {name: vectors[0][name].shape[1] for name in layers if vectors[0][name].numel()}
    _require_statistics(statistics, {name: (side, side) for name, side in sides.items()}, Tensor.diagonal)
    merged: dict[str, Delta] = {}
    for name, delta in vectors[0].items():
        if name not in sides:
            merged[name] = scaled_sum([v[name] for v in vectors], 1 / len(vectors))
            continue
        given = [one[name] for one in statistics]
        shrunk: list[Tensor] = []
        for gram in (one.to(delta.device, torch.float64) for one in given):
            shrunk.append(off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal()))
        zero = torch.zeros((), dtype=torch.float64, device=delta.device)
        pulled = sum((dense(v[name], torch.float64) @ gram for v, gram in zip(vectors, shrunk, strict=True)), zero)
        eps = max(torch.finfo(torch.promote_types(one.dtype, torch.float32)).eps for one in given)
        merged[name] = _divided(pulled, sum(shrunk, zero), eps).to(promoted_dtype(v[name] for v in vectors))
    return TaskVector(merged)


def _require_statistics(
    statistics: Sequence[Mapping[str, Tensor]],
    shapes: Mapping[str, Sequence[int]],
    positive: Callable[[Tensor], Tensor] = lambda values: values,
) -> None:
    """Raises ValueError unless every task's have these shapes, are finite, and the part `positive` is not negative."""
    for number, one in enumerate(statistics):
        for name, shape in shapes.items():
            what = f"the statistics of vector {number} for {name!r}"
            if name not in one or tuple(one[name].shape) != tuple(shape):
                found = tuple(one[name].shape) if name in one else "nothing"
                raise ValueError(f"{what} must be of shape {tuple(shape)}, got {found}")
            if not is_finite(one[name]):
                raise ValueError(f"{what} have NaN or infinite values")
            if one[name].numel() and positive(one[name]).amin() < 0:
                raise ValueError(f"{what} have negative values")


def _divided(matrix: Tensor, gram: Tensor, eps: float) -> Tensor:
    """matrix · gram⁻¹ for a symmetric gram; by its pseudo-inverse where it is singular to within rounding, `eps`."""
    factor, fault = torch.linalg.cholesky_ex(gram)
    least = len(gram) * eps  # of the largest eigenvalue; a small pivot alone costs time, not exactness
    if fault or factor.diagonal().square().amin() <= 100 * least * gram.diagonal().amax():
        return matrix @ torch.linalg.pinv(gram, rtol=least, hermitian=True)
    return torch.cholesky_solve(matrix.T, factor).T


def _scaled_sum(vectors: Sequence[TaskVector], scale: float) -> TaskVector:
    return TaskVector({name: scaled_sum([v[name] for v in vectors], scale) for name in vectors[0]})


def _in_dtype_of(vectors: Sequence[TaskVector], merged: Mapping[str, Delta]) -> TaskVector:
    """Each parameter in the dtype that its deltas have together: the one rounding, at the end."""
    return TaskVector({name: delta.to(promoted_dtype(v[name] for v in vectors)) for name, delta in merged.items()})
