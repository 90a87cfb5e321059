"""Coefficient search: one shared set of hyperparameters for all tasks, chosen on validation data."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from tqdm import tqdm

from saftnb.merging.registry import merge
from saftnb.task_vector import TaskVector


@dataclass(frozen=True, eq=False)
class Search:
    """What a search found.

    Attributes:
        vector: the merged task vector with the chosen coefficients.
        best: the chosen coefficients.
        curve: every point tried: a column for each coefficient, one for each task, and "mean".
        at_edge: the coefficients whose chosen value is an end of its grid: a wider grid might do better.
    """

    vector: TaskVector
    best: dict[str, float]
    curve: pd.DataFrame
    at_edge: list[str]


def search(
    vectors: Sequence[TaskVector],
    method: str,
    grid: Mapping[str, Sequence[float]],
    score: Callable[[TaskVector], Mapping[str, float]],
    *,
    space: str = "weights",
    progress: bool = True,
) -> Search:
    """Try every combination of a grid and keep the one with the best mean score (the first of equals).

    Args:
        vectors: one task vector a task.
        method, space: as for `merge`.
        grid: values to try for each hyperparameter; {} for a method without any.
        score: validation accuracy per task of θ0 plus a merged vector.

    A merge is linear in its `scale`, so each combination of the others is merged once, at scale 1.
    """
    rows, best, best_mean = [], None, float("-inf")
    with tqdm(total=_size(grid), desc=f"search {method}", disable=not progress) as bar:
        for point, (vector,) in _merges([vectors], method, space, grid):
            scores = score(vector)
            rows.append({**point, **scores, "mean": sum(scores.values()) / len(scores)})
            if rows[-1]["mean"] > best_mean:
                best, best_mean = (vector, point), rows[-1]["mean"]
            bar.update()
    return Search(best[0], best[1], pd.DataFrame(rows), _edges(grid, best[1]))


def _size(grid: Mapping[str, Sequence[float]]) -> int:
    return math.prod(len(values) for values in grid.values())


def _merges(
    groups: Sequence[Sequence[TaskVector]], method: str, space: str, grid: Mapping[str, Sequence[float]]
) -> Iterator[tuple[dict[str, float], list[TaskVector]]]:
    """Every point of the grid with the merges of all groups there; scales come last, as multiples of one merge."""
    others = {name: values for name, values in grid.items() if name != "scale"}
    for values in itertools.product(*others.values()):
        point = dict(zip(others, values, strict=True))
        if "scale" not in grid:
            yield point, [merge(group, method, space=space, **point) for group in groups]
            continue
        merged = [merge(group, method, space=space, scale=1.0, **point) for group in groups]
        for scale in grid["scale"]:
            yield point | {"scale": scale}, [scale * vector for vector in merged]


def _edges(grid: Mapping[str, Sequence[float]], best: Mapping[str, float]) -> list[str]:
    return [name for name, values in grid.items() if len(values) > 1 and best[name] in (min(values), max(values))]


@dataclass(frozen=True, eq=False)
class SubsetSearch:
    """What a search over all subsets of one size found: `best`, `curve` (a row a point) and `at_edge` as in `Search`;
    `vectors` holds, for each subset of tasks, the merged vector with the chosen coefficients."""

    vectors: dict[tuple[str, ...], TaskVector]
    best: dict[str, float]
    curve: pd.DataFrame
    at_edge: list[str]


def search_subsets(
    vectors: Mapping[str, TaskVector],
    size: int,
    method: str,
    grid: Mapping[str, Sequence[float]],
    score: Callable[[TaskVector, tuple[str, ...]], Mapping[str, float]],
    *,
    space: str = "weights",
    progress: bool = True,
) -> SubsetSearch:
    """One set of coefficients for the merges of all subsets of `size` tasks: the best mean score over the subsets.

    Args:
        vectors: task -> task vector.
        grid: as for `search`.
        score: validation accuracy per task of θ0 plus a merged vector, on the tasks of its subset.

    Raises:
        ValueError: `size` is not 1 to the number of tasks.
    """
    if not 1 <= size <= len(vectors):
        raise ValueError(f"size is 1 to {len(vectors)}, not {size}")
    subsets = list(itertools.combinations(vectors, size))
    groups = [[vectors[task] for task in subset] for subset in subsets]
    rows, best, best_mean = [], None, float("-inf")
    with tqdm(total=_size(grid), desc=f"search {method}, {size} tasks", disable=not progress) as bar:
        for point, merged in _merges(groups, method, space, grid):
            scores = [score(vector, subset) for vector, subset in zip(merged, subsets, strict=True)]
            means = [sum(one.values()) / len(one) for one in scores]
            rows.append({**point, "mean": sum(means) / len(means)})
            if rows[-1]["mean"] > best_mean:
                best, best_mean = (merged, point), rows[-1]["mean"]
            bar.update()
    chosen = dict(zip(subsets, best[0], strict=True))
    return SubsetSearch(chosen, best[1], pd.DataFrame(rows), _edges(grid, best[1]))
