"""TIES-merging: trim, elect sign, disjoint merge (Yadav et al. 2023, arXiv 2306.01708, §3), without the sort.

With d entries per task vector over *all* parameters (rules of the released KnOTS code, arXiv 2410.19735):

1. Trim: per task, threshold = the k-th smallest |x|, k = d − int(d · keep); entries with |x| ≥ threshold stay,
   int(d · keep) + 1 of them and all that tie with the last. keep = 1 trims nothing.
2. Elect: per entry, γ = sign Σ_t x_t over the trimmed values. Where the sum is zero, γ is the majority sign,
   sign Σ_entries γ, and +1 if that is zero too.
3. Merge: per entry, the mean (or sum) of the nonzero survivors whose sign is γ; 0 if there are none. Times λ.

The sign of a sum is that of the exact sum, wherever float32 could get it wrong decided in float64 from sorted
values: the order of the tasks does not decide signs, and x + y − (x + y) is the zero that rule 2 means.

Memory and time. Thresholds come from a radix selection: the bits of |x|, read as an integer, are in the order of
the magnitudes, so a histogram of their upper 16 bits finds the k-th's bucket, and one of the next 16 bits within
the bucket finds the k-th itself. Everything then happens span by span in small scratch buffers that fit a cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from saftnb.task_vector import Delta, LowRank, TaskVector, promoted_dtype

CPU_SPAN = 2**17  # entries of one vector at a time
CUDA_SPAN = 2**22
MAX_WORKERS = 16
PARALLEL_FROM = 2**20  # entries: below, starting threads costs more than it saves
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Span:
    """The entries `start` to `stop` of one parameter, flattened."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def trim_elect_merge(
    vectors: Sequence[TaskVector],
    *,
    keep: float,
    scale: float,
    aggregate: str,
    span_length: int | None = None,
) -> TaskVector:
    """The three rules above, over n task vectors of equal names and shapes on one device, finite throughout.

    Computes in float32, or float64 if any delta is; each result has its parameter's promoted dtype. Needs the
    result and some 10 MiB for each worker thread. `span_length` changes the speed only.
    """
    names, device = list(vectors[0]), _device(vectors)
    dtype = promoted_dtype((v[name] for v in vectors for name in names), at_least=torch.float32)
    spans = _spans(vectors, span_length or (CPU_SPAN if device.type == "cpu" else CUDA_SPAN))
    entries = vectors[0].numel()
    k = entries - int(entries * keep)
    cuts = [just_below(kth_magnitude(v, k, spans, dtype), dtype) if keep < 1 else None for v in vectors]
    merged = {
        name: torch.empty(vectors[0][name].shape, dtype=promoted_dtype([v[name] for v in vectors]), device=device)
        for name in names
    }

    def run(todo: Iterable[Span], majority: int) -> tuple[int, list[Span]]:
        """Fills `merged` on these spans; returns Σ γ there and the spans where a sum was zero."""
        balance, undecided = 0, []
        scratch = torch.empty(2, len(vectors) * max(map(len, spans)), dtype=dtype, device=device)
        for span in todo:
            trimmed, agreeing = (s[: len(vectors) * len(span)].view(-1, len(span)) for s in scratch)
            for row, vector, cut in zip(trimmed, vectors, cuts):
                _trim(_read(vector, span, dtype), cut, out=row)
            values, ties = _elect_and_merge(trimmed, agreeing, majority)
            balance += int(values.sign().sum(dtype=torch.float64)) - majority * ties
            undecided += [span] * bool(ties)
            if aggregate == "mean":
                values.div_(agreeing.sign_().sum(0).abs_().clamp_min_(1))
            merged[span.name].view(-1)[span.start : span.stop] = values.mul_(scale)
        return balance, undecided

    shares = _in_parallel(lambda todo: run(todo, majority=1), spans, device)
    if sum(balance for balance, _ in shares) < 0:  # the zero sums were taken for +1: do those spans again
        _in_parallel(lambda todo: run(todo, majority=-1), [s for _, found in shares for s in found], device)
    return TaskVector(merged)


def _trim(values: Tensor, cut: float | None, out: Tensor) -> None:
    """x if |x| > cut else 0, in one pass."""
    if cut is None:
        out.copy_(values)
    else:
        torch.ops.aten.hardshrink.out(values, cut, out=out)


