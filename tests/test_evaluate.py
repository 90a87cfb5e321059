"""Accuracies, normalised accuracies and paired intervals."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saftnb.evaluate import (
    ModelFamily,
    SuiteAccuracy,
    accuracies,
    ensemble_hits,
    hierarchical_bootstrap,
    hits,
    individual_hits,
    interval_text,
    logits,
    normalised,
    seed_interval,
    suite_hits,
    with_mean,
)  # fmt: skip
from saftnb.finetune import recipe
from saftnb.suites import load_suite
from saftnb.task_vector import LowRank, TaskVector


@pytest.fixture(scope="module")
def suite():
    return load_suite("thimble")


def test_hits_are_the_pictures_whose_largest_logit_is_the_label(suite):
    model, split = suite.classifier("digits"), suite.tasks["digits"].test
    found = hits(model, split)
    with torch.no_grad():
        slow = [
            bool(model(image[None])[0].argmax() == label)
            for image, label in zip(split.images, split.labels, strict=True)
        ]
    assert found.tolist() == slow
    assert accuracies({"digits": found})["digits"] == pytest.approx(np.mean(slow))


def test_the_batch_size_does_not_matter(suite):
    model, images = suite.classifier("digits"), suite.tasks["digits"].test.images[:30]
    torch.testing.assert_close(logits(model, images, batch_size=7), logits(model, images), atol=1e-4, rtol=1e-4)


def test_a_zero_vector_is_the_pre_trained_model_and_another_is_not(suite):
    tower = suite.backbone.image_tower()
    zero = TaskVector({name: torch.zeros_like(p) for name, p in tower.named_parameters()})
    base = suite_hits(suite, split="validation")
    assert all(torch.equal(base[task], got) for task, got in suite_hits(suite, zero, split="validation").items())
    generator = torch.Generator().manual_seed(0)
    noise = TaskVector({name: 0.2 * torch.randn(p.shape, generator=generator) for name, p in tower.named_parameters()})
    other = suite_hits(suite, noise, split="validation")
    assert any(not torch.equal(base[task], other[task]) for task in base)
    few = suite_hits(suite, noise, split="validation", tasks=["patterns"], examples=30)
    assert list(few) == ["patterns"]
    assert torch.equal(few["patterns"], other["patterns"][:30])
    own = individual_hits(suite, {"digits": noise, "patterns": zero}, split="validation")
    assert torch.equal(own["digits"], other["digits"])
    assert torch.equal(own["patterns"], base["patterns"])


def test_the_ensemble_is_the_mean_of_the_experts_probabilities(suite):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in suite.tower().named_parameters()}
    vectors = {
        task: TaskVector({n: 0.05 * torch.randn(s, generator=generator) for n, s in shapes.items()})
        for task in suite.tasks
    }
    found = ensemble_hits(suite, vectors)
    for task, hit in found.items():
        split, total = suite.tasks[task].test, 0
        for vector in vectors.values():
            out = logits(suite.classifier(task, suite.tower(vector)), split.images).double()
            total = total + (out - out.logsumexp(dim=1, keepdim=True)).exp()
        assert torch.equal(hit, total.argmax(dim=1) == split.labels)
    same = ensemble_hits(suite, {"digits": vectors["digits"]})
    assert torch.equal(same["digits"], individual_hits(suite, vectors)["digits"])


@pytest.mark.parametrize("tangent", [False, True])
def test_a_family_is_each_model_set_up_on_its_own(suite, tangent):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in suite.tower().named_parameters()}
    draw = lambda: TaskVector({n: 0.03 * torch.randn(s, generator=generator) for n, s in shapes.items()})  # noqa: E731
    one, two = draw(), draw()
    part = TaskVector({name: two[name] for name in list(two)[::2]})  # some parameters do not move
    family = ModelFamily(suite, [one, part], tangent=tangent)
    for a, b in ((0.0, 0.0), (1.0, 0.5), (-0.5, 1.5), (1.0, 0.0)):
        moved = TaskVector({name: a * one[name] + (b * part[name] if name in part else 0) for name in one})
        model = suite.classifier("digits", suite.tower(moved, tangent=tangent))
        split = suite.tasks["digits"].test
        got = family.logits("digits", (a, b), pictures=40)
        torch.testing.assert_close(got, logits(model, split.images[:40]), atol=2e-3, rtol=1e-3)
        assert torch.equal(family.hits("digits", (a, b), pictures=40), got.argmax(dim=1) == split.labels[:40])
    with pytest.raises(ValueError, match="2 task vectors, but 1 coefficients"):
        family.logits("digits", [1.0])


def test_a_tangent_family_looks_at_the_pictures_once(suite, monkeypatch):
    from saftnb import evaluate

    calls = []
    real = evaluate.tangent_embeddings
    monkeypatch.setattr(evaluate, "tangent_embeddings", lambda *a: calls.append(1) or real(*a))
    vector = TaskVector({name: 0.01 * torch.ones_like(p) for name, p in suite.tower().named_parameters()})
    score = SuiteAccuracy(suite, tangent=True, tasks=["digits"], examples=50)
    curve = score.along(vector, [0.0, 0.5, 1.0, 2.0])
    assert len(calls) == 1
    assert curve[1] == score(0.5 * vector)
    assert curve[0] == accuracies(suite_hits(suite, split="validation", tasks=["digits"], examples=50))


def test_normalised_and_mean():
    assert normalised({"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.9}) == {"a": 0.5, "b": 1.0}
    assert np.isnan(normalised({"a": 0.4}, {"a": 0.0})["a"])
    table = with_mean(pd.DataFrame({"a": [0.2], "b": [0.4]}))
    assert table["mean"].tolist() == pytest.approx([0.3])


def table(values: list[list[float]]) -> pd.DataFrame:
    return pd.DataFrame(values, index=[f"b{i}" for i in range(len(values))])


def every_resample(values: list[list[float]]) -> list[float]:
    """Slow reference: each possible pick of rows and of columns once, all equally likely."""
    rows, columns = range(len(values)), range(len(values[0]))
    return [
        np.mean([[values[i][j] for j in some] for i in few])
        for few in itertools.product(rows, repeat=len(rows))
        for some in itertools.product(columns, repeat=len(columns))
    ]


def test_the_bootstrap_approaches_the_quantiles_of_all_resamples():
    values = [[0.0, 5.0, 1.0], [2.0, 3.0, -1.0], [-4.0, 1.0, 0.5]]
    exact = np.quantile(every_resample(values), [0.025, 0.975])
    mean, low, high = hierarchical_bootstrap(table(values), draws=40_000)
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx(exact, abs=0.06)


def test_rows_and_columns_both_count_and_a_seed_is_shared_by_all_backbones():
    assert hierarchical_bootstrap(table([[1.0] * 3, [3.0] * 3]))[1:] == (1.0, 3.0)  # all spread between backbones
    seeds = [0.0, 1.0, 5.0]
    shared = hierarchical_bootstrap(table([seeds, seeds, seeds]), draws=40_000)  # all spread between seeds:
    alone = hierarchical_bootstrap(table([seeds]), draws=40_000)  # three backbones then know no more than one
    assert shared == pytest.approx(alone, abs=0.06)
    assert alone[2] - alone[1] > 3


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000), st.floats(-3, 3))
def test_shifting_moves_the_interval_and_the_order_does_not(rows, columns, seed, shift):
    generator = np.random.default_rng(seed)
    frame = table(generator.normal(size=(rows, columns)).tolist())
    base = hierarchical_bootstrap(frame, draws=200)
    shuffled = frame.sample(frac=1, random_state=seed).sample(frac=1, axis=1, random_state=seed)
    assert hierarchical_bootstrap(shuffled, draws=200) == pytest.approx(base)
    assert frame.min().min() - 1e-9 <= base[1] <= base[2] <= frame.max().max() + 1e-9
    assert np.allclose(np.subtract(hierarchical_bootstrap(frame + shift, draws=200), base), shift, atol=1e-9)


def test_tables_with_holes_are_refused():
    for bad in (pd.DataFrame(), table([[1.0, np.nan]])):
        with pytest.raises(ValueError, match="a finite number in each cell"):
            hierarchical_bootstrap(bad)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6), st.sampled_from([0.5, 0.9, 0.95]))
def test_seed_interval_is_that_of_the_paired_t_test(gaps, level):
    """By the definition: the interval's ends are where a two-sided t test just rejects."""
    mean, low, high = seed_interval(gaps, level=level)
    assert mean == pytest.approx(sum(gaps) / len(gaps), abs=1e-9)
    assert high - mean == pytest.approx(mean - low, abs=1e-9)
    if np.std(gaps) > 1e-6:
        assert scipy.stats.ttest_1samp(gaps, low).pvalue == pytest.approx(1 - level, abs=1e-6)
        assert scipy.stats.ttest_1samp(gaps, high).pvalue == pytest.approx(1 - level, abs=1e-6)


