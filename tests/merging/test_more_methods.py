"""DARE, Fisher and RegMean against references in NumPy, loops and textbook definitions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from saftnb.backbones import ImageClassifier
from saftnb.merging import LowRank, TaskVector, dare, merge, statistics, ties
from saftnb.merging.statistics import fisher_diagonal, gram_matrices
from saftnb.suites import load_suite

SHAPES = {"w": (6, 4), "v": (3, 5), "b": (4,), "conv": (2, 3, 2, 2), "one": ()}
quickly = settings(deadline=None, max_examples=20)


def vectors_of(seed: int, count: int, dtype: torch.dtype = torch.float64) -> list[TaskVector]:
    g = torch.Generator().manual_seed(seed)
    return [TaskVector({n: torch.randn(s, generator=g, dtype=dtype) for n, s in SHAPES.items()}) for _ in range(count)]


def same(a: TaskVector, b: dict, **tolerance: float) -> None:
    assert_close(dict(a), {n: torch.as_tensor(x) for n, x in b.items()}, **{"rtol": 1e-9, "atol": 1e-9} | tolerance)


@given(seed=st.integers(0, 99), count=st.integers(1, 4))
@quickly
def test_fisher_is_the_weighted_mean_entry_by_entry(seed: int, count: int) -> None:
    vectors = vectors_of(seed, count)
    g = torch.Generator().manual_seed(seed + 1)
    weights = [
        {n: (torch.rand(s, generator=g, dtype=torch.float64) - 0.3).clamp(min=0) for n, s in SHAPES.items()}
        for _ in range(count)
    ]
    expected = {}
    for name, shape in SHAPES.items():
        out = np.empty(shape)
        for index in np.ndindex(*shape):
            f = [float(one[name][index]) for one in weights]
            x = [float(v[name][index]) for v in vectors]
            total = sum(f)
            out[index] = sum(a * b for a, b in zip(f, x, strict=True)) / total if total else sum(x) / count
        expected[name] = out
    same(merge(vectors, "fisher", statistics=weights, normalize=False), expected)
    equal = [{n: torch.ones(s) for n, s in SHAPES.items()}] * count
    same(merge(vectors, "fisher", statistics=equal), dict(merge(vectors, "average")))


@given(seed=st.integers(0, 99), count=st.integers(1, 4), off=st.sampled_from([0.0, 0.9, 1.0]))
@quickly
def test_regmean_solves_the_regression_that_it_is_named_after(seed: int, count: int, off: float) -> None:
    """With off_diagonal = 1 it is the least-squares fit of all layers' outputs, by NumPy on the inputs themselves."""
    vectors = vectors_of(seed, count)
    g = np.random.default_rng(seed)
    inputs = [g.normal(size=(9, 4)) for _ in range(count)]
    grams = [{"w": torch.from_numpy(x.T @ x) / len(x)} for x in inputs]
    merged = merge(vectors, "regmean", statistics=grams, off_diagonal=off)
    if off == 1.0:
        x = np.concatenate(inputs)
        y = np.concatenate([x @ v["w"].numpy().T for x, v in zip(inputs, vectors, strict=True)])
        assert_close(merged["w"], torch.from_numpy(np.linalg.lstsq(x, y, rcond=None)[0].T), rtol=1e-7, atol=1e-9)
    else:
        shrunk = [gr["w"].numpy() * (off + (1 - off) * np.eye(4)) for gr in grams]
        top = sum(v["w"].numpy() @ s for v, s in zip(vectors, shrunk, strict=True))
        assert_close(merged["w"], torch.from_numpy(top @ np.linalg.inv(sum(shrunk))), rtol=1e-7, atol=1e-9)
    assert_close(merged["v"], merge(vectors, "average")["v"])


def test_regmean_bears_inputs_that_leave_directions_out() -> None:
    vectors = vectors_of(0, 2)
    grams = [
        {"w": torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0]))},
        {"w": torch.diag(torch.tensor([3.0, 0.0, 0.0, 0.0]))},
    ]
    merged = merge(vectors, "regmean", statistics=grams)["w"]
    assert_close(merged[:, 0], (vectors[0]["w"][:, 0] + 3 * vectors[1]["w"][:, 0]) / 4)
    assert_close(merged[:, 1], vectors[0]["w"][:, 1])
    assert merged.isfinite().all()


