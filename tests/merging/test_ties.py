"""TIES against a reference that loops over numbers, and the exact rules one by one."""

from __future__ import annotations

import itertools
import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from saftnb.merging import LowRank, TaskVector, merge, spans
from saftnb.merging import ties as kernel  # the module: `saftnb.merging.averaging` holds the method
from saftnb.merging.ties import kth_magnitude, trim_elect_merge

quickly = settings(deadline=None, max_examples=40)


def reference(vectors: list[list[float]], keep: float, scale: float = 1.0, aggregate: str = "mean") -> list[float]:
    """TIES over flat lists, one rule a line; sums are exact (fsum)."""
    d = len(vectors[0])
    trimmed = []
    for x in vectors:
        threshold = sorted(map(abs, x))[d - int(d * keep) - 1] if keep < 1 else 0.0
        trimmed.append([value if abs(value) >= threshold else 0.0 for value in x])
    columns = list(zip(*trimmed, strict=True))
    signs = [int(np.sign(math.fsum(column))) for column in columns]
    majority = 1 if sum(signs) > 0 else -1
    merged = []
    for column, sign in zip(columns, signs, strict=True):
        agreeing = [value for value in column if value * (sign or majority) > 0]
        total = math.fsum(agreeing) / (len(agreeing) or 1) if aggregate == "mean" else math.fsum(agreeing)
        merged.append(scale * total)
    return merged


def one(values: list[float], dtype: torch.dtype = torch.float32) -> TaskVector:
    return TaskVector({"w": torch.tensor(values, dtype=dtype)})


def ties(*vectors: list[float], **hyperparameters: object) -> list[float]:
    return merge([one(v) for v in vectors], "ties", **hyperparameters)["w"].tolist()


# Whole numbers up to 2²⁴ fit a float32, their sums do not: signs would come out wrong in float32.
numbers = st.one_of(st.integers(-2, 2), st.integers(-(2**24), 2**24)).map(float)


@st.composite
def flat_vectors(draw, most: int = 6) -> list[list[float]]:
    size = draw(st.integers(1, 40))
    vectors = draw(st.lists(st.lists(numbers, min_size=size, max_size=size), min_size=1, max_size=most))
    if draw(st.booleans()):  # so that zero sums are many
        vectors.append([-x for x in vectors[0]])
    return vectors


@given(flat_vectors(), st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]), st.sampled_from(["mean", "sum"]))
@quickly
def test_ties_follows_the_rules(vectors: list[list[float]], keep: float, aggregate: str) -> None:
    expected = reference(vectors, keep, 0.5, aggregate)
    given_ = {"keep": keep, "scale": 0.5, "aggregate": aggregate}
    assert ties(*vectors, **given_) == pytest.approx(expected, rel=1e-6)
    double = merge([one(v, torch.float64) for v in vectors], "ties", **given_)
    assert double["w"].tolist() == pytest.approx(expected, rel=1e-14)


# the rules


def test_the_threshold_keeps_one_entry_more_than_its_share_and_all_that_tie() -> None:
    assert ties([1, 2, 3, 4, -5], keep=0.4) == [0, 0, 3, 4, -5]  # int(5 · 0.4) + 1
    assert ties([1, 2, 2, 2, -5], keep=0.2) == [0, 2, 2, 2, -5]
    assert ties([1, 2, 3], keep=0.01) == [0, 0, 3]
    assert ties([1, 2, 3], keep=0.999) == [1, 2, 3]
    assert ties([0, 0, 0, 1e-45], keep=0.5) == pytest.approx([0, 0, 0, 1e-45])
    assert ties([-1e-45, 0, 2], keep=1) == pytest.approx([-1e-45, 0, 2])


def test_each_task_has_its_own_threshold_over_all_parameters_together() -> None:
    large, small = [10.0, 20.0, 30.0, 40.0], [0.1, 0.2, 0.3, 0.4]
    vectors = [
        TaskVector({"a": torch.tensor(large), "b": torch.tensor(small)}),
        TaskVector({"a": torch.tensor(small), "b": torch.tensor(large)}),
    ]
    merged = merge(vectors, "ties", keep=0.25)
    assert merged["a"].tolist() == merged["b"].tolist() == [0, 20, 30, 40]  # three of eight, all large


def test_the_mean_is_over_the_survivors_that_agree() -> None:
    vectors = [5, 9], [1, 9], [-3, 9], [0, 9]
    assert ties(*vectors, keep=1) == [3, 9]
    assert ties(*vectors, keep=1, aggregate="sum") == [6, 36]
    assert ties(*vectors, keep=1, scale=-2) == [-6, -18]


