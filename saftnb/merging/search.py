"""Coefficient search: one shared set of hyperparameters for all tasks, chosen on validation data."""

import itertools
from collections.abc import Callable, Mapping, Sequence
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
    scales = list(grid.get("scale", [None]))
    others = {name: values for name, values in grid.items() if name != "scale"}
    rows, best, best_mean = [], None, float("-inf")
    combinations = [dict(zip(others, values, strict=True)) for values in itertools.product(*others.values())]
    with tqdm(total=len(combinations) * len(scales), desc=f"search {method}", disable=not progress) as bar:
        for combination in combinations:
            fixed = combination if scales == [None] else combination | {"scale": 1.0}
            merged = merge(vectors, method, space=space, **fixed)
            for scale in scales:
                vector = merged if scale is None else scale * merged
                point = combination if scale is None else combination | {"scale": scale}
                scores = score(vector)
                mean = sum(scores.values()) / len(scores)
                rows.append({**point, **scores, "mean": mean})
                if mean > best_mean:
                    best, best_mean = (vector, point), mean
                bar.update()
    edges = [name for name, values in grid.items() if len(values) > 1 and best[1][name] in (min(values), max(values))]
    return Search(best[0], best[1], pd.DataFrame(rows), edges)
