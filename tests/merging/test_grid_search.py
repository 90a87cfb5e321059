"""Coefficient search tries every point and keeps the best."""

import itertools

import pandas as pd
import pytest
import torch

from saftnb.merging import merge
from saftnb.merging.grid_search import Search, coordinate_search, per_target, search, search_subsets
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


def test_a_draw_has_no_ends():
    given = vectors()
    grid = {"scale": [0.1, 0.5, 1.0], "drop": [0.1, 0.5, 0.9], "seed": [0, 1]}
    found = search(given, "dare_task_arithmetic", grid, closeness(0.5 * given[0]["w"]), progress=False)
    assert found.best["seed"] in (0, 1)
    assert "seed" not in found.at_edge


def test_equal_scores_keep_the_first_point_and_a_method_without_coefficients_has_one():
    given = vectors()
    found = search(given, "task_arithmetic", {"scale": [0.3, 0.1, 0.2]}, lambda vector: {"a": 0.5}, progress=False)
    assert found.best == {"scale": 0.3}
    average = search(given, "average", {}, lambda vector: {"a": 0.5}, progress=False)
    assert average.best == {}
    assert len(average.curve) == 1
    torch.testing.assert_close(average.vector["w"], merge(given, "average")["w"])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_subsets_share_one_point_the_best_on_average(size):
    named = dict(zip("abcd", vectors(4), strict=True))
    generator = torch.Generator().manual_seed(1)
    wanted = {task: torch.randn(6, 5, generator=generator) for task in named}

    def score(vector, subset):
        return {task: -float((vector["w"] - wanted[task]).norm()) for task in subset}

    grid = {"keep": [0.3, 1.0], "scale": [0.1, 0.5, 2.0]}
    found = search_subsets(named, size, "ties", grid, score, progress=False)
    slow = {}
    for keep, scale in itertools.product(*grid.values()):
        merged = {
            s: merge([named[t] for t in s], "ties", keep=keep, scale=scale)
            for s in itertools.combinations("abcd", size)
        }
        slow[keep, scale] = (sum(sum(score(v, s).values()) / size for s, v in merged.items()) / len(merged), merged)
    best = max(slow, key=lambda point: slow[point][0])
    assert (found.best["keep"], found.best["scale"]) == best
    assert found.curve["mean"].tolist() == pytest.approx([slow[point][0] for point in slow], abs=1e-5)
    assert found.vectors.keys() == slow[best][1].keys()
    for subset, vector in slow[best][1].items():
        torch.testing.assert_close(found.vectors[subset]["w"], vector["w"], atol=1e-6, rtol=1e-5)


def test_subsets_of_all_tasks_are_the_plain_search_and_others_sizes_are_refused():
    named = dict(zip("abc", vectors(), strict=True))
    target = closeness(3 * named["a"]["w"])
    grid = {"scale": [0.1, 0.5, 1.0]}
    plain = search(list(named.values()), "task_arithmetic", grid, target, progress=False)
    found = search_subsets(named, 3, "task_arithmetic", grid, lambda v, _: target(v), progress=False)
    assert (found.best, found.at_edge) == (plain.best, plain.at_edge)
    assert found.curve["mean"].tolist() == plain.curve["mean"].tolist()
    with pytest.raises(ValueError, match="size is 1 to 3, not 4"):
        search_subsets(named, 4, "average", {}, lambda v, _: {"a": 0.0})


def test_per_target_takes_each_tasks_own_best_point():
    vectors = [TaskVector({"w": torch.tensor([1.0, 0.0])}), TaskVector({"w": torch.tensor([0.0, 1.0])})]
    wanted = {"a": 0.5, "b": 2.0}

    def score(vector):
        return {task: -abs(float(vector["w"][0]) - best) for task, best in wanted.items()}

    found = search(vectors, "task_arithmetic", {"scale": [0.5, 1.0, 2.0]}, score, progress=False)
    each = per_target(vectors, "task_arithmetic", found)
    assert {task: point for task, (point, _) in each.items()} == {"a": {"scale": 0.5}, "b": {"scale": 2.0}}
    for task, (_, vector) in each.items():
        assert torch.equal(vector["w"], torch.tensor([1.0, 1.0]) * wanted[task])
        assert found.curve[task].max() == score(vector)[task]