def test_regmean_takes_the_pseudo_inverse_where_inputs_are_few() -> None:
    """Ten samples of 32 features leave directions out, which a solver fills with rounding's own: norms of hundreds."""
    g = np.random.default_rng(0)
    vectors = [TaskVector({"w": torch.from_numpy(g.normal(size=(32, 32)))}) for _ in range(3)]
    basis = g.normal(size=(10, 32))
    inputs = [g.normal(size=(10, 10)) @ basis for _ in vectors]  # all tasks see the same ten directions
    for dtype in (torch.float64, torch.float32):
        grams = [{"w": torch.from_numpy(x.T @ x / len(x)).to(dtype)} for x in inputs]
        merged = merge(vectors, "regmean", statistics=grams, off_diagonal=1.0)["w"].numpy()
        x = np.concatenate(inputs)
        y = np.concatenate([x @ v["w"].numpy().T for x, v in zip(inputs, vectors, strict=True)])
        wanted = np.linalg.lstsq(x, y, rcond=None)[0].T
        assert np.linalg.norm(merged) < 60
        assert np.linalg.norm(merged - wanted) < (1e-6 if dtype == torch.float64 else 1e-1) * np.linalg.norm(wanted)


def test_regmean_knows_a_singular_sum_that_a_solver_would_take() -> None:
    """Eigenvalues of 1e-7 in float32 are rounding, though the matrix is positive definite."""
    vectors = [TaskVector({"w": torch.randn(3, 6, generator=torch.Generator().manual_seed(t))}) for t in (0, 1)]
    gram = {"w": torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-7, 1e-7, 1e-7]))}
    merged = merge(vectors, "regmean", statistics=[gram, gram])["w"]
    assert_close(merged[:, :3], (vectors[0]["w"] + vectors[1]["w"])[:, :3] / 2)
    assert not merged[:, 3:].any()


def test_tiny_and_huge_statistics_weigh_as_they_should_and_tasks_are_matched_by_name() -> None:
    vectors = {"a": TaskVector({"w": torch.full((2,), 1e-4)}), "b": TaskVector({"w": torch.full((2,), 3e-4)})}
    for value in (1e-42, 3e38):
        same_ = {"w": torch.full((2,), value)}
        merged = merge(vectors, "fisher", statistics={"b": same_, "a": same_}, normalize=False)
        assert_close(merged["w"], torch.full((2,), 2e-4))
    uneven = {"b": {"w": torch.full((2,), 3.0)}, "a": {"w": torch.full((2,), 1.0)}}  # in another order than the vectors
    assert_close(merge(vectors, "fisher", statistics=uneven, normalize=False)["w"], torch.full((2,), 2.5e-4))
    with pytest.raises(ValueError, match="fisher: there are no statistics of 'b'"):
        merge(vectors, "fisher", statistics={"a": uneven["a"]})
    with pytest.raises(ValueError, match="'bias', which is no layer's 2-D weight"):
        merge([TaskVector({"bias": torch.ones(2)})], "regmean", statistics=[{"bias": torch.eye(2)}])
    empty = [TaskVector({"w": torch.ones(3, 0)})]
    assert merge(empty, "regmean", statistics=[{"w": torch.ones(0, 0)}])["w"].shape == (3, 0)


