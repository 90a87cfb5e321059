"""No number of an analysis is NaN or infinite without a reason that its function states."""

import math
from collections.abc import Mapping

import pandas as pd

from saftnb.delta import is_finite
from saftnb.task_vector import TaskVector


def finite_table(table: pd.DataFrame, what: str) -> pd.DataFrame:
    """The table as it is.

    Raises:
        FloatingPointError: a number in it that is not finite; the line names its column and its row.
    """
    for column in table.select_dtypes("number"):
        for place, value in enumerate(table[column].tolist()):
            if not math.isfinite(value):
                row = ", ".join(f"{name} {entry}" for name, entry in table.iloc[place].items() if name != column)
                raise FloatingPointError(f"{what}: {column} is {value} at {row or f'row {place}'}")
    return table


def require_finite(vectors: Mapping[str, TaskVector]) -> None:
    """Raises FloatingPointError, which names task and parameter, unless all deltas are finite."""
    for task, vector in vectors.items():
        for name, delta in vector.items():
            if not is_finite(delta):
                raise FloatingPointError(f"the task vector of {task} has NaN or infinite values in {name!r}")