def test_a_search_over_scales_hands_them_over_at_once():
    class Score:
        def __init__(self):
            self.calls = []

        def along(self, vector, scales):
            self.calls.append(list(scales))
            return [{"a": -abs(scale - 0.3)} for scale in scales]

    vectors, score = [TaskVector({"w": torch.ones(4)})] * 2, Score()
    found = search(vectors, "ties", {"keep": [0.5, 1.0], "scale": [0.1, 0.3, 0.9]}, score, progress=False)
    assert score.calls == [[0.1, 0.3, 0.9]] * 2
    assert found.best == {"keep": 0.5, "scale": 0.3}
    assert torch.equal(found.vector["w"], merge(vectors, "ties", keep=0.5, scale=0.3)["w"])


def test_a_coordinate_search_goes_along_one_hyperparameter_after_the_other():
    """By a slow one, which merges at every point and follows the rule in words."""
    given = vectors()
    target = merge(given, "ties", keep=0.6, scale=0.8)["w"]
    grid = {"scale": [0.2, 0.5, 0.8, 1.1], "keep": [0.2, 0.4, 0.6, 1.0]}
    found = coordinate_search(given, "ties", grid, closeness(target), progress=False)

    def mean(point):
        return closeness(target)(merge(given, "ties", **point))["a"] / 2

    at = {"scale": None, "keep": 0.2}  # the method's own default
    visited = []
    for name in grid:
        points = [at | {name: value} for value in grid[name]]
        visited += [point for point in points if point not in visited]
        at = max(points, key=mean)
    assert found.best == at
    assert len(found.curve) == len(visited) == 7
    for row, point in zip(found.curve.to_dict("records"), visited, strict=True):
        assert {name: row[name] for name in grid} == point
        assert row["mean"] == pytest.approx(mean(point), abs=1e-5)
    torch.testing.assert_close(found.vector["w"], merge(given, "ties", **at)["w"], atol=1e-6, rtol=1e-5)
    other = coordinate_search(given, "ties", grid, closeness(target), start={"keep": 0.6}, progress=False)
    assert other.best == {"scale": 0.8, "keep": 0.6}
    assert other.at_edge == []


def test_a_coordinate_search_refuses_what_the_method_lacks():
    with pytest.raises(ValueError, match="ties has no hyperparameter 'drop'"):
        coordinate_search(vectors(), "ties", {"drop": [0.1]}, closeness(0), progress=False)
    with pytest.raises(ValueError, match="no value for 'scale'"):
        search(vectors(), "ties", {"scale": []}, closeness(0), progress=False)
    with pytest.raises(ValueError, match="there is no merge method 'tie'"):
        coordinate_search(vectors(), "tie", {"scale": [1.0]}, closeness(0), progress=False)
    with pytest.raises(ValueError, match="start names 'kep', which is not in the grid"):
        coordinate_search(vectors(), "ties", {"scale": [1.0]}, closeness(0), start={"kep": 1}, progress=False)
    with pytest.raises(ValueError, match="an empty grid"):
        coordinate_search(vectors(), "ties", {}, closeness(0), progress=False)


def test_a_search_says_its_choice_and_stars_an_end_of_the_grid():
    found = Search(None, {"scale": 0.3, "keep": 0.1, "seed": 2}, pd.DataFrame(), ["keep"])
    assert str(found) == "λ 0.3, keep 0.1, draw 2*"
    assert str(Search(None, {"scale": 0.3}, pd.DataFrame(), [])) == "λ 0.3"


@pytest.mark.parametrize("seek", [search, coordinate_search])
def test_scores_that_are_no_numbers_choose_nothing(seek):
    with pytest.raises(FloatingPointError, match="search ties: the score of a is nan at {'scale': 0.5}"):
        seek(vectors(), "ties", {"scale": [0.5, 1.0]}, lambda vector: {"a": float("nan")}, progress=False)
    with pytest.raises(FloatingPointError, match="search average: the score of a is nan"):
        by_task = dict(zip("ab", vectors(2), strict=True))
        search_subsets(by_task, 1, "average", {}, lambda vector, subset: {"a": float("nan")}, progress=False)
