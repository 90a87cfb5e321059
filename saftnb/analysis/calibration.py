"""What carries over from the papers' size: measured numbers against the ranges that would agree with known facts."""

import math
from collections.abc import Mapping
from typing import cast

import pandas as pd

from saftnb.evaluate import hierarchical_bootstrap, interval_text


def recovered_share(accuracy: pd.Series, zero_shot: pd.Series, individual: pd.Series) -> pd.Series:
    """100 · (merged − zero-shot) / (individual − zero-shot), row by row: 0 is no better than before any training, 100
    as good as each task's own model.

    Raises:
        ValueError: an individual model no better than zero-shot, where there is no gap to recover; or a share that is
            not finite.
    """
    gap = individual - zero_shot
    if not (gap > 0).all():
        raise ValueError("an individual model is no better than zero-shot: there is no gap of which to take a share")
    share = 100 * (accuracy - zero_shot) / gap
    if missing := [name for name, value in share.items() if not math.isfinite(value)]:
        raise ValueError(f"the share of {missing[0]} is not finite: an accuracy is missing")
    return share


def intervals(measured: Mapping[str, pd.Series], *, draws: int = 10_000) -> pd.DataFrame:
    """The mean of each number over backbones and seeds, with a 95 % interval that resamples both.

    Args:
        measured: key -> the numbers, index (backbone, seed). Only seeds that every backbone has are counted.

    Returns:
        a row for each key; columns mean, low, high (see `hierarchical_bootstrap`), least, most (the lowest and the
        highest mean of a backbone) and seeds.

    Raises:
        ValueError: a number that is not finite, or no seed that every backbone has.
    """
    rows = {}
    for key, numbers in measured.items():
        table = numbers.unstack("seed").dropna(axis=1)
        if table.empty or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{key}: a measured number is not finite, or no seed was run on every backbone")
        means = table.mean(axis=1)
        rows[key] = (*hierarchical_bootstrap(table, draws=draws), means.min(), means.max(), table.shape[1])
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "low", "high", "least", "most", "seeds"])


def calibrate(facts: pd.DataFrame, measured: Mapping[str, pd.Series], *, draws: int = 10_000) -> pd.DataFrame:
    """Each known fact beside what was measured, with a verdict.

    Args:
        facts: by key, with columns "unit", "from" and "to", see `saftnb.reference.known_facts`.
        measured: see `intervals`.

    The interval is 95 % and resamples backbones and seeds; with three backbones it is too narrow. So a verdict also
    asks every backbone:

        "carries over"   the interval and each backbone's mean lie inside the fact's range
        "does not"       they all lie outside of it, on one side
        "not clear"      anything else; "nothing to compare" where the fact has no range, "not measured" where we have
                         no number, "one seed, no verdict" where there is one

    Returns:
        the facts with columns mean, low, high, here (these three as text: two digits where there is no unit, else
        one; with a sign where the range has one end) and verdict.

    Raises:
        ValueError: a measured number of no known fact, or what `intervals` raises.
    """
    if unknown := measured.keys() - set(facts.index):
        raise ValueError(f"no known fact is called {sorted(unknown)[0]!r}")
    found = intervals(measured, draws=draws)
    words = {}
    for key, fact in facts.iterrows():
        if key not in measured:
            words[key] = ("", "not measured")
            continue
        mean, low, high, least, most, seeds = found.loc[key]
        start, end = cast("tuple[float, float]", (fact["from"], fact["to"]))
        here = interval_text((mean, low, high), 1 if str(fact["unit"]) else 2)
        if math.isfinite(end - start) or math.isnan(start):
            here = here.replace("+", "")
        said = _verdict(start, end, min(low, least), max(high, most))
        words[key] = here, said if seeds > 1 else "one seed, no verdict"
    table = facts.join(found[["mean", "low", "high"]])
    return table.join(pd.DataFrame.from_dict(words, orient="index", columns=["here", "verdict"]))


def _verdict(start: float, end: float, low: float, high: float) -> str:
    if math.isnan(start):
        return "nothing to compare"
    slack = 1e-9 * max(abs(low), abs(high), 1e-3)  # an end of the range counts, whatever a mean's last digit is
    if start - slack <= low and high <= end + slack:
        return "carries over"
    return "does not" if high < start or low > end else "not clear"
