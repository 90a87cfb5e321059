"""Alignment of updates, against loops over the definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saftnb.analysis import kept_entries, layer_inputs, linear_cka, shared_directions, update_cka, update_spectra
from saftnb.merging import LowRank, TaskVector, represent
from saftnb.suites import load_suite


def slow_cka(x, y):
    """HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with linear kernels, K and L centred one entry at a time."""

    def kernel(v):
        n = len(v)
        k = [[sum(a * b for a, b in zip(v[i], v[j], strict=True)) for j in range(n)] for i in range(n)]
        row = [sum(line) / n for line in k]
        whole = sum(row) / n
        return [[k[i][j] - row[i] - row[j] + whole for j in range(n)] for i in range(n)]

    def hsic(a, b):
        return sum(p * q for one, two in zip(a, b, strict=True) for p, q in zip(one, two, strict=True))

    k, el = kernel(x.tolist()), kernel(y.tolist())
    return hsic(k, el) / math.sqrt(hsic(k, k) * hsic(el, el))


@given(st.integers(2, 7), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_linear_cka_is_hsic_s(n, a, b, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, size, generator=generator, dtype=torch.float64) for size in (a, b))
    found = linear_cka(x, y)
    assert found == pytest.approx(slow_cka(x, y), abs=1e-9)
    assert -1e-9 <= found <= 1 + 1e-9
    assert linear_cka(x, x) == pytest.approx(1)
    turn = torch.linalg.qr(torch.randn(b, b, generator=generator, dtype=torch.float64))[0]
    assert linear_cka(x, 3 * y @ turn + 5) == pytest.approx(found, abs=1e-9)


def test_a_constant_view_has_no_cka():
    assert math.isnan(linear_cka(torch.ones(4, 2), torch.randn(4, 3)))


def adapters(tasks=3, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        f"t{i}": TaskVector({"a.weight": LowRank(draw(7, rank), draw(rank, 5)), "b.bias": draw(7)})
        for i in range(tasks)
    }


def test_update_cka_by_the_definitions():
    vectors = adapters()
    inputs = {"a.weight": torch.randn(11, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)}
    dense = {task: vector["a.weight"].dense() for task, vector in vectors.items()}
    represented = dict(zip(vectors, represent(list(vectors.values()), "knots").vectors, strict=True))
    on_inputs, on_rows = update_cka(vectors, inputs=inputs), update_cka(vectors)
    aligned = update_cka(vectors, space="knots")
    for number, (one, two) in enumerate(itertools.combinations(vectors, 2)):
        for frame in (on_inputs, on_rows, aligned):
            assert frame.loc[number, ["layer", "task_1", "task_2"]].tolist() == ["a.weight", one, two]
        x = inputs["a.weight"]
        assert on_inputs["cka"][number] == pytest.approx(slow_cka(x @ dense[one].T, x @ dense[two].T))
        assert on_rows["cka"][number] == pytest.approx(slow_cka(dense[one], dense[two]))
        parts = (represented[task]["a.weight"] for task in (one, two))
        assert aligned["cka"][number] == pytest.approx(slow_cka(*parts))
    same = update_cka(vectors, inputs=inputs, space="knots")
    np.testing.assert_allclose(same["cka"], on_inputs["cka"], atol=1e-9)


def test_spectra_and_shared_directions():
    vectors = adapters(rank=2)
    spectra = update_spectra(vectors, count=3).set_index(["layer", "task", "index"])["value"].sort_index()
    for task, vector in vectors.items():
        values = np.linalg.svd(vector["a.weight"].dense().numpy(), compute_uv=False)[:3]
        np.testing.assert_allclose(spectra.loc["a.weight", task], values, atol=1e-12)
    wide = np.concatenate([v["a.weight"].dense().numpy() for v in vectors.values()], axis=1)
    np.testing.assert_allclose(spectra.loc["a.weight", "joint"], np.linalg.svd(wide, compute_uv=False)[:3])

    frame = shared_directions(vectors, rank=2).set_index(["task_1", "task_2"])
    assert (frame["chance_left"].iloc[0], frame["chance_right"].iloc[0]) == (2 / 7, 2 / 5)
    for one, two in itertools.combinations(vectors, 2):
        b1, b2 = (np.linalg.qr(vectors[task]["a.weight"].B.numpy())[0] for task in (one, two))
        a1, a2 = (np.linalg.qr(vectors[task]["a.weight"].A.T.numpy())[0] for task in (one, two))
        assert frame.loc[(one, two), "left"] == pytest.approx(np.linalg.norm(b1.T @ b2) ** 2 / 2)
        assert frame.loc[(one, two), "right"] == pytest.approx(np.linalg.norm(a1.T @ a2) ** 2 / 2)
    twins = shared_directions({"x": vectors["t0"], "y": 2 * vectors["t0"]}, rank=2)
    assert twins[["left", "right"]].to_numpy() == pytest.approx(np.ones((1, 2)))


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(0, 3))
def test_spectra_and_directions_from_factors_are_those_of_the_matrices(seed, one, two):
    generator = torch.Generator().manual_seed(seed)
    low = {
        name: TaskVector({"w": LowRank(*(torch.randn(s, generator=generator).double() for s in ((7, r), (r, 5))))})
        for name, r in (("x", one), ("y", two))
    }
    dense = {name: vector.dense() for name, vector in low.items()}
    ours, theirs = update_spectra(low, count=9), update_spectra(dense, count=9)
    np.testing.assert_allclose(ours["value"], theirs["value"], atol=1e-9)
    assert ours.drop(columns="value").equals(theirs.drop(columns="value"))
    shared = shared_directions(low, rank=2).iloc[0]
    if two == 0:
        assert math.isnan(shared["left"])
        return
    few, many = sorted((min(one, 2), min(two, 2)))
    u, v = ([np.linalg.svd(d["w"].numpy()) for d in dense.values()][i] for i in (0, 1))
    left = u[0][:, : min(one, 2)].T @ v[0][:, : min(two, 2)]
    right = u[2][: min(one, 2)] @ v[2][: min(two, 2)].T
    assert shared["left"] == pytest.approx((left**2).sum() / few, abs=1e-6)
    assert shared["right"] == pytest.approx((right**2).sum() / few, abs=1e-6)
    assert (shared["chance_left"], shared["chance_right"]) == (many / 7, many / 5)


def test_layer_inputs_are_what_the_layer_sees():
    suite = load_suite("thimble")
    names = ["transformer.resblocks.0.attn.q_proj.weight", "transformer.resblocks.1.mlp.c_fc.weight"]
    found = layer_inputs(suite, names, pictures=3, rows=50)
    assert [x.shape for x in found.values()] == [(50, 128), (50, 128)]
    every = layer_inputs(suite, names, pictures=3, rows=10**6)
    tower = suite.tower()
    pixels = torch.cat([suite.classifier(t).pixels(suite.tasks[t].test[:3].images) for t in suite.tasks])
    seen = []
    tower.transformer.resblocks[1].mlp.c_fc.register_forward_hook(lambda m, given, out: seen.append(out))
    with torch.no_grad():
        tower(pixels)
    layer = tower.transformer.resblocks[1].mlp.c_fc
    ours = every[names[1]] @ layer.weight.T + layer.bias
    wanted = seen[0].flatten(0, -2)
    assert ours.shape == wanted.shape
    order = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours, wanted[order], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("space", ["weights", "knots", "core"])
@pytest.mark.parametrize("keep", [0.2, 1.0])
def test_kept_entries_by_counting(space, keep):
    vectors = adapters()
    there = represent(list(vectors.values()), space).vectors
    values = []
    for vector in there:
        delta = vector["a.weight"]
        entries = (delta.dense() if isinstance(delta, LowRank) else delta).flatten().tolist()
        order = sorted(range(len(entries)), key=lambda i: -abs(entries[i]))
        count = min(len(entries), int(len(entries) * keep) + 1)  # as TIES: the entry at the threshold stays
        values.append({i: entries[i] for i in order[:count] if entries[i] != 0})
    frame = kept_entries(vectors, keep, space=space)
    for number, (i, j) in enumerate(itertools.combinations(range(3), 2)):
        both = values[i].keys() & values[j].keys()
        same = sum(values[i][k] * values[j][k] > 0 for k in both)
        assert frame["overlap"][number] == pytest.approx(len(both) / len(values[i]))
        assert frame["agreement"][number] == pytest.approx(same / len(both)) or not both


def test_rows_see_no_rotation_but_for_the_centring():
    """Why linear CKA cannot show what KnOTS's basis does: R_jᵀ R_i = Δ_jᵀ Δ_i."""
    vectors = adapters()
    represented = represent(list(vectors.values()), "knots").vectors
    one, two = (v["a.weight"] for v in represented[:2])
    first, second = (v["a.weight"].dense() for v in list(vectors.values())[:2])
    torch.testing.assert_close(two.T @ one, second.T @ first)
