"""Disentanglement, the two linearities and sharpness against slow, independent references."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from saftnb import evaluate
from saftnb.analysis import (
    block_features,
    cross_task_linearity,
    disentanglement_map,
    hessian_eigenvalues,
    joint_loss,
    lanczos,
    loss_plane,
    mean_inside_box,
    sam_sharpness,
    segment_curvature,
)
from saftnb.backbones import ImageClassifier
from saftnb.finetune import ascent_step
from saftnb.suites import Split, load_suite
from saftnb.task_vector import TaskVector


@pytest.fixture(scope="module")
def suite():
    return load_suite("thimble")


@pytest.fixture(scope="module")
def vectors(suite):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in suite.tower().named_parameters()}
    return {
        t: TaskVector({n: 0.05 * torch.randn(s, generator=generator) for n, s in shapes.items()}) for t in suite.tasks
    }


@torch.no_grad()
def outputs(suite, task, move, pictures, tangent=False):
    model = suite.classifier(task, suite.tower(move, tangent=tangent))
    return model(suite.tasks[task].test.images[:pictures])


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("convention", ["sum", "mean"])
def test_the_map_is_its_definition_cell_by_cell(suite, vectors, convention, tangent):
    alphas, (one, two) = [-1.0, 0.0, 1.5], vectors
    frame = disentanglement_map(
        suite, vectors, alphas, pictures=15, convention=convention, tangent=tangent, progress=False
    ).set_index(["alpha_1", "alpha_2"])
    assert len(frame) == 9
    for a in alphas:
        for b in alphas:
            both = a * vectors[one] + b * vectors[two]
            terms = []
            for task, alone in ((one, a * vectors[one]), (two, b * vectors[two])):
                single = outputs(suite, task, alone, 15, tangent).argmax(1)
                terms.append((outputs(suite, task, both, 15, tangent).argmax(1) != single).double().mean().item())
            row = frame.loc[(a, b)]
            assert [row["xi_1"], row["xi_2"]] == pytest.approx(terms, abs=0.067 if tangent else 1e-9)
            assert row["xi"] == pytest.approx((row["xi_1"] + row["xi_2"]) * (1 if convention == "sum" else 0.5))
    assert frame.loc[(0.0, 0.0), "xi"] == 0
    assert frame["xi"].max() > 0.1


def test_the_single_models_are_run_once_an_axis(suite, vectors, monkeypatch):
    calls = []
    real = evaluate.ModelFamily.logits
    monkeypatch.setattr(evaluate.ModelFamily, "logits", lambda self, *a, **k: calls.append(a) or real(self, *a, **k))
    disentanglement_map(suite, vectors, [-1.0, 0.0, 1.0], pictures=5, progress=False)
    # two axes of three, and of the nine cells those that are not on the axis of their own task
    assert len(calls) == 6 + 6 + 6
    assert len(set(calls)) == len(calls)


def test_the_box_is_the_cells_up_to_its_side():
    frame = pd.DataFrame(
        [{"alpha_1": a, "alpha_2": b, "xi": 10 * abs(a) + abs(b)} for a in (-2, -1, 0, 1, 2) for b in (-2, -1, 0, 1, 2)]
    )
    inside = [10 * abs(a) + abs(b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    assert mean_inside_box(frame) == pytest.approx(np.mean(inside))


def test_bad_maps_are_refused(suite, vectors):
    with pytest.raises(ValueError, match="of two tasks, not of 1"):
        disentanglement_map(suite, {"digits": vectors["digits"]}, [0.0])
    with pytest.raises(ValueError, match="must hold 0"):
        disentanglement_map(suite, vectors, [-1.0, 1.0])
    with pytest.raises(ValueError, match="sum or mean, not 'max'"):
        disentanglement_map(suite, vectors, [0.0], convention="max")


def test_cross_task_linearity_is_a_loop_over_pictures(suite, vectors):
    """Slow reference: one picture at a time, features by running the blocks by hand."""
    one, two = vectors
    alpha, count = 0.3, 4
    frame = cross_task_linearity(suite, vectors, alpha=alpha, pictures=count)
    towers = [suite.tower(v) for v in (alpha * vectors[one] + (1 - alpha) * vectors[two], vectors[one], vectors[two])]
    pictures = torch.cat([suite.tasks[t].test.images[:count] for t in (one, two)])

    @torch.no_grad()
    def features(tower, picture):
        x = tower._embeds(suite.classifier(one).pixels(picture[None]))
        found = []
        for block in tower.transformer.resblocks:
            x = block(x)
            found.append(x.flatten().double().numpy())
        return found

    distance, coefficient = [], []
    for picture in pictures:
        mixed, a, b = (features(tower, picture) for tower in towers)
        both = [alpha * u + (1 - alpha) * v for u, v in zip(a, b, strict=True)]
        distance.append([1 - m @ n / np.linalg.norm(m) / np.linalg.norm(n) for m, n in zip(mixed, both, strict=True)])
        coefficient.append([m @ n / (n @ n) for m, n in zip(mixed, both, strict=True)])
    assert frame["block"].tolist() == [1, 2, 3, 4]
    assert frame["distance"].tolist() == pytest.approx(np.mean(distance, axis=0).tolist(), rel=1e-3)
    assert frame["coefficient"].tolist() == pytest.approx(np.mean(coefficient, axis=0).tolist(), rel=1e-4)
    assert frame["distance_sd"].tolist() == pytest.approx(np.std(distance, axis=0, ddof=1).tolist(), rel=1e-2)


def test_a_model_is_linear_with_itself(suite, vectors):
    twins = {"digits": vectors["digits"], "patterns": vectors["digits"]}
    frame = cross_task_linearity(suite, twins, pictures=3)
    assert frame["distance"].abs().max() < 1e-6
    assert frame["coefficient"].tolist() == pytest.approx([1.0] * len(frame), abs=1e-5)
    assert len(block_features(suite.tower(), torch.zeros(1, 3, 28, 28))) == 4


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_at_either_end_of_the_segment_nothing_is_mixed(suite, vectors, alpha):
    frame = cross_task_linearity(suite, vectors, alpha=alpha, pictures=3)
    assert frame["distance"].abs().max() < 1e-6
    assert frame["coefficient"].tolist() == pytest.approx([1.0] * len(frame), abs=1e-5)


def test_the_joint_loss_and_its_gap_are_their_definitions(suite, vectors):
    frame = joint_loss(suite, vectors, steps=3, pictures=40)

    def loss(move):
        return sum(
            F.cross_entropy(outputs(suite, t, move, 40), suite.tasks[t].test.labels[:40]).item() for t in vectors
        )

    one, two = vectors.values()
    ends = loss(one), loss(two)
    for row, (a, b) in zip(frame.itertuples(), ((1, 0), (0.5, 0.5), (0, 1)), strict=True):
        assert row.alpha == a
        assert row.loss == pytest.approx(loss(a * one + b * two), rel=1e-4)
        assert row.gap == pytest.approx(row.loss - a * ends[0] - b * ends[1], abs=1e-3)
    assert frame["gap"].iloc[[0, 2]].abs().max() < 1e-9
    three = joint_loss(suite, vectors, weights=[(0.25, 0.75)], pictures=40)
    assert three["alpha"].tolist() == [0.25]
    with pytest.raises(ValueError, match=r"weights are 2 numbers from 0 that sum to 1, not \(0.5, 0.6\)"):
        joint_loss(suite, vectors, weights=[(0.5, 0.6)])


def test_between_a_model_and_itself_there_is_no_gap(suite, vectors):
    one, two = vectors
    alike = joint_loss(suite, {one: vectors[one], two: vectors[one]}, steps=3, pictures=20)
    assert alike["gap"].abs().max() < 1e-4


def test_the_curvature_of_a_segment_is_that_of_its_points(suite, vectors):
    """Each row is of the Hessian at a model set up on its own."""
    one, two = vectors
    frame = segment_curvature(suite, vectors, points=3, pictures=8, iterations=2, device="cpu")
    assert frame["alpha"].tolist() == [0, 0.5, 1]
    middle = vectors[one] * 0.5 + vectors[two] * 0.5
    for row, move in zip(frame.itertuples(), (vectors[two], middle, vectors[one]), strict=True):
        tower = suite.tower(move)
        parts = [(suite.classifier(t, tower), suite.tasks[t].test[:8]) for t in vectors]
        alone = hessian_eigenvalues(parts, iterations=2, device="cpu")
        assert [row.top, row.bottom, row.norm] == pytest.approx([alone[k] for k in ("top", "bottom", "norm")], rel=1e-3)
    with pytest.raises(ValueError, match="between two tasks, not 1"):
        segment_curvature(suite, {one: vectors[one]})


@given(size=st.integers(2, 12), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=30)
def test_lanczos_finds_the_ends_of_a_dense_spectrum(size, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = a + a.T
    found = lanczos(lambda v: matrix @ v, matrix[0], iterations=size, seed=seed)
    values = np.linalg.eigvalsh(matrix.numpy())
    assert found["top"] == pytest.approx(values[-1], rel=1e-6, abs=1e-8)
    assert found["bottom"] == pytest.approx(values[0], rel=1e-6, abs=1e-8)
    assert found["norm"] == pytest.approx(np.abs(values).max(), rel=1e-6)
    assert found["residual"] < 1e-5


def test_lanczos_stops_where_the_space_ends():
    found = lanczos(lambda v: 3 * v, torch.zeros(7), iterations=7, seed=0)
    assert (found["top"], found["bottom"]) == (pytest.approx(3), pytest.approx(3))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 4), nn.Linear(4, 3, bias=False)

    def forward(self, pixels):
        return self.second(torch.tanh(self.first(pixels.flatten(1))))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = ImageClassifier(Tiny(), 3 * torch.randn(4, 3), (0.5,) * 3, (0.2,) * 3)
    images = torch.randint(0, 256, (9, 3, 2, 2), dtype=torch.uint8)
    return model, Split(images, torch.arange(9) % 4)


def test_the_hessian_is_the_dense_one(tiny):
    """Slow reference: torch.func.hessian of the loss over the flattened weights, and NumPy's eigenvalues."""
    model, split = tiny
    other = ImageClassifier(model.tower, torch.randn(4, 3), (0.4,) * 3, (0.3,) * 3)
    few = Split(split.images[:5], split.labels[:5])
    found = hessian_eigenvalues([(model, split), (other, few)], iterations=64, device="cpu")
    names = [name for name, _ in model.tower.named_parameters()]
    shapes = [p.shape for p in model.tower.parameters()]

    def loss(flat):
        pieces = flat.split([s.numel() for s in shapes])
        weights = {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes, strict=True)}
        total = 0
        for classifier, part in ((model, split), (other, few)):
            embedding = torch.func.functional_call(classifier.tower, weights, (classifier.pixels(part.images),))
            total = total + F.cross_entropy(classifier.classify(embedding), part.labels)
        return total

    flat = torch.cat([p.detach().flatten() for p in model.tower.parameters()])
    values = np.linalg.eigvalsh(torch.func.hessian(loss)(flat).numpy())
    assert found["top"] == pytest.approx(values[-1], rel=1e-3)
    assert found["norm"] == pytest.approx(np.abs(values).max(), rel=1e-3)
    assert found["residual"] < 1e-2 * found["top"]


