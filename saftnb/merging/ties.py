"""TIES-merging: trim, elect sign, disjoint merge (Yadav et al. 2023, arXiv 2306.01708, §3), without the sort.

With d entries per task vector over *all* parameters (rules of the released KnOTS code, arXiv 2410.19735):

1. Trim: per task, threshold = the k-th smallest |x|, k = d − int(d · keep). Entries with |x| ≥ threshold
   stay: int(d · keep) + 1 of them, and all that tie with the last. keep = 1 trims nothing.
2. Elect: per entry, γ = sign Σ_t x_t over the trimmed values. Where the sum is zero, γ is the majority sign,
   sign Σ_entries γ, and −1 if that is zero too: the paper is silent, and in the released code of TIES and of KnOTS
   an entry without a positive sign takes the negative values.
3. Merge: per entry, the mean (or sum) of the nonzero survivors whose sign is γ; 0 if there are none. Times λ.

The sign of a sum is that of the exact sum, wherever float32 could get it wrong decided in float64 from sorted
values: the order of the tasks does not decide signs, and x + y − (x + y) is the zero that rule 2 means.

Memory and time: a sample tells where to look for the threshold, one counting pass finds it; all else happens
span by span in scratch buffers that fit a cache. Needs the result and some 20 MiB for each worker thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saftnb.merging.deltas import promoted_dtype
from saftnb.merging.spans import Span, cut_into_spans, in_parallel, read, workers_for
from saftnb.task_vector import TaskVector

SPAN = {"cpu": 2**17, "cuda": 2**22}
SAMPLE = 2**19  # entries of one vector
GROUP = 16  # entries that the search for candidates looks at together
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def trim_elect_merge(
    vectors: Sequence[TaskVector], *, keep: float, scale: float, aggregate: str, span: int | None = None
) -> TaskVector:
    """The three rules above, over n task vectors of equal names and shapes on one device, finite throughout.

    Computes in float32, or float64 if any delta is; each result has its parameter's promoted dtype.
    `span`, the entries of one vector that are looked at together, decides the speed only.
    """
    first = vectors[0]
    if first.numel() == 0:
        return first.dense()
    device = next(iter(first.values())).device
    dtype = promoted_dtype((delta for v in vectors for delta in v.values()), at_least=torch.float32)
    spans = cut_into_spans(vectors, span or SPAN.get(device.type, 2**22))
    workers = workers_for(vectors)
    cuts = _cuts(vectors, keep, spans, dtype, workers)
    merged: dict[str, Tensor] = {}
    for name, delta in first.items():
        merged[name] = torch.empty(delta.shape, dtype=promoted_dtype(v[name] for v in vectors), device=device)

    def fill(todo: Iterator[Span], majority: int) -> tuple[int, list[Span]]:
        """Writes the merged values of these spans; returns Σ γ there and the spans that hold a zero sum."""
        balance = 0
        undecided: list[Span] = []
        scratch = torch.empty(2, len(vectors), max(map(len, spans)), dtype=dtype, device=device)
        for piece in todo:
            values, elected, zeros = _merge_span(vectors, cuts, piece, majority, aggregate, scratch)
            merged[piece.name].view(-1)[piece.start : piece.stop] = values.mul_(scale)
            balance += elected
            undecided += [piece] if zeros else []
        return balance, undecided

    shares = in_parallel(lambda todo: fill(todo, majority=1), spans, workers)
    if sum(balance for balance, _ in shares) <= 0:  # zero sums were taken for +: do their spans again
        in_parallel(lambda todo: fill(todo, majority=-1), [s for _, found in shares for s in found], workers)
    return TaskVector(merged)


@dataclass(frozen=True)
class Election:
    """What TIES has to know of all entries before it can merge one parameter alone.

    Attributes:
        cuts: per task, the number just below its threshold. majority: the sign that a zero sum gets.
    """

    cuts: tuple[float, ...]
    majority: int


def hold_election(
    vectors: Sequence[TaskVector], spans: Sequence[Span], *, keep: float, dtype: torch.dtype = torch.float32,
    workers: int = 1,
) -> Election:  # fmt: skip
    """The first two rules over all entries, for vectors that are read from a disk: `merge_piece` does the third.

    Args:
        spans: of all parameters, see `cut_into_spans`.
    """
    cuts = tuple(_cuts(vectors, keep, spans, dtype, workers))
    unsure = Election(cuts, 1)
    balance = sum(_merge_piece(vectors, unsure, span, "mean", dtype)[1] for span in spans)
    return Election(cuts, 1 if balance > 0 else -1)


def merge_piece(
    vectors: Sequence[TaskVector], election: Election, span: Span, *, scale: float, aggregate: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """The merged entries of one span, (len(span),)."""
    return _merge_piece(vectors, election, span, aggregate, dtype)[0].mul_(scale)


def _merge_piece(
    vectors: Sequence[TaskVector], election: Election, span: Span, aggregate: str, dtype: torch.dtype
) -> tuple[Tensor, int, int]:
    scratch = torch.empty(2, len(vectors), len(span), dtype=dtype)
    return _merge_span(vectors, election.cuts, span, election.majority, aggregate, scratch)


def _merge_span(
    vectors: Sequence[TaskVector],
    cuts: Sequence[float],
    span: Span,
    majority: int,
    aggregate: str,
    scratch: Tensor,
) -> tuple[Tensor, int, int]:
    """The merged values of one span before λ, Σ γ without the zero sums, and how many zero sums."""
    size = len(vectors) * len(span)
    trimmed, agreeing = (part.view(-1)[:size].view(-1, len(span)) for part in scratch)
    for vector, cut, row in zip(vectors, cuts, trimmed, strict=True):
        torch.hardshrink(read(vector, span, row.dtype), cut, out=row)  # x if |x| > cut else 0
    values, zeros = _elect(trimmed, agreeing, majority)
    elected = int(values.sign().sum(dtype=torch.float64)) - majority * zeros
    if aggregate == "mean":
        values.div_(agreeing.sign_().sum(0).abs_().clamp_min_(1))
    return values, elected, zeros


def _cuts(
    vectors: Sequence[TaskVector], keep: float, spans: Sequence[Span], dtype: torch.dtype, workers: int
) -> list[float]:
    """Per task, the number just below its threshold: |x| > cut means |x| ≥ threshold. keep = 1: below 0."""
    entries = vectors[0].numel()
    k = entries - int(entries * keep)

    def thresholds(todo: Iterator[int]) -> dict[int, float]:
        return {i: kth_magnitude(vectors[i], k, spans, dtype) if keep < 1 else 0.0 for i in todo}

    found: dict[int, float] = {}
    for share in in_parallel(thresholds, range(len(vectors)), workers):
        found |= share
    values = torch.tensor([found[i] for i in range(len(vectors))], dtype=dtype)
    return torch.nextafter(values, torch.tensor(-torch.inf, dtype=dtype)).tolist()


def _elect(trimmed: Tensor, agreeing: Tensor, majority: int) -> tuple[Tensor, int]:
    """Per column of `trimmed` (n, m) the sum (m,) of the entries with the elected sign; how many zero sums.

    Fills `agreeing` (n, m) with those entries, 0 elsewhere: x clamped to [0, ∞) or (−∞, 0].
    """
    total = trimmed.sum(0)
    infinite = torch.copysign(torch.tensor(torch.inf, dtype=total.dtype), total)
    torch.clamp(trimmed, infinite.clamp(max=0), infinite.clamp(min=0), out=agreeing)
    merged = agreeing.sum(0)
    # |error of total| ≤ n ε/2 · Σ|x| ≤ n ε · |merged| where its sign can be wrong; twice that, to be safe
    certainty = 1 / (2 * len(trimmed) * torch.finfo(trimmed.dtype).eps)
    margin = total.abs_().mul_(certainty).sub_(merged.abs())
    if margin.amin() >= 0:
        return merged, 0
    doubtful = torch.nonzero(margin < 0).flatten()
    columns = trimmed[:, doubtful]
    exact = _exact_sign(columns)
    zeros = exact == 0
    sign = torch.where(zeros, majority, exact).to(trimmed.dtype)
    columns = (columns * sign).clamp_(min=0) * sign
    agreeing[:, doubtful] = columns
    merged[doubtful] = columns.sum(0)
    return merged, int(zeros.sum())


def _exact_sign(columns: Tensor) -> Tensor:
    """sign Σ_t x_t per column (n, m), in float64: positives and negatives each summed from the smallest."""
    ordered = columns.double().sort(0).values
    return torch.sign(ordered.clamp(min=0).sum(0) - ordered.flip(0).neg_().clamp_(min=0).sum(0))


def kth_magnitude(vector: TaskVector, k: int, spans: Sequence[Span], dtype: torch.dtype) -> float:
    """The k-th smallest |x| (from 1) over all entries, exactly: `torch.kthvalue` without copy and long wait.

    A sample says between which two values it is all but sure to lie, with some 0.5 % of the entries. One pass
    counts the entries below them and collects those between. Where the sample misled, bisection goes on:
    non-negative floats are in the order of their bits, so it must end.
    """
    total = vector.numel()
    enough = max(total // 16, SAMPLE)  # entries that may be collected
    first, last = 0, _bits(torch.finfo(dtype).max, dtype)  # the answer is one of these, by their bits,
    under, upto = 0, total  # with so many entries below the first, and so many up to the last
    low, high = _bracket(vector, k, spans, dtype)
    while True:
        below, within, collected = _census(vector, spans, dtype, low, high, enough)
        if k <= below:
            last, upto = _bits(low, dtype) - 1, below
        elif k > below + within:
            first, under = _bits(high, dtype) + 1, below + within
        elif low == high:
            return low
        elif collected is not None:
            return torch.kthvalue(collected, k - below).values.item()
        else:
            first, last, under, upto = _bits(low, dtype), _bits(high, dtype), below, below + within
        until = last if upto - under <= enough else (first + last) // 2
        ends: list[float] = torch.tensor([first, until], dtype=BITS[dtype]).view(dtype).tolist()
        low, high = ends


def _bits(value: float, dtype: torch.dtype) -> int:
    return int(torch.tensor(value, dtype=dtype).view(BITS[dtype]))


def _bracket(vector: TaskVector, k: int, spans: Sequence[Span], dtype: torch.dtype) -> tuple[float, float]:
    """The values of a sample four standard errors of a rank below and above its own k-th magnitude."""
    step = max(1, vector.numel() // SAMPLE)
    sample = torch.cat([read(vector, span, dtype)[::step].clone() for span in spans]).abs_()  # a view keeps it all
    share, size = k / vector.numel(), len(sample)
    error = 4 * (share * (1 - share) / size) ** 0.5 + 1 / size
    ranks = [min(max(round(size * s), 1), size) for s in (share - error, share + error)]
    low, high = (float(torch.kthvalue(sample, rank).values) for rank in ranks)
    return low, high


def _census(
    vector: TaskVector, spans: Sequence[Span], dtype: torch.dtype, low: float, high: float, enough: int
) -> tuple[int, int, Tensor | None]:
    """How many |x| are below low, how many from low to high; and the latter, if no more than enough.

    Whether any of GROUP entries is among them is cheap to see; only such groups are looked at one by one.
    """
    device = next(iter(vector.values())).device
    scratch = torch.empty(3, max(map(len, spans)), dtype=dtype, device=device)
    below = within = 0
    collected = [scratch[0, :0]]
    for span in spans:
        magnitudes, under, over = scratch[:, : len(span)]
        torch.abs(read(vector, span, dtype), out=magnitudes)
        torch.lt(magnitudes, low, out=under)  # marks of 0.0 or 1.0: far faster than bool
        torch.gt(magnitudes, high, out=over)
        lower, higher = map(int, scratch[1:, : len(span)].sum(1).tolist())
        below += lower
        within += len(span) - lower - higher
        if within > enough:
            collected.clear()
            continue
        grouped = (GROUP if len(span) % GROUP == 0 else 1, -1)
        groups = torch.nonzero(under.add_(over).view(grouped).amin(0) == 0).flatten()
        close = magnitudes.view(grouped).index_select(1, groups).flatten()
        collected.append(close[close == close.clamp(low, high)])
    return below, within, torch.cat(collected) if within <= enough else None