@pytest.mark.parametrize(
    ("rest", "expected"), [([1.0, 1.0, -1.0], 3.0), ([1.0, -1.0, -1.0], -3.0), ([1.0, -1.0, 0.0], -3.0)]
)
def test_a_zero_sum_takes_the_majority_of_the_elected_signs(rest: list[float], expected: float) -> None:
    a, b = [3.0, 100.0 * rest[0], *rest[1:]], [-3.0, *rest]  # the size of the sums has no say
    assert ties(a, b, keep=1)[0] == expected
    assert reference([a, b], keep=1)[0] == expected


def test_a_zero_sum_of_unequal_numbers_of_tasks_takes_the_mean_of_the_majority() -> None:
    assert ties([5, -1, -1], [-3, -1, -1], [-2, -1, -1], keep=1) == [-2.5, -1, -1]
    assert ties([-5, 1, 1], [3, 1, 1], [2, 1, 1], keep=1) == [2.5, 1, 1]


def test_opposites_alone_take_the_negatives_as_in_the_released_code() -> None:
    assert ties([1, -2, 0], [-1, 2, 0], keep=1) == [-1, -2, 0]
    assert ties([0, 0], [0, 0], keep=1) == [0, 0]


@pytest.mark.parametrize("column", [[2.0**24, 1.0, -(2.0**24)], [2.0**24, 1.0, 1.0, 1.0, -(2.0**24) - 2]])
@pytest.mark.parametrize("sign", [1, -1])
def test_signs_are_those_of_exact_sums(column: list[float], sign: int) -> None:
    # exactly 1; in float32 less than that or none, by the order of the tasks: 2²⁴ + 1 is 2²⁴
    positive = [x for x in column if x > 0]
    for order in itertools.permutations(column):
        merged = ties(*[[sign * x, -sign, -sign] for x in order], keep=1)  # a majority for the other sign
        assert merged == pytest.approx([sign * sum(positive) / len(positive), -sign, -sign])


def test_tiny_numbers_have_signs_too() -> None:
    tiny = float(np.float32(1e-45))
    assert ties([tiny, -1, -1], [-tiny, -1, -1], keep=1) == [-tiny, -1, -1]


@given(flat_vectors(), st.sampled_from([0.2, 0.6, 1.0]))
@quickly
def test_negated_vectors_merge_to_the_negative_except_at_zero_sums(vectors: list[list[float]], keep: float) -> None:
    merged, negated = ties(*vectors, keep=keep), ties(*[[-x for x in v] for v in vectors], keep=keep)
    trimmed = [ties(v, keep=keep) for v in vectors]
    for m, n, column in zip(merged, negated, zip(*trimmed, strict=True), strict=True):
        if math.fsum(column):
            assert m == -n


# what must not matter


def _many(count: int = 4, size: int = 210) -> list[torch.Tensor]:
    """Multiples of 1/8 with many equals, whose sums are exact in any order."""
    g = torch.Generator().manual_seed(3)
    return [torch.randint(-20, 21, (size,), generator=g) / 8 for _ in range(count)]


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_names_shapes_and_strides_do_not_matter(keep: float) -> None:
    whole = merge([TaskVector({"w": x}) for x in _many()], "ties", keep=keep)["w"]
    split = merge(
        [TaskVector({"z": x[:6].view(2, 3), "a": x[6:7].view(()), "m": x[7:].view(7, 29)}) for x in _many()],
        "ties",
        keep=keep,
    )
    assert torch.equal(torch.cat([split["z"].flatten(), split["a"].view(1), split["m"].flatten()]), whole)
    matrices = [x.view(14, 15) for x in _many()]
    matrices[1::2] = [m.T.contiguous().T for m in matrices[1::2]]
    assert not matrices[1].is_contiguous()
    strided = [TaskVector({"w": m}) for m in matrices]
    assert torch.equal(merge(strided, "ties", keep=keep)["w"].flatten(), whole)


@pytest.mark.parametrize("length", [1, 7, 16, 64, 1000])
@pytest.mark.parametrize("low_rank", [False, True])
def test_the_length_of_the_spans_does_not_matter(length: int, low_rank: bool) -> None:
    vectors = [TaskVector({"w": x.view(15, 14), "b": x[:33]}) for x in _many()]
    if low_rank:
        B, A = _many()[0][:30].view(15, 2), _many()[1][:28].view(2, 14)
        vectors[1] = TaskVector({"w": LowRank(B, A), "b": vectors[1]["b"]})
    given_ = {"keep": 0.4, "scale": 1.0, "aggregate": "mean"}
    expected, merged = (trim_elect_merge(vectors, **given_, span=n) for n in (None, length))
    assert_close(dict(merged), dict(expected), rtol=0, atol=0)


