"""Paired differences over backbones and seeds: how the evidence notebook turns many runs into an answer.

A frame has a row for each tested model and task: columns recipe, backbone, seed, method, task (of subsets also size and
tasks) and a value between 0 and 1.
"""

import math
from collections.abc import Sequence

import pandas as pd

from saftnb.evaluate import hierarchical_bootstrap, interval_text
from saftnb.scores import verdict

_KEYS = ("backbone", "seed", "method", "task", "size", "tasks")


def paired_gains(frame: pd.DataFrame, base: str, value: str = "accuracy") -> pd.DataFrame:
    """The frame with a column "gain": 100 · (value − that of recipe `base`), within backbone, seed, method and task.

    Raises:
        ValueError: a row has no row of `base` to be compared with, or a value is missing.
    """
    keys = [key for key in _KEYS if key in frame]
    paired = frame.merge(frame[frame["recipe"] == base], on=keys, suffixes=("", "_base"), validate="many_to_one")
    gain = 100 * (paired[value] - paired[f"{value}_base"])
    if len(paired) != len(frame) or bool(gain.isna().any()):
        raise ValueError(f"a run has no {base} to be compared with, or a missing {value}")
    return paired.assign(gain=gain)


def gain_intervals(gains: pd.DataFrame, by: str | Sequence[str], *, draws: int = 10_000) -> pd.DataFrame:
    """The mean gain of each group, with an interval that resamples backbones and seeds, see `hierarchical_bootstrap`.

    Args:
        gains: see `paired_gains`. by: the columns that make a group, such as "recipe".

    Only seeds that every backbone of a group has are counted; first the mean of a backbone and seed is taken.

    Returns:
        a row a group; columns: those of `by`, mean, low, high (points), difference (these as text), backbones above
        (on how many the mean gain is above 0), verdict. It is "above 0" or "below 0" only where the interval excludes 0
        and every backbone agrees, else "not clearly different"; with one seed it is "one seed, no verdict".
    """
    by = [by] if isinstance(by, str) else list(by)
    rows = []
    for entry, part in gains.groupby(by, sort=False):
        table = part.pivot_table(index="backbone", columns="seed", values="gain").dropna(axis=1)
        mean, low, high = hierarchical_bootstrap(table, draws=draws)
        above = (table.mean(axis=1) > 0).sum()
        names = entry if isinstance(entry, tuple) else (entry,)
        row: dict[str, object] = {**dict(zip(by, names, strict=True)), "mean": mean, "low": low, "high": high}
        row["difference"] = interval_text((mean, low, high))
        row["backbones above"] = f"{above} of {len(table)}"
        if table.shape[1] == 1:
            low = high = math.nan  # backbones alone give no verdict
        elif above not in (0, len(table)):
            low, high = -math.inf, math.inf  # they do not agree
        row["verdict"] = verdict(low, high)
        rows.append(row)
    columns = [*by, "mean", "low", "high", "difference", "backbones above", "verdict"]
    return pd.DataFrame(rows, columns=columns)