def test_fisher_divides_each_tasks_by_its_norm() -> None:
    """A task whose gradients are a hundred times as large counts no more than the others."""
    vectors = vectors_of(7, 3)
    g = torch.Generator().manual_seed(8)
    weights = [{n: torch.rand(s, generator=g, dtype=torch.float64) for n, s in SHAPES.items()} for _ in vectors]
    merged = merge(vectors, "fisher", statistics=weights)
    large = [weights[0], {n: 1e4 * w for n, w in weights[1].items()}, weights[2]]
    same(merge(vectors, "fisher", statistics=large), dict(merged))
    assert (merge(vectors, "fisher", statistics=large, normalize=False) - merged).norm() > 0.1 * merged.norm()
    norms = [np.sqrt(sum((w.numpy() ** 2).sum() for w in one.values())) for one in weights]
    shares = [{n: w / norm for n, w in one.items()} for one, norm in zip(weights, norms, strict=True)]
    same(merge(vectors, "fisher", statistics=shares, normalize=False), dict(merged))
    silent = [{n: 0 * w for n, w in weights[0].items()}] * 3
    same(merge(vectors, "fisher", statistics=silent), dict(merge(vectors, "average")))


def test_dare_keeps_the_share_it_should_and_rescales() -> None:
    big = [TaskVector({"w": torch.ones(200, 300), "b": torch.full((50,), 2.0)}) for _ in range(3)]
    merged = merge(big, "dare_task_arithmetic", drop=0.75, seed=3)["w"]
    assert set(merged.unique().tolist()) == {0.0, 4.0, 8.0, 12.0}
    assert merged.mean().item() == pytest.approx(3, rel=0.02)  # unbiased
    assert merged.std().item() == pytest.approx((3 * 3) ** 0.5, rel=0.02)  # the three masks are independent
    assert not torch.equal(merged, merge(big, "dare_task_arithmetic", drop=0.75, seed=4)["w"])
    assert torch.equal(merged, merge(big, "dare_task_arithmetic", drop=0.75, seed=3)["w"])
    state = torch.random.get_rng_state()
    merge(big, "dare_ties", drop=0.5)
    assert torch.equal(state, torch.random.get_rng_state())


def test_dare_ties_is_ties_of_what_dare_left() -> None:
    vectors = vectors_of(1, 3)
    alone = [merge([v], "dare_task_arithmetic", drop=0.0) for v in vectors]
    same(merge(vectors, "dare_ties", drop=0.0, scale=0.7), dict(merge(alone, "ties", keep=1.0, scale=0.7)))
    # The first task's mask is the same alone and among others.
    thinned = merge(vectors[:1], "dare_task_arithmetic", drop=0.5, seed=2)
    same(merge(vectors[:1], "dare_ties", drop=0.5, seed=2), dict(thinned))


