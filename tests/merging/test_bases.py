"""The merge spaces, against dense definitions in NumPy, and with adapters of awkward shapes and values."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saftnb.merging import LowRank, TaskVector, merge, methods, represent, spaces
from saftnb.merging.bases import joint_svd
from saftnb.merging.grid_search import per_target, search

ARITHMETIC = {"average": {}, "task_arithmetic": {"scale": 0.7}}


def low_rank(generator, out, into, rank, dtype=torch.float64):
    b, a = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((out, rank), (rank, into)))
    return LowRank(b, a)


@st.composite
def layers(draw):
    """The same layer of some tasks: any shape, unequal ranks, some of them zero, equal or opposite adapters."""
    out, into = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    deltas = [low_rank(generator, out, into, draw(st.integers(1, 5))) for _ in range(draw(st.integers(1, 5)))]
    for kind in draw(st.lists(st.sampled_from(["zero", "same", "opposite"]), max_size=2)):
        first = deltas[0]
        deltas.append({"zero": 0.0 * first, "same": first, "opposite": -first}[kind])
    return deltas


def dense_knots(deltas, cutoff=1e-5):
    """U and R of the definition, by NumPy's SVD of the dense matrix."""
    dense = [delta.dense().numpy() if isinstance(delta, LowRank) else delta.numpy() for delta in deltas]
    u, values, vt = np.linalg.svd(np.concatenate(dense, axis=1), full_matrices=False)
    kept = values > cutoff
    parts = np.split(values[kept, None] * vt[kept], len(dense), axis=1)
    return u[:, kept], parts, values


def close(ours, theirs, scale=1.0, tolerance=1e-9):
    return np.abs(np.asarray(ours) - np.asarray(theirs)).max(initial=0.0) <= tolerance * max(1.0, scale)


@given(layers())
def test_the_factored_svd_gives_back_every_delta_and_an_orthonormal_basis(deltas):
    u, parts = joint_svd(deltas)
    assert close(u.T @ u, np.eye(u.shape[1]))
    for part, delta in zip(parts, deltas, strict=True):
        assert close(u @ part, delta.dense(), scale=1e2, tolerance=1e-6)  # up to what the cutoff drops
    assert u.shape[1] <= sum(delta.B.shape[1] for delta in deltas)


@given(layers())
def test_the_factored_svd_is_the_dense_one_up_to_signs(deltas):
    u, parts = joint_svd(deltas)
    dense_u, dense_parts, values = dense_knots(deltas)
    kept = values[values > 1e-5]
    if len(kept) and np.abs(values - 1e-5).min() < 1e-7:
        return  # on the cutoff's edge rounding decides
    assert u.shape[1] == len(kept)
    rows = np.linalg.norm(torch.cat(parts, dim=1).numpy(), axis=1)
    assert close(rows, kept, scale=1e2)
    gaps = np.abs(kept[:, None] - kept[None, :]) + np.diag(np.full(len(kept), np.inf))
    for i in range(len(kept)):
        if gaps[i].min() > 1e-3 * kept.max():  # a direction of its own: the same vector, or its opposite
            sign = np.sign(u[:, i].numpy() @ dense_u[:, i])
            assert close(u[:, i], sign * dense_u[:, i], tolerance=1e-6)
            for part, other in zip(parts, dense_parts, strict=True):
                assert close(part[i], sign * other[i], scale=1e2, tolerance=1e-6)