def _elect_and_merge(trimmed: Tensor, agreeing: Tensor, majority: int) -> tuple[Tensor, int]:
    """Per column of `trimmed` (n, m), the sum (m,) of the entries with the elected sign, and how many zero sums.

    Fills `agreeing` (n, m) with those entries, 0 elsewhere: x clamped to [0, ∞) or (−∞, 0].
    """
    total = trimmed.sum(0)
    up = total >= 0
    lowest, highest = torch.where(up, 0.0, -torch.inf), torch.where(up, torch.inf, 0.0)
    torch.clamp(trimmed, lowest.to(trimmed), highest.to(trimmed), out=agreeing)
    merged = agreeing.sum(0)
    # |error of total| ≤ n ε/2 · Σ|x| ≤ n ε · |merged| where the sign can be wrong (twice that, to be safe)
    certainty = 1 / (2 * len(trimmed) * torch.finfo(trimmed.dtype).eps)
    doubtful = torch.nonzero(total.abs_().mul_(certainty) < merged.abs()).flatten()
    if not len(doubtful):
        return merged, 0
    columns = trimmed[:, doubtful]
    exact = _exact_sign(columns)
    ties = exact == 0
    sign = torch.where(ties, majority, exact).to(trimmed.dtype)
    agreeing[:, doubtful] = columns = (columns * sign).clamp_(min=0) * sign
    merged[doubtful] = columns.sum(0)
    return merged, int(ties.sum())


def _exact_sign(columns: Tensor) -> Tensor:
    """sign Σ_t x_t per column (n, m), in float64: positive and negative part, each summed from its smallest."""
    ordered = columns.double().sort(0).values
    return torch.sign(ordered.clamp(min=0).sum(0) - ordered.flip(0).neg_().clamp_(min=0).sum(0))


def kth_magnitude(vector: TaskVector, k: int, spans: Sequence[Span], dtype: torch.dtype) -> float:
    """The k-th smallest |x| (from 1) over all entries, exactly: what `torch.kthvalue` finds with a copy and a sort.

    Radix selection, 16 bits at a time from the top: `found` is the upper bits of the answer so far.
    """
    whole = BITS[dtype]
    bits = torch.iinfo(whole).bits
    found = 0
    for shift in range(bits - 16, -1, -16):

        def histogram(todo: Iterable[Span], shift: int = shift, found: int = found) -> Tensor:
            counts = torch.zeros(2**16, dtype=torch.int64, device=_device([vector]))
            for span in todo:
                upper = _read(vector, span, dtype).abs().view(whole) >> shift
                digits = upper[(upper >> 16) == found] & 0xFFFF if shift + 16 < bits else upper
                some = torch.bincount(digits)
                counts[: len(some)] += some
            return counts

        running = sum(_in_parallel(histogram, spans, _device([vector]))).cumsum(0)
        digit = int(torch.searchsorted(running, k))
        k -= int(running[digit - 1]) if digit else 0
        found = found << 16 | digit
    return torch.tensor(found, dtype=whole).view(dtype).item()


def just_below(threshold: float, dtype: torch.dtype) -> float:
    """The next number down, so that |x| > it means |x| ≥ threshold."""
    return torch.nextafter(torch.tensor(threshold, dtype=dtype), torch.tensor(-torch.inf, dtype=dtype)).item()


def _spans(vectors: Sequence[TaskVector], length: int) -> list[Span]:
    """All parameters cut into pieces of about `length`: of whole rows where a delta is low-rank or strided."""
    spans = []
    for name, delta in vectors[0].items():
        step = length
        if not all(_is_flat(vector[name]) for vector in vectors):
            row = max(1, delta.numel() // max(1, delta.shape[0]))
            step = max(1, length // row) * row
        size = delta.numel()
        spans += [Span(name, start, min(start + step, size)) for start in range(0, size, step)]
    return spans


def _is_flat(delta: Delta) -> bool:
    return not isinstance(delta, LowRank) and delta.is_contiguous()


def _read(vector: TaskVector, span: Span, dtype: torch.dtype) -> Tensor:
    """One task's entries of a span, (len(span),): a view of them where the dtype is right."""
    delta = vector[span.name]
    if _is_flat(delta):
        return delta.view(-1)[span.start : span.stop].to(dtype)
    row = delta.numel() // delta.shape[0]
    rows = slice(span.start // row, span.stop // row)
    if isinstance(delta, LowRank):
        return (delta.B[rows].to(dtype) @ delta.A.to(dtype)).view(-1)
    return delta[rows].reshape(-1).to(dtype)


def _device(vectors: Sequence[TaskVector]) -> torch.device:
    return next((delta.device for delta in vectors[0].values()), torch.device("cpu"))


def _in_parallel(work: Callable[[Iterator[Span]], object], spans: Sequence[Span], device: torch.device) -> list:
    """What `work` returns for shares of the spans, one per core, each single-threaded on spans of its own.

    PyTorch's own threads would meet after each of the many short operations: slower than this on an idle
    machine, and slower by far on a busy one.
    """
    workers = min(torch.get_num_threads(), MAX_WORKERS) if device.type == "cpu" else 1
    todo = deque(spans)

    def share() -> Iterator[Span]:
        while True:
            try:
                yield todo.popleft()
            except IndexError:
                return

    def alone(_: int) -> object:
        torch.set_num_threads(1)  # of this thread
        return work(share())

    if workers == 1 or sum(map(len, spans)) < PARALLEL_FROM:
        return [work(share())]
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(alone, range(workers)))
    finally:
        torch.set_num_threads(threads)  # workers have set the default of threads to come, too
