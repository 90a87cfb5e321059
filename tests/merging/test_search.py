"""Coefficient search tries every point and keeps the best."""

import pytest
import torch

from saftnb.merging import merge
from saftnb.merging.search import search
from saftnb.task_vector import TaskVector


def vectors(count=3):
    generator = torch.Generator().manual_seed(0)
    return [TaskVector({"w": torch.randn(6, 5, generator=generator)}) for _ in range(count)]


def closeness(target):
    return lambda vector: {"a": -float((vector["w"] - target).norm()), "b": 0.0}


def test_every_point_is_a_direct_merge_and_the_best_is_kept():
    given = vectors()
    target = merge(given, "ties", keep=0.4, scale=0.7)["w"]
    seen = []

    def score(vector):
        seen.append(vector["w"])
        return closeness(target)(vector)

    grid = {"keep": [0.2, 0.4, 1.0], "scale": [0.1, 0.7, 1.0]}
    found = search(given, "ties", grid, score, progress=False)
    assert found.best == {"keep": 0.4, "scale": 0.7}
    assert found.at_edge == []
    assert len(found.curve) == 9
    for (_, row), got in zip(found.curve.iterrows(), seen, strict=True):
        direct = merge(given, "ties", keep=row["keep"], scale=row["scale"])
        torch.testing.assert_close(got, direct["w"], atol=1e-6, rtol=1e-5)
    assert found.curve["mean"].max() == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(found.vector["w"], target, atol=1e-6, rtol=1e-5)


def test_a_winner_at_an_end_of_its_grid_is_named():
    given = vectors()
    found = search(given, "task_arithmetic", {"scale": [0.1, 0.2]}, closeness(10 * given[0]["w"]), progress=False)
    assert found.at_edge == ["scale"]


def test_equal_scores_keep_the_first_point_and_a_method_without_coefficients_has_one():
    given = vectors()
    found = search(given, "task_arithmetic", {"scale": [0.3, 0.1, 0.2]}, lambda vector: {"a": 0.5}, progress=False)
    assert found.best == {"scale": 0.3}
    average = search(given, "average", {}, lambda vector: {"a": 0.5}, progress=False)
    assert average.best == {}
    assert len(average.curve) == 1
    torch.testing.assert_close(average.vector["w"], merge(given, "average")["w"])
