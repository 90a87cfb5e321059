"""The merge methods, one formula each: τ₁ … τ_n are the task vectors, λ is `scale`.

Whatever takes λ is linear in it: merge(…, scale=s) is s · merge(…, scale=1). A search over λ therefore merges
once for each setting of the others and multiplies: `merged = merge(v, "ties", keep=0.2)`, then `s * merged`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch

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