def test_the_hessian_of_a_real_tower_runs(suite):
    part = suite.tasks["digits"].test[:20]
    found = hessian_eigenvalues([(suite.classifier("digits"), part)], iterations=3, device="cpu")
    assert found["top"] > 0
    assert found["norm"] >= found["top"]


@pytest.mark.parametrize("kind", ["sam", "asam"])
def test_sam_sharpness_is_the_loss_at_the_perturbed_weights(tiny, kind):
    model, split = tiny
    frame = sam_sharpness(model, split, [0.05, 0.2], perturbation=kind, device="cpu")
    twin = copy.deepcopy(model)
    start = F.cross_entropy(twin(split.images), split.labels)
    start.backward()
    for row in frame.itertuples():
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, e in zip(
                moved.tower.parameters(), ascent_step(list(twin.tower.parameters()), kind, row.rho), strict=True
            ):
                p.add_(e)
            above = F.cross_entropy(moved(split.images), split.labels)
        assert row.loss == pytest.approx(above.item(), rel=1e-4)
        assert row.rise == pytest.approx((above - start).item(), abs=1e-4)
        assert row.rise > 0
    still = sam_sharpness(model, split, [0.0], perturbation=kind, device="cpu")
    assert still["rise"].item() == pytest.approx(0, abs=1e-6)


def test_the_plane_holds_the_models_where_it_marks_them(suite, vectors):
    one, two = vectors
    grid, marks = loss_plane(suite, vectors, 3, margin=0.0, scale=0.5, pictures=30)
    spots = marks.set_index("name")
    length, along = vectors[one].norm(), spots.loc[two, "x"]
    assert spots.loc[one, "x"] == pytest.approx(length)
    assert np.hypot(spots.loc[two, "x"], spots.loc[two, "y"]) == pytest.approx(vectors[two].norm())
    distance = np.hypot(length - along, spots.loc[two, "y"])
    assert distance == pytest.approx((vectors[one] - vectors[two]).norm())
    # a corner of the grid and the marks are known points of the plane
    for spot in (grid.iloc[0], *(mark for _, mark in marks.iterrows())):
        b = spot["y"] / spots.loc[two, "y"]
        move = ((spot["x"] - b * along) / length) * vectors[one] + b * vectors[two]
        expected = sum(
            F.cross_entropy(outputs(suite, t, move, 30), suite.tasks[t].test.labels[:30]).item() for t in vectors
        )
        assert spot["loss"] == pytest.approx(expected, rel=1e-3)