@settings(max_examples=30)
@given(layers(), st.sampled_from(["columns", "rows"]), st.sampled_from([0.3, 0.6, 1.0]))
def test_knots_ties_is_ties_on_the_dense_representations(deltas, axis, keep):
    """The slow way: dense SVD, TIES on its R by the plain method, U times that. Signs of pairs follow the fast one."""
    turned = [delta.dense() if axis == "columns" else delta.dense().T for delta in deltas]
    _, dense_parts, values = dense_knots(turned)
    kept = values[values > 1e-5]
    if len(kept) == 0 or (len(kept) > 1 and np.diff(kept).max() > -1e-2 * kept.max()):
        return  # coinciding singular values: the basis is arbitrary
    u, _, _ = dense_knots(turned)
    fast, _ = joint_svd([LowRank(t, torch.eye(t.shape[1], dtype=t.dtype)) for t in turned])
    if fast.shape[1] != u.shape[1]:
        return
    signs = np.sign((fast.numpy() * u).sum(axis=0))
    flat = [np.abs(p).ravel() for p in dense_parts]
    if any(len(f) > 1 and np.diff(np.sort(f)).min() < 1e-9 for f in flat):
        return  # equal magnitudes: rounding decides which is trimmed
    represented = [TaskVector({"w": torch.from_numpy(signs[:, None] * p)}) for p in dense_parts]
    wanted = torch.from_numpy(u * signs) @ merge(represented, "ties", keep=keep, scale=0.8)["w"]
    wanted = wanted if axis == "columns" else wanted.T
    got = merge([TaskVector({"w": d}) for d in deltas], "ties", space="knots", keep=keep, scale=0.8, axis=axis)["w"]
    trimmed = []
    for part in dense_parts:
        magnitudes = np.sort(np.abs(part).ravel())
        cut = magnitudes[max(0, len(magnitudes) - int(len(magnitudes) * keep) - 1)] if keep < 1 else 0.0
        trimmed.append(np.where(np.abs(part) >= cut - 1e-12, part, 0.0))
    if (np.abs(sum(trimmed)) < 1e-9)[sum(np.abs(t) for t in trimmed) > 1e-9].any():
        return  # survivors that cancel: rounding decides their sign
    assert close(got.dense(), wanted, scale=1e2, tolerance=1e-6)


@pytest.mark.parametrize("method", ARITHMETIC)
@given(deltas=layers(), space=st.sampled_from(["core", "knots", "knots rows"]))
def test_arithmetic_is_the_same_in_every_space(method, deltas, space):
    vectors = [TaskVector({"w": d, "b": torch.full((3,), float(i))}) for i, d in enumerate(deltas)]
    name, _, axis = space.partition(" ")
    got = merge(vectors, method, space=name, **ARITHMETIC[method], **({"axis": axis} if axis else {}))
    plain = merge(vectors, method, **ARITHMETIC[method])
    assert close(got["w"].dense(), plain["w"].dense(), scale=1e2, tolerance=1e-6)
    assert torch.equal(got["b"], plain["b"])
    assert isinstance(got["w"], LowRank)


@given(layers())
def test_core_loses_nothing_and_is_as_small_as_it_says(deltas):
    there = represent([TaskVector({"w": d}) for d in deltas], "core")
    total = sum(d.B.shape[1] for d in deltas)
    for part, delta in zip(there.vectors, deltas, strict=True):
        assert part["w"].shape == (min(delta.shape[0], total), min(delta.shape[1], total))
        assert close(there.back(part)["w"].dense(), delta.dense(), scale=1e2)


@pytest.mark.parametrize("space", ["knots", "core"])
@pytest.mark.parametrize("method", sorted(name for name, m in methods().items() if not m.needs_statistics))
def test_every_method_works_in_every_space_and_stays_low_rank(method, space):
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (12, 20), "k": (6, 20), "v": (20, 6)}
    vectors = [
        TaskVector({name: low_rank(generator, *shape, rank, torch.float32) for name, shape in shapes.items()})
        for rank in (2, 3, 1)
    ]
    merged = merge(vectors, method, space=space)
    for name, shape in shapes.items():
        delta = merged[name]
        assert isinstance(delta, LowRank)
        assert (tuple(delta.shape), delta.dtype) == (shape, torch.float32)
        assert delta.B.shape[1] <= 6
        assert delta.dense().norm() > 0


@pytest.mark.parametrize("space", ["knots", "core"])
def test_dense_deltas_are_factors_of_full_rank(space):
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    as_low_rank = [LowRank(d, torch.eye(8, dtype=torch.float64)) for d in deltas]
    ours = merge([TaskVector({"w": d}) for d in deltas], "iso_c", space=space)["w"].dense()
    assert close(ours, merge([TaskVector({"w": d}) for d in as_low_rank], "iso_c", space=space)["w"].dense())
    u, parts = joint_svd(deltas)
    dense_u, _, _ = dense_knots(deltas)
    assert close((u @ u.T), dense_u @ dense_u.T)
    assert all(close(u @ part, delta) for part, delta in zip(parts, deltas, strict=True))


def test_a_cutoff_drops_small_directions():
    deltas = [LowRank(torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0, 0.0]])),
              LowRank(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 0.5]]))]  # fmt: skip
    vectors = [TaskVector({"w": d}) for d in deltas]
    assert represent(vectors, "knots").vectors[0]["w"].shape == (2, 2)
    assert represent(vectors, "knots", cutoff=0.5).vectors[0]["w"].shape == (1, 2)
    nothing = merge([TaskVector({"w": 0.0 * d}) for d in deltas], "ties", space="knots")
    assert torch.equal(nothing["w"].dense(), torch.zeros(2, 2))


