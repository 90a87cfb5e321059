"""Average and task arithmetic against loops over numbers; properties that every method shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from saftnb.merging import LowRank, TaskVector, merge

SHAPES = {"w": (3, 4), "b": (4,), "scalar": ()}


@st.composite
def task_vectors(draw, least: int = 1, most: int = 5) -> list[TaskVector]:
    """Task vectors of multiples of 2⁻¹⁰ up to 2¹⁰, often equal, opposite or zero."""
    number = st.one_of(st.integers(-3, 3), st.integers(-(2**20), 2**20)).map(lambda i: i / 2**10)
    sizes = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}

    def one() -> TaskVector:
        flat = {name: draw(st.lists(number, min_size=size, max_size=size)) for name, size in sizes.items()}
        return TaskVector({name: torch.tensor(flat[name]).reshape(SHAPES[name]) for name in SHAPES})

    return [one() for _ in range(draw(st.integers(least, most)))]


def flat(vector: TaskVector) -> list[float]:
    return [x for delta in vector.dense().values() for x in delta.flatten().tolist()]


def same(a: TaskVector, b: TaskVector, **tolerance: float) -> None:
    assert_close(dict(a.dense()), dict(b.dense()), **tolerance)


quickly = settings(deadline=None, max_examples=25)


@given(task_vectors(), st.integers(-8, 8).map(lambda i: i / 4))
@quickly
def test_task_arithmetic_is_the_scaled_sum_entry_by_entry(vectors: list[TaskVector], scale: float) -> None:
    expected = [scale * sum(column) for column in zip(*map(flat, vectors), strict=True)]
    assert flat(merge(vectors, "task_arithmetic", scale=scale)) == pytest.approx(expected, rel=1e-6)


@given(task_vectors())
@quickly
def test_average_is_the_mean_entry_by_entry(vectors: list[TaskVector]) -> None:
    expected = [sum(column) / len(vectors) for column in zip(*map(flat, vectors), strict=True)]
    assert flat(merge(vectors, "average")) == pytest.approx(expected, rel=1e-6)
    same(merge(vectors, "average"), merge(vectors, "task_arithmetic", scale=1 / len(vectors)), rtol=0, atol=0)


@given(task_vectors(most=1))
@quickly
def test_a_merge_of_one_vector_is_that_vector(vectors: list[TaskVector]) -> None:
    for method, hyperparameters in (("average", {}), ("task_arithmetic", {}), ("ties", {"keep": 1.0})):
        same(merge(vectors, method, **hyperparameters), vectors[0], rtol=0, atol=0)


@given(task_vectors(), st.randoms(use_true_random=False), st.sampled_from(["mean", "sum"]))
@quickly
def test_the_order_of_the_tasks_does_not_matter(vectors: list[TaskVector], random, aggregate: str) -> None:
    shuffled = random.sample(vectors, len(vectors))
    for method in (
        lambda v: merge(v, "average"),
        lambda v: merge(v, "task_arithmetic"),
        lambda v: merge(v, "ties", keep=0.5, aggregate=aggregate),
    ):
        same(method(vectors), method(shuffled), rtol=1e-6, atol=1e-7)


@given(task_vectors(), st.integers(-8, 8).map(lambda i: i / 4))
@quickly
def test_a_merge_is_linear_in_its_scale(vectors: list[TaskVector], scale: float) -> None:
    for method in ("task_arithmetic", "ties"):
        same(merge(vectors, method, scale=scale), scale * merge(vectors, method), rtol=0, atol=0)


@given(task_vectors())
@quickly
def test_ties_that_trims_nothing_of_like_signs_is_the_average(vectors: list[TaskVector]) -> None:
    positive = [TaskVector({name: delta.abs() + 0.5 for name, delta in v.items()}) for v in vectors]
    for alike in (positive, [-v for v in positive]):
        same(merge(alike, "ties", keep=1), merge(alike, "average"), rtol=1e-6, atol=0)
        total = merge(alike, "task_arithmetic")
        same(merge(alike, "ties", keep=1, aggregate="sum"), total, rtol=1e-6, atol=0)


def _lora(count: int, dtype: torch.dtype = torch.float32) -> list[TaskVector]:
    """Whole-number factors of different ranks, so that products and sums are exact."""
    g = torch.Generator().manual_seed(0)

    def factor(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-3, 4, (rows, columns), generator=g).to(dtype)

    return [
        TaskVector({"q": LowRank(factor(6, r), factor(r, 5)), "v": LowRank(factor(4, 2), factor(2, 3))})
        for r in range(1, count + 1)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("method", "hyperparameters"),
    [("average", {}), ("task_arithmetic", {"scale": 0.5}), ("ties", {"keep": 0.3}), ("ties", {"keep": 1})],
)
def test_low_rank_vectors_merge_like_their_products(method: str, hyperparameters: dict, dtype: torch.dtype) -> None:
    low = _lora(4, dtype)
    dense = [v.dense() for v in low]
    expected = merge(dense, method, **hyperparameters)
    tolerance = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-6, "atol": 0}
    for vectors in (low, [*low[:2], *dense[2:]], [dense[0], *low[1:]]):
        merged = merge(vectors, method, **hyperparameters)
        same(merged, expected, **tolerance)
        assert {delta.dtype for delta in merged.values()} == {dtype}


def test_linear_methods_keep_what_is_low_rank_in_every_vector() -> None:
    vectors = _lora(3)
    for method in ("average", "task_arithmetic"):
        merged = merge(vectors, method)
        assert isinstance(merged["q"], LowRank)
        assert merged["q"].B.shape == (6, 1 + 2 + 3)
        mixed = merge([vectors[0], TaskVector({"q": torch.ones(6, 5), "v": vectors[1]["v"]})], method)
        assert isinstance(mixed["q"], torch.Tensor)
        assert isinstance(mixed["v"], LowRank)


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties"])
def test_each_parameter_keeps_its_dtype(method: str) -> None:
    dtypes = {"a": torch.float32, "b": torch.float16, "c": torch.bfloat16, "d": torch.float64}
    vectors = [TaskVector({n: torch.randn(5).to(dtype) for n, dtype in dtypes.items()}) for _ in range(3)]
    assert {name: delta.dtype for name, delta in merge(vectors, method).items()} == dtypes
    mixed = merge([vectors[0], vectors[1].to(torch.float32)], method)
    assert {delta.dtype for delta in (mixed["a"], mixed["b"], mixed["c"])} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["dare_task_arithmetic", "dare_ties", "fisher", "regmean"])
def test_products_of_half_precision_factors_are_formed_in_float32(method: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    halves = [
        TaskVector({"w": LowRank(torch.randn(9, 3, generator=g).to(dtype), torch.randn(3, 7, generator=g).to(dtype))})
        for _ in range(3)
    ]
    given_ = {"drop": 0.0} if method.startswith("dare") else {}
    if method == "fisher":
        given_ = {"statistics": [{"w": torch.rand(9, 7, generator=g)} for _ in halves]}
    if method == "regmean":
        given_ = {"statistics": [{"w": torch.eye(7)} for _ in halves]}
    exact = merge([v.to(torch.float32) for v in halves], method, **given_)
    same(merge(halves, method, **given_), exact.to(dtype), rtol=0, atol=0)
    if method == "dare_task_arithmetic":
        total = sum(v["w"].B.double() @ v["w"].A.double() for v in halves)
        assert_close(exact["w"].double(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties"])
def test_half_precision_is_rounded_once_at_the_end(method: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    vectors = [TaskVector({"w": torch.randn(64, generator=g).to(dtype)}) for _ in range(6)]
    exact = merge([v.to(torch.float32) for v in vectors], method)
    same(merge(vectors, method), exact.to(dtype), rtol=0, atol=0)
