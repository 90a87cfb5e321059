"""Known facts against measured numbers: verdicts by hand, and properties over random tables."""

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saftnb.analysis import calibrate, recovered_share
from saftnb.evaluate import hierarchical_bootstrap
from saftnb.reference import known_facts, recovered_shares, vision8_merging


def numbers(*backbones) -> pd.Series:
    """A row of seeds for each backbone, as index (backbone, seed)."""
    return pd.DataFrame(backbones, index=[f"b{i}" for i in range(len(backbones))]).rename_axis("backbone").stack()


def named(series: pd.Series) -> pd.Series:
    return series.rename_axis(["backbone", "seed"])


def facts(start=0.0, end=math.inf, unit="points") -> pd.DataFrame:
    return pd.DataFrame({"unit": [unit], "from": [start], "to": [end]}, index=["f"])


def verdict(values: pd.Series, *range_) -> str:
    return calibrate(facts(*range_), {"f": named(values)}, draws=300).loc["f", "verdict"]


def test_a_fact_carries_over_where_interval_and_backbones_lie_in_its_range():
    assert verdict(numbers([1, 2], [2, 3], [1, 1])) == "carries over"
    assert verdict(numbers([-1, -2], [-2, -3], [-1, -1])) == "does not"
    assert verdict(numbers([1, 2], [2, 3], [-1, -1])) == "not clear"
    assert verdict(numbers([40, 41], [42, 43]), 33, 53) == "carries over"
    assert verdict(numbers([20, 21], [22, 23]), 33, 53) == "does not"
    assert verdict(numbers([20, 21], [42, 43]), 33, 53) == "not clear"
    assert verdict(numbers([0, 0], [90, 90]), 33, 53) == "not clear"  # outside, but on both sides
    assert verdict(numbers([1, 2], [2, 3]), math.nan, math.nan) == "nothing to compare"
    assert verdict(numbers([1], [2])) == "one seed, no verdict"
    assert verdict(numbers([0.1 + 0.2 - 0.1, 0.2], [0.15, 0.25]), 0.2, 0.4) == "not clear"  # 0.15 is in the interval
    assert verdict(numbers([0.3 - 0.1] * 2, [0.25] * 2), 0.2, 0.4) == "carries over"  # 0.3 − 0.1 is below 0.2


def test_one_backbone_of_many_that_disagrees_is_enough_for_no_verdict():
    many = numbers(*[[5, 5]] * 9, [-0.1, -0.1])
    found = calibrate(facts(), {"f": named(many)}, draws=2000).loc["f"]
    assert found["low"] > 0
    assert found["verdict"] == "not clear"


def test_the_interval_is_the_bootstraps_and_only_common_seeds_count():
    values = named(pd.Series({("a", 0): 1.0, ("a", 1): 2.0, ("a", 2): 99.0, ("b", 0): 3.0, ("b", 1): 5.0}))
    found = calibrate(facts(), {"f": values}, draws=300).loc["f"]
    table = pd.DataFrame({0: [1.0, 3.0], 1: [2.0, 5.0]})
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(list(hierarchical_bootstrap(table, draws=300)))


def test_words_for_numbers_follow_unit_and_range():
    values = named(numbers([0.25, 0.25], [0.25, 0.25]))
    assert calibrate(facts(), {"f": values}, draws=10).loc["f", "here"] == "+0.2 (+0.2 to +0.2)"
    assert calibrate(facts(0, 1, ""), {"f": values}, draws=10).loc["f", "here"] == "0.25 (0.25 to 0.25)"
    assert calibrate(facts(), {}, draws=10).loc["f", "verdict"] == "not measured"


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="no known fact is called 'g'"):
        calibrate(facts(), {"g": named(numbers([1]))})
    with pytest.raises(ValueError, match="f: a measured number is not finite"):
        calibrate(facts(), {"f": named(numbers([1.0, math.inf]))})
    with pytest.raises(ValueError, match="no seed was run on every backbone"):
        calibrate(facts(), {"f": named(pd.Series({("a", 0): 1.0, ("b", 1): 2.0}))})
    with pytest.raises(ValueError, match="no gap"):
        recovered_share(pd.Series([0.5]), pd.Series([0.6]), pd.Series([0.6]))


@given(st.lists(st.lists(st.floats(-50, 50), min_size=2, max_size=2), min_size=2, max_size=4), st.floats(0.1, 20))
def test_scaling_numbers_and_range_changes_no_verdict_and_negating_mirrors_it(rows, factor):
    values = numbers(*rows)
    one = verdict(values, -5.0, 10.0)
    assert verdict(-values, -10.0, 5.0) == one
    wide = calibrate(facts(-1e9, 1e9), {"f": named(factor * values)}, draws=50).loc["f"]
    assert wide["verdict"] == "carries over"
    slack = 1e-9 + 1e-9 * abs(wide["mean"])
    assert wide["low"] - slack <= wide["mean"] <= wide["high"] + slack


def test_shares_by_hand():
    share = recovered_share(pd.Series([0.3, 0.5, 0.8]), pd.Series([0.3] * 3), pd.Series([0.8] * 3))
    assert share.tolist() == pytest.approx([0, 40, 100])


def test_the_known_shares_are_those_of_the_published_table():
    means = 100 * vision8_merging().mean(axis=1)
    shares = recovered_shares()
    for method in ("average", "task_arithmetic", "ties"):
        by_table = 100 * (means[method] - means["zero-shot"]) / (means["individual"] - means["zero-shot"])
        assert shares[method] == pytest.approx(by_table, abs=0.6), method
    for method, share in shares.items():  # ± 10 points agree
        assert known_facts().loc[f"share: {method}", ["from", "to"]].tolist() == [share - 10, share + 10]


def test_every_fact_has_a_source_or_says_that_no_number_was_found():
    table = known_facts()
    assert (table["source"].ne("") | table["published"].eq("no number found")).all()
    assert table["agrees"].eq("").sum() == table["from"].isna().sum() == 1
    assert table.loc["iso_c=tsv_m", "agrees"] == "−2 to 2"
    assert set(table["agrees"]) >= {"above 0", "below 0", "33 to 53", ""}
    bounded = table.dropna(subset="from")
    assert (bounded["from"] < bounded["to"]).all()
