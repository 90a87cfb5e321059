"""Coefficient search: one shared set of hyperparameters for all tasks, chosen on validation data."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from saftnb.evaluate import naming
from saftnb.merging.combine import Experts, Representation, Statistics, represent
from saftnb.merging.registry import methods
from saftnb.progress import progress_bar
from saftnb.task_vector import TaskVector


@dataclass(frozen=True, eq=False)
class Search:
    """What a search found.

    Attributes:
        vector: the merged task vector with the chosen coefficients.
        best: the chosen coefficients.
        curve: every point tried: a column for each coefficient, one for each task, and "mean".
        at_edge: the coefficients whose chosen value is an end of its grid: a wider grid might do better. (A seed has no
            ends.)
    """

    vector: TaskVector
    best: dict[str, float]
    curve: pd.DataFrame
    at_edge: list[str]

    def __str__(self) -> str:
        """The chosen coefficients, "λ 0.3, keep 0.1*"; the star says that one of them is an end of its grid."""
        names = {"scale": "λ", "seed": "draw"}
        chosen = ", ".join(f"{names.get(name, name)} {value:g}" for name, value in self.best.items())
        return chosen + ("*" if self.at_edge else "")


def search(
    vectors: Experts | Representation,
    method: str,
    grid: Mapping[str, Sequence[float]],
    score: Callable[[TaskVector], Mapping[str, float]],
    *,
    statistics: Statistics | None = None,
    progress: bool = True,
) -> Search:
    """Try every combination of a grid and keep the one with the best mean score (the first of equals).

    Args:
        vectors: one task vector a task; or these in a merge space, `represent(vectors, "knots")`, decomposed once.
        method, statistics: as for `merge`.
        grid: values to try for each hyperparameter; {} for a method without any.
        score: validation accuracy per task of θ0 plus a merged vector. Where it has a method `along(vector, scales)`
            (as `SuiteAccuracy` has), that gives those of all scales at once.

    A merge is linear in its `scale`, so each combination of the others is merged once, at scale 1.

    Raises:
        FloatingPointError: a score that is not finite; the line names task and point.
    """
    check_grid(method, grid)
    rows: list[dict[str, float]] = []
    best: tuple[TaskVector, float, dict[str, float]] | None = None
    best_mean = float("-inf")
    with progress_bar(total=_size(grid), desc=f"search {method}", disable=not progress) as bar:
        for point, (vector,), scales in _directions([_represented(vectors)], method, grid, statistics):
            points = _points(point, grid)
            for here, scale, scores in zip(points, scales, _scores(score, vector, scales, method, points), strict=True):
                rows.append({**here, **scores, "mean": sum(scores.values()) / len(scores)})
                if rows[-1]["mean"] > best_mean:
                    best, best_mean = (vector, scale, here), rows[-1]["mean"]
                bar.update()
    assert best is not None  # the grid is not empty, and all scores are finite
    vector, scale, chosen = best
    return Search(scale * vector, chosen, pd.DataFrame(rows), _edges(grid, chosen))


def coordinate_search(
    vectors: Experts | Representation,
    method: str,
    grid: Mapping[str, Sequence[float]],
    score: Callable[[TaskVector], Mapping[str, float]],
    *,
    start: Mapping[str, float] | None = None,
    progress: bool = True,
) -> Search:
    """One hyperparameter after the other, in the grid's order, each at the best value with those before it chosen and
    those after it at their start (KnOTS, arXiv 2410.19735: λ, then keep, then p). The first of equals is kept.

    A start that is no value of its grid stays where no value of that grid is better.

    Args:
        vectors, method, grid, score: as for `search`.
        start: values to begin with, of hyperparameters in the grid; the method's own defaults for those not named.

    Raises:
        ValueError: no such method, a name that it or the grid does not have, or an empty grid.
    """
    check_grid(method, grid)
    strange = [name for name in start or {} if name not in grid]
    if strange:
        raise ValueError(f"start names {strange[0]!r}, which is not in the grid")
    if not grid:
        raise ValueError("an empty grid has no coordinate")
    there, known = _represented(vectors), methods()[method].hyperparameters
    chosen: dict[str, float] = {name: known[name].default for name in grid} | dict(start or {})
    rows: list[dict[str, float]] = []
    best: tuple[TaskVector, float, dict[str, float]] | None = None
    best_mean = float("-inf")
    with progress_bar(total=sum(map(len, grid.values())), desc=f"search {method}", disable=not progress) as bar:
        for name, values in grid.items():
            new = [v for v in values if not any(chosen | {name: v} == {n: row[n] for n in grid} for row in rows)]
            line = {other: [value] for other, value in chosen.items()} | {name: new}
            for point, (vector,), scales in _directions([there], method, line):
                points = _points(point, line)
                for here, scale, scores in zip(
                    points, scales, _scores(score, vector, scales, method, points), strict=True
                ):
                    rows.append({**here, **scores, "mean": sum(scores.values()) / len(scores)})
                    if rows[-1]["mean"] > best_mean:
                        best, best_mean = (vector, scale, here), rows[-1]["mean"]
            bar.update(len(values))
            assert best is not None
            chosen = {n: best[2][n] for n in grid}
    assert best is not None  # the grid is not empty, and all scores are finite
    vector, scale, _ = best
    return Search(scale * vector, chosen, pd.DataFrame(rows), _edges(grid, chosen))


def check_grid(method: str, grid: Mapping[str, Sequence[float]]) -> None:
    """Raises ValueError on an unknown method, a name that it does not have, or an empty list of values."""
    if method not in methods():
        raise ValueError(f"there is no merge method {method!r}; allowed are {', '.join(sorted(methods()))}")
    for name, values in grid.items():
        if name not in methods()[method].hyperparameters:
            raise ValueError(f"{method} has no hyperparameter {name!r}")
        if not len(values):
            raise ValueError(f"{method}: the grid has no value for {name!r}")


def _size(grid: Mapping[str, Sequence[float]]) -> int:
    return math.prod(len(values) for values in grid.values())


def _represented(vectors: Experts | Representation) -> Representation:
    return vectors if isinstance(vectors, Representation) else represent(vectors)


def _directions(
    groups: Sequence[Representation],
    method: str,
    grid: Mapping[str, Sequence[float]],
    statistics: Statistics | None = None,
) -> Iterator[tuple[dict[str, float], list[TaskVector], Sequence[float]]]:
    """Every combination of what is not a scale, the merges of all groups there at scale 1, and the scales to try."""
    others = {name: values for name, values in grid.items() if name != "scale"}
    unit = {"scale": 1.0} if "scale" in grid else {}
    for values in itertools.product(*others.values()):
        point = dict(zip(others, values, strict=True))
        merged = [group.merge(method, statistics=statistics, **point, **unit) for group in groups]
        yield point, merged, grid.get("scale", [1.0])


def _points(point: dict[str, float], grid: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    return [point | {"scale": scale} for scale in grid["scale"]] if "scale" in grid else [point]


def _scores(
    score: Callable[[TaskVector], Mapping[str, float]], vector: TaskVector, scales: Sequence[float], method: str,
    points: Sequence[Mapping[str, float]],
) -> Iterator[Mapping[str, float]]:  # fmt: skip
    """The scores at the points, all of which have a finite number for each task: NaN would never be the largest, and
    the search would go past it in silence."""
    with naming(f"search {method}"):
        along = getattr(score, "along", None)
        every = (score(s * vector) for s in scales) if along is None else along(vector, scales)
        for point, scores in zip(points, every, strict=True):
            yield _finite(scores, point)


def _finite(scores: Mapping[str, float], point: Mapping[str, float]) -> Mapping[str, float]:
    if bad := [task for task, value in scores.items() if not math.isfinite(value)]:
        raise FloatingPointError(f"the score of {bad[0]} is {scores[bad[0]]} at {dict(point)}")
    return scores


def _edges(grid: Mapping[str, Sequence[float]], best: Mapping[str, float]) -> list[str]:
    ordered = {name: values for name, values in grid.items() if len(values) > 1 and name != "seed"}
    return [name for name, values in ordered.items() if best[name] in (min(values), max(values))]


def per_target(
    vectors: Experts | Representation,
    method: str,
    found: Search,
    *,
    statistics: Statistics | None = None,
) -> dict[str, tuple[dict[str, float], TaskVector]]:
    """For each task the point of a search that is best on that task alone, and the merged vector there.

    The protocol of SAFT's released code (arXiv 2504.14662): the merged model then differs from task to task.
    """
    there, coefficients = _represented(vectors), list(found.best)
    tasks: list[str] = [column for column in found.curve if column not in (*coefficients, "mean")]
    merged: dict[tuple[float, ...], TaskVector] = {}
    result: dict[str, tuple[dict[str, float], TaskVector]] = {}
    for task in tasks:
        row = found.curve.loc[found.curve[task].idxmax()]
        point: dict[str, float] = {name: row[name].item() for name in coefficients}
        unit = point | {"scale": 1.0} if "scale" in point else point
        key = tuple(unit.values())
        if key not in merged:
            merged[key] = there.merge(method, statistics=statistics, **unit)
        result[task] = point, point.get("scale", 1.0) * merged[key]
    return result


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
    check_grid(method, grid)
    subsets = list(itertools.combinations(vectors, size))
    groups = [represent([vectors[task] for task in subset], space) for subset in subsets]
    rows: list[dict[str, float]] = []
    best: dict[str, float] | None = None
    best_mean = float("-inf")
    with progress_bar(total=_size(grid), desc=f"search {method}, {size} tasks", disable=not progress) as bar:
        for point, merged, scales in _directions(groups, method, grid):
            for here, scale in zip(_points(point, grid), scales, strict=True):
                with naming(f"search {method}"):
                    pairs = zip(merged, subsets, strict=True)
                    scores = [_finite(score(scale * vector, subset), here) for vector, subset in pairs]
                means = [sum(one.values()) / len(one) for one in scores]
                rows.append({**here, "mean": sum(means) / len(means)})
                if rows[-1]["mean"] > best_mean:
                    best, best_mean = here, rows[-1]["mean"]
                bar.update()
    assert best is not None  # the grid is not empty, and all scores are finite
    # Merged again: at full size there is no room for two points' merges of all subsets.
    unit = {"scale": 1.0} if "scale" in best else {}
    chosen = {
        subset: best.get("scale", 1.0) * group.merge(method, statistics=None, **best | unit)
        for subset, group in zip(subsets, groups, strict=True)
    }
    return SubsetSearch(chosen, best, pd.DataFrame(rows), _edges(grid, best))
