"""Task vectors in pieces: what lets a method run over models larger than its scratch memory, on all cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from saftnb.delta import is_finite
from saftnb.task_vector import Delta, LowRank, TaskVector

MAX_WORKERS = 16
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Span:
    """The entries `start` to `stop` of one parameter, flattened."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def cut_into_spans(vectors: Sequence[TaskVector], length: int) -> list[Span]:
    """All parameters in pieces of about `length`: of whole rows where a delta is low-rank or strided."""
    spans: list[Span] = []
    for name, delta in vectors[0].items():
        size, step = delta.numel(), length
        if not all(_is_flat(vector[name]) for vector in vectors):
            row = max(1, size // max(1, delta.shape[0]))
            step = max(1, length // row) * row
        spans += [Span(name, start, min(start + step, size)) for start in range(0, size, step)]
    return spans


def read(vector: TaskVector, span: Span, dtype: torch.dtype) -> Tensor:
    """One task's entries of a span, (len(span),): a view of them where the dtype is right."""
    delta = vector[span.name]
    if _is_flat(delta):
        return delta.view(-1)[span.start : span.stop].to(dtype)
    row = delta.numel() // delta.shape[0]
    rows = slice(span.start // row, span.stop // row)
    if isinstance(delta, LowRank):
        return (delta.B[rows].to(dtype) @ delta.A.to(dtype)).view(-1)
    return delta[rows].reshape(-1).to(dtype)


def first_not_finite(vectors: Sequence[TaskVector]) -> tuple[int, str] | None:
    """Which vector, and which of its parameters, is the first to hold a NaN or an infinity, if any does."""
    places = [(i, name) for i, vector in enumerate(vectors) for name in vector]

    def bad(share: Iterator[int]) -> list[int]:
        return [at for at in share if not is_finite(vectors[places[at][0]][places[at][1]])]

    shares = in_parallel(bad, range(len(places)), workers_for(vectors))
    return places[min(found)] if (found := [at for share in shares for at in share]) else None


def in_parallel(work: Callable[[Iterator[Item]], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """What `work` returns for shares of the items, one share per worker, each worker a thread of its own.

    Inside a worker PyTorch is single-threaded. Its own threads would have to meet at the end of each of many
    short operations: somewhat slower than this on an idle machine, and slower by far on a busy one.
    """
    todo = deque(items)

    def share() -> Iterator[Item]:
        while todo:
            try:
                yield todo.popleft()
            except IndexError:  # another worker took the last one
                return

    def alone(_: int) -> Result:
        torch.set_num_threads(1)  # of this thread, and of threads to come
        return work(share())

    if workers == 1:
        return [work(share())]
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(alone, range(workers)))
    finally:
        torch.set_num_threads(threads)


def workers_for(vectors: Sequence[TaskVector]) -> int:
    """How many threads are worth starting: 1 for little work, or on a GPU, which is parallel in itself."""
    on_cpu = all(delta.device.type == "cpu" for delta in vectors[0].values())
    large = sum(vector.numel() for vector in vectors) >= 2**20
    return min(torch.get_num_threads(), MAX_WORKERS) if on_cpu and large else 1


def _is_flat(delta: Delta) -> TypeGuard[Tensor]:
    return not isinstance(delta, LowRank) and delta.is_contiguous()
