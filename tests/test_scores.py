"""Tables of scores, against sums by hand."""

import math

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import saftnb as sn

NAMES = ("model", "space", "recipe", "seed")


def hits(*rights: int) -> dict[str, torch.Tensor]:
    """Tasks "a", "b", … with so many of four pictures right."""
    return {task: torch.arange(4) < right for task, right in zip("abc", rights, strict=False)}


def test_the_table_of_scores_by_hand():
    tested = {
        ("individual", "", "lora", 0): hits(4, 2),
        ("ties", "knots", "lora", 0): hits(2, 1),
        ("ties", "knots", "lora", 1): hits(3, 3),  # no own models of this seed: nothing to divide by
    }
    table = sn.score_table(tested, NAMES)
    assert table.index.names == ["measure", *NAMES]
    assert table.loc[("absolute", "ties", "knots", "lora", 0)].to_dict() == {"a": 50, "b": 25, "mean": 37.5}
    assert table.loc[("normalised", "ties", "knots", "lora", 0)].to_dict() == {"a": 50, "b": 50, "mean": 50}
    assert table.loc[("normalised", "individual", "", "lora", 0), "mean"] == 100
    assert ("normalised", "ties", "knots", "lora", 1) not in table.index
    with pytest.raises(ValueError, match="the key .* does not have the entries model, recipe, seed"):
        sn.score_table(tested, ("model", "recipe", "seed"))


def test_cells():
    assert sn.spread(pd.Series([50.0, 52.0, 54.0])) == "52.0 ± 2.0"
    assert sn.spread(pd.Series([50.04])) == sn.spread(pd.Series([50.04, 50.04])) == "50.0"


def series(values: dict[tuple, float]) -> pd.Series:
    return pd.Series(values).rename_axis(["method", "seed"])


def test_differences_are_formed_within_each_seed():
    ours = series({("ties", 0): 51.0, ("ties", 1): 53.0, ("ties", 2): 55.0, ("average", 0): 1.0, ("average", 1): 1.0})
    theirs = series({("average", 1): 3.0, ("average", 0): 2.0, ("ties", 2): 52.0, ("ties", 1): 51.0, ("ties", 0): 50.0})
    table = sn.differences(ours, theirs)
    assert list(table.index) == ["ties", "average"]
    mean, deviation = 2.0, 1.0  # of 1, 2 and 3
    reach = stats.t.ppf(0.975, 2) * deviation / math.sqrt(3)
    assert table.loc["ties", ["mean", "low", "high"]].tolist() == pytest.approx([mean, mean - reach, mean + reach])
    assert table.loc["ties", "difference"] == "+2.0 (−0.5 to +4.5)"
    assert table.loc["ties", "verdict"] == "not clearly different"
    assert sn.differences(ours, theirs, level=0.8).loc["ties", "verdict"] == "above 0"
    assert sn.differences(theirs, ours, level=0.8).loc["ties", "verdict"] == "below 0"


def test_one_seed_has_no_verdict_and_one_level_one_row():
    one = pd.Series([1.5], index=pd.Index([0], name="seed"))
    table = sn.differences(one, one - 1)
    assert list(table.index) == ["all"]
    assert table.loc["all", ["mean", "difference", "verdict"]].tolist() == [1.0, "+1.0", "one seed, no verdict"]


@pytest.mark.parametrize("other", [{("ties", 1): 1.0}, {("ties", 0): 1.0, ("ties", 1): 1.0}])
def test_what_only_one_of_the_two_has_is_named(other):
    with pytest.raises(ValueError, match=r"only one of the two has \('ties', [01]\)"):
        sn.differences(series({("ties", 0): 1.0}), series(other))
    with pytest.raises(ValueError, match="with a level called 'seed'"):
        sn.differences(pd.Series([1.0]), pd.Series([1.0]))


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6), st.floats(-10, 10))
def test_a_constant_moves_the_interval_and_nothing_else(values, constant):
    ours = pd.Series(values, index=pd.RangeIndex(len(values), name="seed"))
    plain, moved = (sn.differences(some, 0 * ours).loc["all"] for some in (ours, ours + constant))
    for name in ("mean", "low", "high"):
        assert moved[name] == pytest.approx(plain[name] + constant, abs=1e-6)