def test_a_search_decomposes_once(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    vectors = [TaskVector({"w": low_rank(generator, 6, 5, 2)}) for _ in range(3)]
    calls = []
    real = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or real(*a, **k))
    there = represent(vectors, "knots")
    goal = merge(vectors, "ties", space="knots", keep=0.5, scale=0.6)["w"].dense()
    calls.clear()

    def score(vector):
        gap = float((vector["w"].dense() - goal).norm())
        return {"a": -gap, "b": -2 * gap}

    grid = {"keep": [0.2, 0.5, 1.0], "scale": [0.3, 0.6, 0.9]}
    found = search(there, "ties", grid, score, progress=False)
    assert found.best == {"keep": 0.5, "scale": 0.6}
    assert isinstance(found.vector["w"], LowRank)
    assert close(per_target(there, "ties", found)["a"][1]["w"].dense(), goal)
    assert not calls


@pytest.mark.parametrize(
    ("message", "method", "options"),
    [
        ("there is no merge space 'knot'; allowed are core, knots, weights", "ties", {"space": "knot"}),
        ("knots: cutoff = -1 is not allowed", "ties", {"space": "knots", "cutoff": -1}),
        ("knots: axis = 'diagonal' is not allowed", "ties", {"space": "knots", "axis": "diagonal"}),
        ("ties has no hyperparameter 'cutoff'", "ties", {"space": "core", "cutoff": 0.1}),
        ("fisher works in the space 'weights' alone, not in 'knots'", "fisher", {"space": "knots"}),
        ("regmean works in the space 'weights' alone, not in 'core'", "regmean", {"space": "core"}),
    ],
)
def test_bad_input_is_one_line(message, method, options):
    generator = torch.Generator().manual_seed(0)
    vectors = [TaskVector({"w": low_rank(generator, 3, 3, 1)})] * 2
    with pytest.raises(ValueError, match=message) as caught:
        merge(vectors, method, **options)
    assert "\n" not in str(caught.value)


def test_spaces_have_schemas():
    assert [str(s) for s in spaces().values()] == [
        "weights()",
        "knots(cutoff: number in [0, inf), default 1e-05; axis: 'columns' or 'rows', default 'columns')",
        "core()",
    ]


@pytest.mark.parametrize("space", ["knots", "core"])
def test_half_precision_is_rounded_at_the_end_alone(space):
    generator = torch.Generator().manual_seed(5)
    halves = [TaskVector({"w": low_rank(generator, 20, 16, 3, torch.bfloat16)}) for _ in range(3)]
    exact = [TaskVector({"w": v["w"].to(torch.float64)}) for v in halves]
    there = represent(halves, space)
    assert there.vectors[0]["w"].dtype == torch.float32
    wanted = represent(exact, space).merge("ties", keep=0.4)["w"]
    got = there.merge("ties", keep=0.4)["w"]
    assert got.dtype == torch.bfloat16
    assert (got.dense().double() - wanted.dense()).norm() < 0.01 * wanted.dense().norm()


@pytest.mark.parametrize("space", ["knots", "core"])
@pytest.mark.parametrize("method", ["ties", "iso_c", "tsv_m"])
def test_the_order_of_the_tasks_does_not_matter(method, space):
    generator = torch.Generator().manual_seed(2)
    vectors = [TaskVector({"w": low_rank(generator, 14, 11, rank)}) for rank in (2, 3, 2)]
    one, other = (merge(given, method, space=space)["w"].dense() for given in (vectors, vectors[::-1]))
    assert (one - other).norm() < 1e-9 * one.norm()


def test_large_layers_stay_factored_in_knots_basis_and_merge_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    vectors = [
        TaskVector({"w": LowRank(torch.randn(20, 3, generator=generator), torch.randn(3, 30, generator=generator))})
        for _ in range(3)
    ]
    dense = represent(vectors, "knots")
    small = {m: dense.merge(m) for m in ("ties", "task_arithmetic", "tsv_m", "iso_c", "average")}
    assert all(isinstance(part["w"], torch.Tensor) for part in dense.vectors)
    monkeypatch.setattr(sys.modules["saftnb.merging.bases"], "LARGE", 0)
    factored = represent(vectors, "knots")
    assert all(isinstance(part["w"], LowRank) and part["w"].B.shape[1] == 3 for part in factored.vectors)
    for method, wanted in small.items():
        found = factored.merge(method)
        torch.testing.assert_close(found["w"].dense(), wanted["w"].dense(), rtol=1e-4, atol=1e-5)
