"""DARE: entries of a task vector dropped at random (Yu et al. 2024, arXiv 2311.03099).

Each entry stays with probability 1 − drop and is divided by 1 − drop. It is drawn on the CPU, by a generator of its own
for each task and parameter by parameter, so that every device drops the same entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from saftnb.delta import Delta, LowRank, dense
from saftnb.merging.deltas import promoted_dtype
from saftnb.task_vector import TaskVector

LARGE = 2**20  # entries of a low-rank delta above which it is thinned row by row


def generators(count: int, seed: int) -> list[torch.Generator]:
    """One for each task."""
    return [torch.Generator().manual_seed(seed * 10_007 + number) for number in range(count)]


def thinned(delta: Delta, drop: float, generator: torch.Generator) -> Tensor:
    """The delta, dense and in float32 at least, without the dropped entries."""
    kept = torch.rand(delta.shape, generator=generator) >= drop
    values = dense(delta, promoted_dtype([delta], at_least=torch.float32))
    return values * kept.to(delta.device) / (1 - drop)


class ThinnedVector(TaskVector):
    """A task vector after DARE, in float32 at least. Large low-rank deltas are formed only where they are read."""

    def __init__(self, vector: TaskVector, drop: float, generator: torch.Generator):
        self._deltas: dict[str, Delta] = {}
        for name, delta in vector.items():
            if isinstance(delta, LowRank) and delta.numel() > LARGE:
                rows = ThinnedRows(delta, drop, generator)
                self._deltas[name] = cast(Tensor, rows)  # all that `saftnb.merging.spans.read` asks of one
            else:
                self._deltas[name] = thinned(delta, drop, generator)


class ThinnedRows:
    """A low-rank delta after DARE, kept as its factors and a bit an entry: `self[rows]` are rows, dense."""

    def __init__(self, delta: LowRank, drop: float, generator: torch.Generator):
        self.shape, self.device, self._share = delta.shape, delta.device, 1 - drop
        self.dtype = promoted_dtype([delta], at_least=torch.float32)
        self._delta = delta.to(self.dtype)
        self._kept = np.packbits((torch.rand(delta.shape, generator=generator) >= drop).numpy(), axis=1)

    def numel(self) -> int:
        return self.shape.numel()

    def is_contiguous(self) -> bool:
        return False  # it is read by rows

    def __getitem__(self, rows: slice) -> Tensor:
        kept = np.unpackbits(self._kept[rows], axis=1, count=self.shape[1])
        return (self._delta.B[rows] @ self._delta.A).mul_(torch.from_numpy(kept).to(self.device)).div_(self._share)


def thinned_by_name(vectors: Sequence[TaskVector], drop: float, seed: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Each parameter with all tasks' thinned deltas of it: no more than one parameter's are in memory."""
    drawn = generators(len(vectors), seed)
    names: Mapping[str, Delta] = vectors[0]
    for name in names:
        yield name, [thinned(vector[name], drop, one) for vector, one in zip(vectors, drawn, strict=True)]
