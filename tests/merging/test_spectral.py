"""Iso-C, Iso-CTS and TSV-M against a dense reference in NumPy, and what a merge may not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from saftnb.merging import LowRank, TaskVector, merge

METHODS = ("iso_c", "iso_cts", "tsv_m")
SPACES = ("weights", "knots", "core")
# a layer, a wide and a tall one, position embeddings, the image tower's projection, the text tower's, a bias, a norm's
# scale, the patch convolution
SHAPES = {
    "attn.weight": (12, 12), "fc.weight": (18, 10), "back.weight": (10, 18), "positional_embedding": (5, 12),
    "proj": (12, 8), "text_projection": (8, 8), "attn.bias": (12,), "ln.weight": (12,), "conv1.weight": (4, 3, 2, 2),
}  # fmt: skip
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2 and name != "text_projection"]
quickly = settings(deadline=None, max_examples=15)


def draw(
    seed: int, count: int, ranks: list[int] | None = None, dtype: torch.dtype = torch.float64, shapes: dict = SHAPES
) -> list[TaskVector]:
    """Task vectors; with ranks, the matrices of task t are products of random factors of rank ranks[t]."""
    g = torch.Generator().manual_seed(seed)

    def one(shape: tuple[int, ...], rank: int | None) -> torch.Tensor | LowRank:
        if rank is None or len(shape) != 2:
            return torch.randn(shape, generator=g, dtype=dtype)
        factors = (torch.randn(size, generator=g, dtype=dtype) for size in ((shape[0], rank), (rank, shape[1])))
        return LowRank(*factors)

    return [TaskVector({n: one(s, ranks[t] if ranks else None) for n, s in shapes.items()}) for t in range(count)]


def array(delta: torch.Tensor | LowRank) -> np.ndarray:
    return (delta.dense() if isinstance(delta, LowRank) else delta).double().numpy()


def svd(matrix: np.ndarray, norm: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, σ, Vᵀ without the directions that are rounding."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = int((values > 1e-7 * norm).sum())
    return u[:, :rank], values[:rank], vt[:rank]


def polar(columns: np.ndarray) -> np.ndarray:
    p, values, qt = np.linalg.svd(columns, full_matrices=False)
    out = np.zeros_like(columns)
    for i, value in enumerate(values):
        if value > 1e-7 * values[0]:
            out += np.outer(p[:, i], qt[i])
    return out


def reference(method: str, deltas: list[np.ndarray], common: float = 0.8) -> np.ndarray:
    """The facts' formulas, one dense matrix at a time."""
    side, n = min(deltas[0].shape), len(deltas)
    norms = [np.linalg.norm(d) for d in deltas]
    total = sum(deltas)
    if method == "iso_c":
        u, values, vt = svd(total, max(norms))
        return values.mean() * u @ vt
    if method == "tsv_m":
        parts = [tuple(x for x in svd(d, norm)) for d, norm in zip(deltas, norms, strict=True)]
        count = max(1, side // n)
    else:
        count = min(side // n, round((side - int(side * common)) / n))
        kept = side - n * count
        u, values, vt = svd(total, max(norms))
        first = (u[:, :kept], values[:kept], vt[:kept])
        rests = [d - first[0] @ first[0].T @ d for d in deltas]
        parts = [svd(rest, norm) for rest, norm in zip(rests, norms, strict=True)]
    parts = [(u[:, :count], values[:count], vt[:count]) for u, values, vt in parts]
    parts = [first, *parts] if method == "iso_cts" else parts
    left, right = polar(np.hstack([u for u, _, _ in parts])), polar(np.hstack([vt.T for _, _, vt in parts]))
    values = np.concatenate([values for _, values, _ in parts])
    return left @ np.diag(np.full_like(values, values.mean()) if method == "iso_cts" else values) @ right.T


def expected(method: str, vectors: list[TaskVector], scale: float, **options: float) -> dict[str, torch.Tensor]:
    found = {}
    for name in SHAPES:
        deltas = [array(vector[name]) for vector in vectors]
        merged = reference(method, deltas, **options) if name in MATRICES else sum(deltas) / len(deltas)
        found[name] = torch.from_numpy(np.asarray(scale * merged))
    return found


def same(merged: TaskVector, other: dict[str, torch.Tensor] | TaskVector, tolerance: float = 1e-9) -> None:
    for name, delta in merged.items():
        a, b = array(delta), array(other[name])
        assert np.linalg.norm(a - b) <= tolerance * max(1.0, np.linalg.norm(b)), name


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 999), count=st.integers(1, 5), scale=st.sampled_from([0.3, 1.0, 2.0]))
@quickly
def test_full_rank_updates_give_what_the_dense_formula_gives(method: str, seed: int, count: int, scale: float) -> None:
    vectors = draw(seed, count)
    same(merge(vectors, method, scale=scale), expected(method, vectors, scale))