def test_seed_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(1.0, 2.0, (4000, 3))
    inside = [low <= 1.0 <= high for _, low, high in map(seed_interval, draws)]
    assert 0.94 < np.mean(inside) < 0.96


def test_one_seed_has_no_interval():
    mean, low, high = seed_interval([0.5])
    assert mean == 0.5
    assert np.isnan(low)
    assert np.isnan(high)
    assert interval_text((mean, low, high)) == "+0.5"
    assert interval_text((-0.25, -1.0, 0.5), 2) == "−0.25 (−1.00 to +0.50)"
    for bad in ([], [1.0, np.nan]):
        with pytest.raises(ValueError, match="at least one difference"):
            seed_interval(bad)


def test_a_search_s_score_is_normalised_over_the_tasks_whose_own_model_hits(suite):
    vector = TaskVector({name: 0.01 * torch.ones_like(p) for name, p in suite.tower().named_parameters()})
    plain = SuiteAccuracy(suite, examples=30)(vector)
    both = SuiteAccuracy(suite, examples=30, individual={"digits": 0.5, "patterns": 0.8})(vector)
    assert both == pytest.approx({"digits": plain["digits"] / 0.5, "patterns": plain["patterns"] / 0.8})
    one = SuiteAccuracy(suite, examples=30, individual={"digits": 0.0, "patterns": 0.8})(vector)
    assert one == pytest.approx({"patterns": plain["patterns"] / 0.8})
    assert SuiteAccuracy(suite, examples=30, individual={"digits": 0.0, "patterns": 0.0})(vector) == plain


