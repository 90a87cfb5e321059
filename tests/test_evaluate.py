"""Accuracies, normalised accuracies and paired intervals."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saftnb.evaluate import (
    accuracies,
    hierarchical_bootstrap,
    hits,
    individual_hits,
    logits,
    normalised,
    paired_interval,
    suite_hits,
    with_mean,
)  # fmt: skip
from saftnb.suites import load_suite
from saftnb.task_vector import TaskVector


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
    few = suite_hits(suite, noise, split="validation", tasks=["patterns"], pictures=30)
    assert list(few) == ["patterns"]
    assert torch.equal(few["patterns"], other["patterns"][:30])
    own = individual_hits(suite, {"digits": noise, "patterns": zero}, split="validation")
    assert torch.equal(own["digits"], other["digits"])
    assert torch.equal(own["patterns"], base["patterns"])


def test_normalised_and_mean():
    assert normalised({"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.9}) == {"a": 0.5, "b": 1.0}
    table = with_mean(pd.DataFrame({"a": [0.2], "b": [0.4]}))
    assert table["mean"].tolist() == pytest.approx([0.3])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(20, 60))
def test_the_interval_matches_a_plain_bootstrap(seed, count):
    generator = np.random.default_rng(seed)
    ours = {t: torch.from_numpy(generator.random(count) < 0.7) for t in "ab"}
    theirs = {t: torch.from_numpy(generator.random(count) < 0.5) for t in "ab"}
    middle, low, high = paired_interval(ours, theirs)
    gaps = {t: ours[t].numpy().astype(float) - theirs[t].numpy().astype(float) for t in "ab"}
    assert middle == pytest.approx(np.mean([gap.mean() for gap in gaps.values()]))
    plain = [np.mean([generator.choice(gap, count).mean() for gap in gaps.values()]) for _ in range(800)]
    assert low == pytest.approx(np.quantile(plain, 0.025), abs=0.05)
    assert high == pytest.approx(np.quantile(plain, 0.975), abs=0.05)
    assert low <= middle <= high


def test_a_model_does_not_differ_from_itself():
    same = {"a": torch.tensor([True, False, True])}
    assert paired_interval(same, same) == (0.0, 0.0, 0.0)


def nested(values: dict[str, list[float]]) -> pd.DataFrame:
    rows = [{"backbone": b, "seed": i, "gain": v} for b, many in values.items() for i, v in enumerate(many)]
    return pd.DataFrame(rows)


def every_resample(values: dict[str, list[float]]) -> list[float]:
    """Slow reference: each possible resample once, all equally likely."""
    groups = list(values.values())
    inside = [[np.mean(pick) for pick in itertools.product(g, repeat=len(g))] for g in groups]
    return [
        np.mean(means)
        for places in itertools.product(range(len(groups)), repeat=len(groups))
        for means in itertools.product(*(inside[i] for i in places))
    ]


def test_it_approaches_the_quantiles_of_all_resamples():
    values = {"a": [0.0, 5.0], "b": [2.0, 3.0], "c": [-4.0, 1.0]}
    exact = np.quantile(every_resample(values), [0.025, 0.975])
    mean, low, high = hierarchical_bootstrap(nested(values), "gain", ("backbone", "seed"), draws=40_000)
    assert mean == pytest.approx(np.mean([np.mean(v) for v in values.values()]))
    assert (low, high) == pytest.approx(exact, abs=0.06)


def test_each_level_counts():
    between = {"a": [1.0, 1.0, 1.0], "b": [3.0, 3.0, 3.0]}  # all spread between backbones
    _, low, high = hierarchical_bootstrap(nested(between), "gain", ("backbone", "seed"))
    assert (low, high) == (1.0, 3.0)
    within = {"a": [1.0, 3.0], "b": [1.0, 3.0]}  # all spread between seeds
    _, low, high = hierarchical_bootstrap(nested(within), "gain", ("backbone", "seed"))
    assert (low, high) == (1.0, 3.0)
    one = nested({"a": [1.0, 2.0, 3.0]})
    assert hierarchical_bootstrap(one, "gain", ("backbone", "seed"))[0] == 2.0


def test_every_backbone_weighs_the_same_however_many_seeds_it_has():
    assert hierarchical_bootstrap(nested({"a": [0.0], "b": [1.0, 1.0, 1.0]}), "gain", ("backbone", "seed"))[0] == 0.5


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=4), min_size=1, max_size=4),
    st.floats(-3, 3),
    st.randoms(use_true_random=False),
)
def test_shifting_moves_it_and_the_order_of_rows_does_not(groups, shift, shuffler):
    frame = nested({f"b{i}": group for i, group in enumerate(groups)})
    base = hierarchical_bootstrap(frame, "gain", ("backbone", "seed"), draws=200)
    shuffled = frame.sample(frac=1, random_state=shuffler.randrange(1000))
    assert hierarchical_bootstrap(shuffled, "gain", ("backbone", "seed"), draws=200) == base
    assert frame["gain"].min() - 1e-9 <= base[1] <= base[2] <= frame["gain"].max() + 1e-9
    moved = hierarchical_bootstrap(frame.assign(gain=frame["gain"] + shift), "gain", ("backbone", "seed"), draws=200)
    assert np.allclose(np.subtract(moved, base), shift, atol=1e-9)


def test_bad_frames_are_refused():
    good = nested({"a": [1.0, 2.0]})
    with pytest.raises(ValueError, match="one row for each combination of backbone, seed"):
        hierarchical_bootstrap(pd.concat([good, good]), "gain", ("backbone", "seed"))
    with pytest.raises(ValueError, match="one row for each"):
        hierarchical_bootstrap(good.iloc[:0], "gain", ("backbone", "seed"))
    with pytest.raises(ValueError, match="gain holds a value that is not finite"):
        hierarchical_bootstrap(good.assign(gain=np.nan), "gain", ("backbone", "seed"))
