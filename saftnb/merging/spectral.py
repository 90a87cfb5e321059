"""Merge methods that work on singular vectors: Iso-C, Iso-CTS and TSV-M, a matrix at a time.

Which parameters are matrices is their authors' rule: the 2-D ones other than the text tower's projection, so position
embeddings and the image tower's projection are. Every other parameter (biases, norms, the patch convolution) is λ times
the MEAN of the task vectors.

Only the directions of the numerical rank take part: singular values above ε · max(O, I) times the largest, ε being
float32's (float64's for float64 deltas). A LoRA update of rank r has r of them; the others are rounding, and a merged
model that used them would depend on how B A was factored and on the order of the tasks. The authors' dense code has no
such rule. For deltas whose smallest singular value is above that there is no difference.

Every merge space keeps lengths and angles (KnOTS's above its cutoff), so these methods give the same in all of them:
O and I below are the weight's own sides, whatever the space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from saftnb.delta import Delta, LowRank, frobenius_norm
from saftnb.merging.deltas import promoted_dtype, scaled_sum
from saftnb.merging.registry import Range, method
from saftnb.task_vector import TaskVector

Shapes = Mapping[str, Sequence[int]]


class Svd(NamedTuple):
    """U (O, k), σ (k,), V (I, k): the k directions of the numerical rank, largest first."""

    u: Tensor
    values: Tensor
    v: Tensor

    def first(self, count: int) -> Svd:
        return Svd(self.u[:, :count], self.values[:count], self.v[:, :count])


@method
def iso_c(vectors: Sequence[TaskVector], shapes: Shapes, *, scale: Annotated[float, Range()] = 1.0) -> TaskVector:
    """λ σ̄ U Vᵀ of Σ Δ_t = U Σ Vᵀ: every direction gets the mean singular value (Marczak et al. 2025, arXiv 2502.04959).

    σ̄ is the mean over the directions of the numerical rank; the authors' dense code divides by min(O, I), so for an
    update of low rank their σ̄ is smaller by the share of directions that it has.
    """

    def flattened(deltas: Sequence[Delta], shape: Sequence[int]) -> LowRank:
        common = _svd_of_sum(deltas, shape)
        return LowRank(scale * _mean(common.values) * common.u, common.v.T)

    return _by_matrix(vectors, shapes, flattened, scale)


@method
def iso_cts(
    vectors: Sequence[TaskVector],
    shapes: Shapes,
    *,
    common: Annotated[float, Range(0, 1)] = 0.8,
    scale: Annotated[float, Range()] = 1.0,
) -> TaskVector:
    """Iso-C with directions of each task's own (Marczak et al. 2025, arXiv 2502.04959, the stronger variant).

    Of min(O, I) directions the first c = `common` · min(O, I) of Σ Δ_t are kept, c rounded so that the rest divides by
    n. The rest are each task's first ones of Δ_t − U_c U_cᵀ Δ_t. All side by side are made orthogonal, as in `tsv_m`,
    and each gets the mean of their singular values. Where no Δ_t leaves the span of U_c this is Iso-C: so with LoRA
    updates of independent factors whose ranks add up to no more than c.
    """

    def combined(deltas: Sequence[Delta], shape: Sequence[int]) -> LowRank:
        each = min(min(shape) // len(deltas), round((min(shape) - int(min(shape) * common)) / len(deltas)))
        parts = [_svd_of_sum(deltas, shape).first(min(shape) - each * len(deltas))]
        for delta in deltas:
            parts.append(_svd(_without(delta, parts[0].u), delta.dtype, deltas, shape, [delta]).first(each))
        left, right = (_nearest_orthogonal([getattr(part, side) for part in parts], shape) for side in "uv")
        return LowRank(scale * _mean(torch.cat([part.values for part in parts])) * left, right.T)

    return _by_matrix(vectors, shapes, combined, scale)


@method
def tsv_m(vectors: Sequence[TaskVector], shapes: Shapes, *, scale: Annotated[float, Range()] = 1.0) -> TaskVector:
    """λ U⊥ blockdiag(Σ_t) V⊥ᵀ: the leading singular vectors of all tasks, made orthogonal (Gargiulo et al. 2025,
    arXiv 2412.00081).

    Each Δ_t = U_t Σ_t V_tᵀ is cut to its first min(O, I)/n components (rounded down, one at least);
    U = [U_1 … U_n] = P D Qᵀ becomes U⊥ = P Qᵀ, the nearest orthogonal matrix, and V likewise.
    """

    def combined(deltas: Sequence[Delta], shape: Sequence[int]) -> LowRank:
        count = max(1, min(shape) // len(deltas))
        parts = [_svd(delta, delta.dtype, deltas, shape).first(count) for delta in deltas]
        left, right = (_nearest_orthogonal([getattr(part, side) for part in parts], shape) for side in "uv")
        return LowRank(scale * torch.cat([part.values for part in parts]) * left, right.T)

    return _by_matrix(vectors, shapes, combined, scale)


def _by_matrix(
    vectors: Sequence[TaskVector], shapes: Shapes, combine: Callable[[Sequence[Delta], Sequence[int]], LowRank],
    scale: float,
) -> TaskVector:  # fmt: skip
    """`combine` on every matrix, λ times the mean on the others. Low-rank where every delta is, else dense."""
    merged: dict[str, Delta] = {}
    for name, first in vectors[0].items():
        deltas = [vector[name] for vector in vectors]
        if len(first.shape) != 2 or not first.numel() or "text_projection" in name:
            merged[name] = scaled_sum(deltas, scale / len(deltas))
            continue
        found = combine(deltas, shapes[name])
        low = all(isinstance(delta, LowRank) for delta in deltas)
        merged[name] = (found if low else found.dense()).to(promoted_dtype(deltas))
    return TaskVector(merged)


def _svd(
    delta: Delta, dtype: torch.dtype, layer: Sequence[Delta], shape: Sequence[int], source: Sequence[Delta] = ()
) -> Svd:
    """The SVD of a delta, cut to its numerical rank. From the factors, where there are any: B = Q_b R_b and
    Aᵀ = Q_a R_a leave the SVD of the small R_b R_aᵀ, in float64.

    Rounding is what lies below one of these: ε(dtype) · max(O, I) · σ_1 (NumPy's `matrix_rank`); that of the arithmetic
    itself, in float64 for factors, beside the largest delta of the layer (one that is 0 has noise alone); and, of a
    difference or sum, the rounding of the `source` that it comes from.
    """
    largest, fine = max(frobenius_norm(other) for other in layer), _tolerance(torch.float64, shape)
    least = fine * largest
    if isinstance(delta, LowRank):
        (left, upper), (right, lower) = (torch.linalg.qr(factor.double()) for factor in (delta.B, delta.A.T))
        u, values, vt = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        u, v = left @ u, right @ vt.T
        least = max(least, fine * float(upper.norm() * lower.norm()))
    else:
        u, values, vt = torch.linalg.svd(delta.to(promoted_dtype([delta], torch.float32)), full_matrices=False)
        v = vt.T
    least = max([least] + [_tolerance(dtype, shape) * frobenius_norm(one) for one in source])
    kept = (values > least) & (values > _tolerance(dtype, shape) * values[:1])
    return Svd(u, values, v).first(int(kept.sum()))


def _svd_of_sum(deltas: Sequence[Delta], shape: Sequence[int]) -> Svd:
    wide = promoted_dtype(deltas, torch.float32)
    return _svd(scaled_sum([delta.to(wide) for delta in deltas], 1.0), promoted_dtype(deltas), deltas, shape)


def _nearest_orthogonal(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """P Qᵀ of [U_1 … U_n] = P D Qᵀ, on the directions that the U_t span: where they share some, D has zeros, and what
    P and Q have there is arbitrary."""
    p, values, qt = torch.linalg.svd(torch.cat(list(parts), dim=1), full_matrices=False)
    kept = values > _tolerance(torch.float32, shape) * values[:1]
    return p[:, kept] @ qt[kept]


def _without(delta: Delta, basis: Tensor) -> Delta:
    """Δ − U Uᵀ Δ."""
    if isinstance(delta, LowRank):
        factor = delta.B.to(basis.dtype)
        return LowRank(factor - basis @ (basis.T @ factor), delta.A.to(basis.dtype))
    dense = delta.to(basis.dtype)
    return dense - basis @ (basis.T @ dense)


def _tolerance(dtype: torch.dtype, shape: Sequence[int]) -> float:
    """ε · max(O, I), as in NumPy's `matrix_rank`, of float32 at least: half precision is computed in it."""
    return max(shape) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def _mean(values: Tensor) -> Tensor:
    return values.mean() if len(values) else values.sum()