def test_a_suite_in_bf16_evaluates_and_trains_in_it(suite, monkeypatch):
    half = load_suite("thimble", precision="bf16")
    assert recipe("sgd", half).precision == "bf16"
    assert recipe("sgd@precision=float32", half).precision == "float32"
    images = suite.tasks["digits"].test.images[:20]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    exact, rounded = logits(suite.classifier("digits"), images), logits(half.classifier("digits"), images)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    embeddings = half.tower()(half.classifier("digits").pixels(images))  # a tower alone stays exact
    assert embeddings.dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="this cpu device has no bfloat16 instructions"):
        suite_hits(half, device="cpu")
    for name, message in (("thimble", "one of float32, bf16"), ("pocket-nli", "float32 alone for language models")):
        with pytest.raises(ValueError, match=f"precision is {message}, not 'fp8'"):
            load_suite(name, precision="fp8")


def test_a_language_model_is_scaled_where_its_vector_lies(monkeypatch):
    pairs = load_suite("thimble-nli")
    draw = torch.Generator().manual_seed(0)
    low = {name: LowRank(torch.randn(384, 2, generator=draw) / 9, torch.randn(2, 384, generator=draw) / 9)
           for name in pairs.backbone.layers[:6]}  # fmt: skip
    dense = {name: delta.dense() for name, delta in low.items()}
    for vector in (TaskVector(low), TaskVector(dense)):
        with monkeypatch.context() as patch:
            patch.setattr(TaskVector, "__rmul__", None)  # a copy for each scale
            found = SuiteAccuracy(pairs, examples=40).along(vector, [0.0, 0.7, 3.0])
        wanted = [accuracies(suite_hits(pairs, s * vector, split="validation", examples=40)) for s in (0.0, 0.7, 3.0)]
        assert found == wanted
        assert found[0] != found[2]