def _stacked(vectors: list[TaskVector], keep: float) -> torch.Tensor:
    """The rules on one stacked matrix, in float64, for sizes at which a loop takes too long."""
    x = torch.stack([torch.cat([delta.flatten() for delta in v.values()]) for v in vectors]).double()
    d = x.shape[1]
    x = torch.stack([row * (row.abs() >= row.abs().sort().values[d - int(d * keep) - 1]) for row in x])
    sign = x.sum(0).sign()
    sign[sign == 0] = -1 if sign.sum() < 0 else 1
    x = torch.where(x * sign > 0, x, 0)
    return (x.sum(0) / (x != 0).sum(0).clamp(min=1)).float()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_size_at_which_the_sample_and_the_threads_come_in(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (600, 901), "b": (13,), "c": (33000,)}

    def delta(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=g).mul_(2**13).round_() - 1500 * seed  # zero sums in plenty

    vectors = [TaskVector({n: delta(shape) for n, shape in shapes.items()}) for _ in range(3)]
    entries = vectors[0].numel()
    assert spans.workers_for(vectors) == min(torch.get_num_threads(), spans.MAX_WORKERS)
    assert entries > kernel.SAMPLE
    assert entries > 2 * kernel.SPAN["cpu"]
    threads = torch.get_num_threads()
    merged = merge(vectors, "ties", keep=0.3)
    assert torch.get_num_threads() == threads
    assert_close(torch.cat([d.flatten() for d in merged.values()]), _stacked(vectors, 0.3), rtol=1e-6, atol=0)


def test_a_failure_in_a_worker_is_raised_and_the_threads_are_given_back() -> None:
    threads = torch.get_num_threads()

    def work(share):
        for item in share:
            if item == 3:
                raise RuntimeError("span 3")

    with pytest.raises(RuntimeError, match="span 3"):
        spans.in_parallel(work, range(10), workers=2)
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as pool:  # a thread to come
        assert pool.submit(torch.get_num_threads).result() == threads


def test_each_item_has_one_worker() -> None:
    def work(share):
        return [(item, time.sleep(0.002)) for item in share]

    shares = spans.in_parallel(work, range(12), workers=3)
    assert sum(map(bool, shares)) > 1
    assert sorted(item for share in shares for item, _ in share) == list(range(12))


# the k-th magnitude

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
grids = st.integers(-3, 3).map(float)


@given(st.lists(floats, min_size=1, max_size=60) | st.lists(grids, min_size=1, max_size=60), st.data())
@settings(deadline=None, max_examples=60)
def test_the_kth_magnitude_is_that_of_kthvalue(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    sample = data.draw(st.sampled_from([1, 5, 1000]))
    for dtype in (torch.float32, torch.float64):
        vector = one(values, dtype)
        expected = vector["w"].abs().kthvalue(k).values.item()
        pieces = spans.cut_into_spans([vector], data.draw(st.sampled_from([3, 16, 100])))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "SAMPLE", sample)
            assert kth_magnitude(vector, k, pieces, dtype) == expected


def _adversaries() -> dict[str, torch.Tensor]:
    n = 40_000
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=g)
    misleading = x.clone()
    misleading[:: n // 1000] = 100.0  # exactly the entries that a sample of 1000 sees
    zeros = x * (torch.rand(n, generator=g) < 0.3)
    narrow = 1 + torch.randint(0, 50, (n,), generator=g) * 2.0**-23
    return {
        "random": x,
        "misleading": misleading,
        "mostly zero": zeros,
        "all equal": torch.full((n,), -0.25),
        "negative zeros": torch.full((n,), -0.0),
        "neighbours": narrow,
        "subnormal": x * 1e-42,
        "heavy tails": x.pow(9) * 1e20,
        "bfloat16": x.to(torch.bfloat16).float(),
        "two values": torch.where(x > 0.5, 3.0, -7.0),
    }


@pytest.mark.parametrize("name", _adversaries())
def test_no_distribution_misleads_the_search_for_long(name: str, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "SAMPLE", 1000)
    passes = []
    census = kernel._census
    monkeypatch.setattr(kernel, "_census", lambda *a: passes.append(1) or census(*a))
    x = _adversaries()[name]
    vector = TaskVector({"w": x})
    pieces = spans.cut_into_spans([vector], 4096)
    for k in (1, 2, len(x) // 5, len(x) // 2, len(x) - 8000, len(x) - 1, len(x)):
        assert kth_magnitude(vector, k, pieces, torch.float32) == x.abs().kthvalue(k).values.item()
    assert len(passes) <= 7 * 5
    if name in ("all equal", "two values", "negative zeros"):
        assert len(passes) == 7  # the sample found it each time
    if name == "misleading":
        assert len(passes) > 7
