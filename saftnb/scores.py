"""Tables of scores: from hits to one long table, to cells "mean ± deviation", to differences with intervals."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import pandas as pd
from torch import Tensor

from saftnb.evaluate import accuracies, interval_text, normalised, seed_interval, with_mean

Key = TypeVar("Key", bound=tuple[object, ...])


def score_table(
    tested: Mapping[Key, Mapping[str, Tensor]], names: Sequence[str] = ("model", "recipe", "seed")
) -> pd.DataFrame:
    """One long table of all scores, in %.

    Args:
        tested: what was tested -> task -> hits, bool (n,), as `suite_hits` gives them. The first entry of a key is the
            model; the tasks' own models are called "individual".
        names: of the entries of the keys. Two models belong together where all but "model" and "space" is the same.

    Returns:
        a row for each key and measure, index ("measure", *names); a column for each task, and "mean". The measure
        "absolute" is the accuracy, "normalised" is divided by that of the task's own model (left out where there is
        none): it rises when that one gets worse, so never read it alone.

    Raises:
        ValueError: a key does not have as many entries as there are names.
    """
    for key in tested:
        if len(key) != len(names):
            raise ValueError(f"the key {key} does not have the entries {', '.join(names)}")

    def group(key: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(part for name, part in zip(names, key, strict=True) if name not in ("model", "space"))

    own = {group(key): accuracies(hits) for key, hits in tested.items() if key[0] == "individual"}
    rows = []
    for key, hits in tested.items():
        absolute, named = accuracies(hits), dict(zip(names, key, strict=True))
        rows.append({"measure": "absolute"} | named | absolute)
        if group(key) in own:
            rows.append({"measure": "normalised"} | named | normalised(absolute, own[group(key)]))
    return 100 * with_mean(pd.DataFrame(rows).set_index(["measure", *names]))


def spread(values: pd.Series) -> str:
    """ "50.5 ± 0.4": mean and standard deviation (n − 1), for `agg`; the mean alone where all values are the same."""
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if values.nunique() > 1 else "")


def differences(ours: pd.Series, theirs: pd.Series, *, level: float = 0.95) -> pd.DataFrame:
    """Ours minus theirs, formed within each training seed: the mean, its interval over the seeds, and a verdict.

    Args:
        ours, theirs: numbers with the same index, of which one level is called "seed".
        level: of Student's interval, see `seed_interval`: it covers training seeds alone.

    Returns:
        a row for each entry of the other levels ("all" where there is none); columns mean, low, high (in the units
        given), difference (these three as text) and verdict: "above 0", "below 0", "not clearly different", or
        "one seed, no verdict".

    Raises:
        ValueError: no level "seed", an entry that only one of the two has, or one that is not finite.
    """
    if "seed" not in ours.index.names or set(ours.index.names) != set(theirs.index.names):
        raise ValueError("both need the same index, with a level called 'seed'")
    theirs = theirs.reorder_levels(ours.index.names) if ours.index.nlevels > 1 else theirs
    if strange := sorted(set(ours.index) ^ set(theirs.index), key=str):
        raise ValueError(f"only one of the two has {strange[0]}")
    gap = ours - theirs.reindex(ours.index)
    others = [name for name in ours.index.names if name != "seed"]
    by = others[0] if len(others) == 1 else others  # a list of one would make tuples of its entries
    parts = gap.groupby(level=by, sort=False) if others else [("all", gap)]
    found = {entry: seed_interval(part.tolist(), level=level) for entry, part in parts}
    table = pd.DataFrame(found, index=["mean", "low", "high"]).T
    table.index.names = others or [None]
    table["difference"] = [interval_text(interval) for interval in found.values()]
    table["verdict"] = [verdict(low, high) for _, low, high in found.values()]
    return table


def verdict(low: float, high: float) -> str:
    """What an interval says of a difference; one that is NaN is of one seed."""
    if pd.isna(low):
        return "one seed, no verdict"
    return "above 0" if low > 0 else "below 0" if high < 0 else "not clearly different"
