"""Paired differences over backbones and seeds, against sums by hand."""

import pandas as pd
import pytest

from saftnb.analysis import gain_intervals, paired_gains
from saftnb.evaluate import hierarchical_bootstrap


def frame(gain, seeds=(0, 1), backbones=("a", "b")) -> pd.DataFrame:
    """Two recipes, two methods, two tasks; saft is above sgd by gain(backbone, seed) points."""
    return pd.DataFrame(
        {"recipe": r, "backbone": b, "seed": s, "method": m, "task": t,
         "accuracy": 0.5 + 0.01 * s + (r == "saft") * gain(b, s) / 100}
        for r in ("sgd", "saft") for b in backbones for s in seeds for m in ("average", "ties") for t in ("x", "y")
    )  # fmt: skip


def test_gains_are_paired_and_a_recipe_does_not_differ_from_itself():
    gains = paired_gains(frame(lambda b, s: 2 + s), "sgd")
    assert (gains.loc[gains["recipe"] == "sgd", "gain"] == 0).all()
    saft = gains[gains["recipe"] == "saft"]
    assert saft["gain"].to_numpy() == pytest.approx(2 + saft["seed"].to_numpy())


def test_intervals_are_those_of_backbone_by_seed_means():
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 2.0, ("b", 1): 2.5}
    gains = paired_gains(frame(lambda b, s: values[b, s]), "sgd")
    (line,) = gain_intervals(gains[gains["recipe"] == "saft"], "recipe", draws=500).to_dict("records")
    table = pd.Series(values).unstack()
    assert [line["mean"], line["low"], line["high"]] == pytest.approx(list(hierarchical_bootstrap(table, draws=500)))
    assert line["backbones above"] == "2 of 2"
    assert line["verdict"] == "above 0"
    both = gain_intervals(gains, ["recipe", "method"], draws=100)
    assert both[["recipe", "method"]].to_numpy().tolist() == [
        [r, m] for r in ("sgd", "saft") for m in ("average", "ties")
    ]


def test_a_verdict_needs_every_backbone_and_more_than_one_seed():
    apart = paired_gains(frame(lambda b, s: 5.0 if b == "a" else -0.1), "sgd")
    assert (
        gain_intervals(apart, "recipe", draws=200).set_index("recipe").loc["saft", "verdict"] == "not clearly different"
    )
    many = paired_gains(frame(lambda b, s: -0.1 if b == "e" else 5.0, backbones="abcde"), "sgd")
    line = gain_intervals(many, "recipe", draws=2000).set_index("recipe").loc["saft"]
    assert line["low"] > 0
    assert (line["backbones above"], line["verdict"]) == ("4 of 5", "not clearly different")  # one of them disagrees
    below = paired_gains(frame(lambda b, s: -3.0 + 0.1 * s), "sgd")
    assert gain_intervals(below, "recipe", draws=200).set_index("recipe").loc["saft", "verdict"] == "below 0"
    one = paired_gains(frame(lambda b, s: 3.0, seeds=(0,)), "sgd")
    assert set(gain_intervals(one, "recipe", draws=200)["verdict"]) == {"one seed, no verdict"}


def test_a_run_without_its_partner_is_named():
    lost = frame(lambda b, s: 1.0).query("not (recipe == 'sgd' and backbone == 'b' and seed == 1)")
    with pytest.raises(ValueError, match="a run has no sgd to be compared with"):
        paired_gains(lost, "sgd")
    missing = frame(lambda b, s: 1.0)
    missing.loc[0, "accuracy"] = None
    with pytest.raises(ValueError, match="or a missing accuracy"):
        paired_gains(missing, "sgd")


def test_seeds_that_one_backbone_lacks_are_left_out():
    some = frame(lambda b, s: 10.0 * s + 1).query("not (backbone == 'b' and seed == 1)")
    line = gain_intervals(paired_gains(some, "sgd"), "recipe", draws=50).set_index("recipe").loc["saft"]
    assert line["mean"] == pytest.approx(1.0)


def test_no_rows_give_an_empty_table():
    empty = paired_gains(frame(lambda b, s: 1.0), "sgd").iloc[:0]
    assert list(gain_intervals(empty, "recipe").columns)[:2] == ["recipe", "mean"]