@pytest.mark.parametrize("method", METHODS)
@given(
    seed=st.integers(0, 999), ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4), space=st.sampled_from(SPACES)
)
@quickly
def test_low_rank_updates_give_the_dense_formula_at_their_rank(
    method: str, seed: int, ranks: list[int], space: str
) -> None:
    vectors = draw(seed, len(ranks), ranks)
    merged = merge(vectors, method, space=space, scale=0.7)
    same(merged, expected(method, vectors, 0.7), 1e-6)
    assert all(isinstance(merged[name], LowRank) for name in MATRICES)
    if method != "iso_cts":  # whose own directions may repeat each other
        assert all(merged[name].B.shape[1] <= sum(ranks) for name in MATRICES)
    assert not isinstance(merged["attn.bias"], LowRank)


@given(seed=st.integers(0, 99), common=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
@quickly
def test_the_common_share_of_iso_cts(seed: int, common: float) -> None:
    vectors = draw(seed, 3)
    same(merge(vectors, "iso_cts", common=common), expected("iso_cts", vectors, 1.0, common=common))
    if common == 1.0:
        same(merge(vectors, "iso_cts", common=common), merge(vectors, "iso_c"))


# Not TIES in Core Space: its bases come from the factors themselves, [B_1 … B_n] and [A_1; …; A_n].
@pytest.mark.parametrize(
    ("method", "space"),
    [(m, s) for m in ("average", "task_arithmetic", *METHODS) for s in SPACES]
    + [("ties", "weights"), ("ties", "knots")],
)
@given(seed=st.integers(0, 99))
@quickly
def test_how_b_a_was_factored_changes_nothing(method: str, space: str, seed: int) -> None:
    """In float32, where null directions of B A are rounding: other factors, factors of a larger rank, the product."""
    dtype = (
        torch.float64 if method == "ties" else torch.float32
    )  # where rounding decides what is trimmed, TIES may differ
    vectors = draw(seed, 3, [3, 2, 3], dtype, {"w": (40, 30), "b": (3,)})
    g = torch.Generator().manual_seed(seed)

    def again(delta: torch.Tensor | LowRank) -> torch.Tensor | LowRank:
        if not isinstance(delta, LowRank):
            return delta
        turn = torch.linalg.qr(torch.randn(delta.B.shape[1], delta.B.shape[1], generator=g, dtype=dtype)).Q * 2
        B, A = delta.B @ turn, torch.linalg.solve(turn, delta.A)
        return LowRank(torch.cat([B, B], dim=1) / 2, torch.cat([A, A]))

    other = [TaskVector({name: again(delta) for name, delta in v.items()}) for v in vectors]
    same(merge(vectors, method, space=space), merge(other, method, space=space), 2e-5)
    if method != "ties" or space == "weights":
        same(merge(vectors, method, space=space), merge([v.dense() for v in vectors], method), 1e-4)


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 99), order=st.permutations(range(4)), low=st.booleans(), space=st.sampled_from(SPACES))
@quickly
def test_the_order_of_the_tasks_changes_nothing(
    method: str, seed: int, order: list[int], low: bool, space: str
) -> None:
    vectors = draw(seed, 4, [2, 3, 1, 2] if low else None)
    same(merge(vectors, method, space=space), merge([vectors[i] for i in order], method, space=space), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_a_task_that_leaves_a_layer_alone_adds_no_directions(method: str, space: str, dtype: torch.dtype) -> None:
    """An adapter with B = 0, a dense zero, and one whose factors cancel: their noise must not pass for directions."""
    u, v, w = draw(8, 3, [4, 3, 4], dtype, {"w": (40, 30)})
    zeros = [
        TaskVector({"w": LowRank(0 * w["w"].B, w["w"].A)}),
        TaskVector({"w": torch.zeros(40, 30, dtype=dtype)}),
        w - w,
    ]
    for zero in zeros:
        merged = [
            merge([*given[:i], zero, *given[i:]], method, space=space) for given in ([u, v], [v, u]) for i in (0, 1, 2)
        ]
        for other in merged:
            same(other, merged[0], 2e-5)
        assert np.linalg.matrix_rank(array(merged[0]["w"]), tol=1e-3) <= 7


@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
def test_factors_that_cancel_within_an_adapter_are_rounding(method: str) -> None:
    u, v, w = draw(9, 3, [4, 3, 4], torch.float64, {"w": (40, 30)})
    same(merge([u + 512.0 * w - 512.0 * w, v], method), merge([u, v], method), 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_shared_factors_are_no_directions_twice(method: str) -> None:
    """Adapters that share A have one row space: the concatenated V are dependent, and extra directions arbitrary."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(3, 14, generator=g)
    vectors = [TaskVector({"w": LowRank(torch.randn(11, 3, generator=g), A)}) for _ in range(3)]
    turned = [TaskVector({"w": LowRank(v["w"].B * 0.5, v["w"].A * 2)}) for v in vectors[::-1]]
    merged = merge(vectors, method)
    for space in SPACES:
        same(merged, merge(turned, method, space=space), 2e-5)
    wanted = reference(method, [array(v["w"]) for v in vectors])
    assert np.linalg.norm(array(merged["w"]) - wanted) < 1e-4 * np.linalg.norm(wanted)
    assert np.linalg.matrix_rank(array(merged["w"]), tol=1e-4) <= 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapters_merge_with_full_updates(method: str, dtype: torch.dtype) -> None:
    low, full = draw(6, 2, [2, 3], dtype), draw(7, 1, None, dtype)
    mixed = merge([*low, *full], method)
    assert not any(isinstance(delta, LowRank) for delta in mixed.values())
    same(mixed, merge([*[v.dense() for v in low], *full], method), 1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_bias_beside_it_changes_no_matrix(method: str) -> None:
    vectors = draw(1, 3)
    alone = [TaskVector({name: v[name] for name in MATRICES}) for v in vectors]
    merged = merge(vectors, method)
    for name, delta in merge(alone, method).items():
        assert torch.equal(delta, merged[name])


@pytest.mark.parametrize("method", METHODS)
def test_opposite_and_zero_updates_cancel(method: str) -> None:
    (one,) = draw(2, 1, [3], torch.float32)
    nothing = merge([0.0 * one, 0.0 * one], method)
    assert all(not array(delta).any() for delta in nothing.values())
    if method == "iso_c":
        assert all(np.abs(array(delta)).max() < 1e-5 for delta in merge([one, -one], method).values())


def test_one_vector_comes_back_and_iso_c_levels_its_spectrum() -> None:
    (vector,) = draw(3, 1)
    same(merge([vector], "tsv_m"), vector)
    values = torch.linalg.svdvals(merge([vector], "iso_c")["attn.weight"])
    assert_close(values, torch.linalg.svdvals(vector["attn.weight"]).mean().expand(12))


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_computed_in_float32_and_rounded_once(method: str) -> None:
    for ranks in (None, [2, 3, 2]):
        halves = [v.to(torch.bfloat16) for v in draw(4, 3, ranks, torch.float32)]
        merged, exact = merge(halves, method), merge([v.to(torch.float32) for v in halves], method)
        assert {delta.dtype for delta in merged.values()} == {torch.bfloat16}
        if ranks is None:
            for name, delta in merged.items():
                assert torch.equal(delta, exact[name].to(torch.bfloat16)), name
        else:
            same(merged, exact, 2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_linear_in_its_scale(method: str) -> None:
    vectors = draw(5, 3)
    same(merge(vectors, method, scale=0.5), 0.5 * merge(vectors, method))