@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_dare_of_large_adapters_row_by_row_is_that_of_whole_matrices(monkeypatch, keep) -> None:
    g = torch.Generator().manual_seed(0)

    def factors(out: int, into: int) -> LowRank:  # whole numbers: both ways sum exactly
        parts = torch.randint(-4, 5, (out, 2), generator=g), torch.randint(-4, 5, (2, into), generator=g)
        return LowRank(*(part.float() for part in parts))

    low = [TaskVector({"w": factors(30, 21), "b": torch.randn(5, generator=g), "v": factors(9, 8)}) for _ in range(3)]
    how = {"drop": 0.5, "seed": 2, "keep": keep}
    whole = merge(low, "dare_ties", **how)
    monkeypatch.setattr(dare, "LARGE", 100)
    formed = []
    rows = dare.ThinnedRows.__getitem__
    monkeypatch.setattr(dare.ThinnedRows, "__getitem__", lambda self, part: formed.append(part) or rows(self, part))
    for span in (21, 2**17):  # a row at a time, and all at once
        monkeypatch.setitem(ties.SPAN, "cpu", span)
        assert_close(dict(merge(low, "dare_ties", **how)), dict(whole), rtol=0, atol=0)
    assert formed
    assert max(part.stop - part.start for part in formed[: len(formed) // 2]) <= 1
    thinned = [merge([vector], "dare_task_arithmetic", drop=0.5, seed=2) for vector in low[:1]]
    assert_close(dict(merge(low[:1], "dare_ties", drop=0.5, seed=2)), dict(thinned[0]), rtol=0, atol=0)


ALL = {"dare_task_arithmetic": {"drop": 0.0}, "dare_ties": {"drop": 0.0}}


@pytest.mark.parametrize("method", ["dare_task_arithmetic", "dare_ties"])
def test_a_merge_of_one_vector_is_that_vector(method: str) -> None:
    (vector,) = vectors_of(2, 1)
    same(merge([vector], method, **ALL[method]), dict(vector))


@pytest.mark.parametrize("method", [*ALL, "fisher", "regmean"])
def test_low_rank_and_bfloat16_vectors_merge_like_their_dense_selves(method: str) -> None:
    g = torch.Generator().manual_seed(0)
    low = [TaskVector({"w": LowRank(torch.randn(6, 2, generator=g), torch.randn(2, 4, generator=g))}) for _ in range(2)]
    measured = {"fisher": [{"w": torch.rand(6, 4, generator=g)} for _ in range(2)],
                "regmean": [{"w": torch.eye(4) * (i + 1)} for i in range(2)]}.get(method)  # fmt: skip
    given = {"statistics": measured} if measured else {}
    dense = merge([v.dense() for v in low], method, **ALL.get(method, {}), **given)
    assert_close(dict(merge(low, method, **ALL.get(method, {}), **given)), dict(dense))
    half = merge([v.dense().to(torch.bfloat16) for v in low], method, **ALL.get(method, {}), **given)
    assert half["w"].dtype == torch.bfloat16
    assert_close(half["w"].float(), dense["w"], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("method", ["dare_ties", "dare_task_arithmetic"])
def test_a_merge_is_linear_in_its_scale(method: str) -> None:
    vectors = vectors_of(5, 3)
    same(merge(vectors, method, scale=0.5), dict(0.5 * merge(vectors, method, scale=1.0)))


def test_statistics_are_asked_for_and_checked() -> None:
    vectors = vectors_of(0, 2)
    ones = {name: torch.ones(shape) for name, shape in SHAPES.items()}

    def spoiled(name: str, value: float) -> dict[str, torch.Tensor]:
        worse = ones[name].clone()
        worse.view(-1)[-1] = value
        return ones | {name: worse}

    for message, method, measured in (
        ("fisher needs statistics", "fisher", None),
        ("ties takes no statistics", "ties", [{}, {}]),
        ("fisher: 2 task vectors, but statistics of 1", "fisher", [{}]),
        (r"of vector 0 for 'w' must be of shape \(6, 4\), got nothing", "fisher", [{}, {}]),
        (r"of vector 0 for 'w' must be of shape \(4, 4\), got \(3, 3\)", "regmean", [{"w": torch.eye(3)}] * 2),
        ("of vector 1 for 'w' must be of shape .*, got nothing", "regmean", [{"w": torch.eye(4)}, {}]),
        ("of vector 0 for 'w' must be of shape .*, got nothing", "regmean", [{}, {"w": torch.eye(4)}]),
        ("of vector 1 for 'v' have NaN or infinite values", "fisher", [ones, spoiled("v", torch.nan)]),
        ("of vector 1 for 'b' have NaN or infinite values", "fisher", [ones, spoiled("b", torch.inf)]),
        ("of vector 0 for 'b' have negative values", "fisher", [spoiled("b", -1.0), ones]),
        ("of vector 1 for 'w' have NaN", "regmean", [{"w": torch.eye(4)}, {"w": torch.full((4, 4), torch.nan)}]),
        ("of vector 0 for 'w' have negative values", "regmean", [{"w": -torch.eye(4)}, {"w": torch.eye(4)}]),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            merge(vectors, method, statistics=measured)
        assert "\n" not in str(caught.value)
    mixed = {"w": torch.tensor([[2.0, -1.0], [-1.0, 2.0]])}  # off the diagonal a G may well be negative
    merge([TaskVector({"w": torch.ones(3, 2)})], "regmean", statistics=[mixed])


class Tiny(nn.Module):
    """Two linear layers between a flatten and an embedding."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 5), nn.Linear(5, 3, bias=False)

    def forward(self, pixels):
        return self.second(torch.tanh(self.first(pixels.flatten(1))))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = ImageClassifier(Tiny(), 3 * torch.randn(4, 3), (0.5,) * 3, (0.2,) * 3).double()
    return model, torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8)


def test_the_fisher_diagonal_is_the_expectation_over_all_labels(tiny) -> None:
    """Slow reference: one backward pass for each picture and label, weighted by the model's share of that label."""
    model, images = tiny
    twin = copy.deepcopy(model)
    expected = {name: torch.zeros_like(p) for name, p in twin.tower.named_parameters()}
    for image in images:
        for label, share in enumerate(twin(image[None]).softmax(1)[0].tolist()):
            twin.zero_grad()
            F.log_softmax(twin(image[None]), dim=1)[0, label].backward()
            for name, p in twin.tower.named_parameters():
                expected[name] += share * p.grad**2 / len(images)
    assert_close(fisher_diagonal(model, images, device="cpu", batch_size=3), expected)
    assert_close(fisher_diagonal(model, images, seed=9, device="cpu", batch_size=7), expected)


def test_with_many_classes_fisher_draws_one_label_a_picture(tiny, monkeypatch) -> None:
    model, images = tiny
    exact = fisher_diagonal(model, images[:1], device="cpu")["second.weight"]
    monkeypatch.setattr(statistics, "EXACT_CLASSES", 3)  # the model has four
    twin = copy.deepcopy(model)
    shares = torch.cat([twin(images[i : i + 1]).softmax(1) for i in range(7)]).detach()
    labels = torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    expected = {name: torch.zeros_like(p) for name, p in twin.tower.named_parameters()}
    for image, label in zip(images, labels, strict=True):
        twin.zero_grad()
        F.log_softmax(twin(image[None]), dim=1)[0, label].backward()
        for name, p in twin.tower.named_parameters():
            expected[name] += p.grad**2 / 7
    assert_close(fisher_diagonal(model, images, seed=5, device="cpu", batch_size=7), expected)
    many = fisher_diagonal(model, images[:1].expand(4000, -1, -1, -1), seed=1, device="cpu", batch_size=500)
    assert_close(many["second.weight"], exact, rtol=0.15, atol=0.05 * float(exact.max()))


def test_gram_matrices_are_means_over_the_layers_inputs(tiny) -> None:
    model, images = tiny
    pixels = model.pixels(images).flatten(1)
    hidden = torch.tanh(model.tower.first(pixels))
    found = gram_matrices(model, images, device="cpu", batch_size=3)
    expected = {
        "first.weight": sum(torch.outer(x, x) for x in pixels) / 7,
        "second.weight": sum(torch.outer(x, x) for x in hidden) / 7,
    }
    assert_close(found, expected)
    assert_close(gram_matrices(model, images.repeat(5, 1, 1, 1), device="cpu"), expected)


def test_statistics_of_a_real_tower_fit_its_task_vectors() -> None:
    suite = load_suite("thimble")
    vectors, fisher, gram = [], [], []
    for seed, task in enumerate(suite.tasks):
        g = torch.Generator().manual_seed(seed)
        move = {n: 0.01 * torch.randn(p.shape, generator=g) for n, p in suite.tower().named_parameters()}
        vectors.append(TaskVector(move))
        model = suite.classifier(task, suite.tower(vectors[-1]))
        images = suite.tasks[task].train.images[:20]
        fisher.append(fisher_diagonal(model, images, device="cpu"))
        gram.append(gram_matrices(model, images, device="cpu"))
    assert set(fisher[0]) == set(vectors[0])
    assert len(gram[0]) == 6 * len(suite.tower().transformer.resblocks)
    for method, measured in (("fisher", fisher), ("regmean", gram)):
        merged = merge(vectors, method, statistics=measured)
        mean = merge(vectors, "average")
        assert (merged - mean).norm() > 1e-2 * mean.norm()
        alone = merge(vectors[:1], method, statistics=measured[:1])
        assert (alone - vectors[0]).norm() < 1e-3 * vectors[0].norm()


def test_statistics_of_sentence_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="of fisher are of pictures, and thimble-nli has sentence pairs"):
        statistics.suite_statistics(load_suite("thimble-nli"), {}, "fisher")
