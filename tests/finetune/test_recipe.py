"""Recipes are validated before anything is trained."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saftnb.finetune import Recipe, recipe


def test_named_recipes_differ_in_the_optimizer_and_share_the_rest_of_the_budget():
    for suite in ("pocket", "thimble"):
        sgd, saft = recipe("sgd", suite), recipe("saft", suite)
        assert (sgd.optimizer, saft.optimizer) == ("adamw", "asam")
        assert (sgd.steps, sgd.batch_size, sgd.clip_norm) == (saft.steps, saft.batch_size, saft.clip_norm)


def test_changes_make_another_recipe_and_unknown_ones_are_refused():
    assert recipe("sgd", "pocket", lr=0.5).lr == 0.5
    with pytest.raises(ValueError, match="a recipe has no speed"):
        recipe("sgd", "pocket", speed=2)
    with pytest.raises(ValueError, match="has no recipe 'adam'; its recipes: sgd, saft"):
        recipe("adam", "pocket")
    with pytest.raises(ValueError, match="no recipes for suite 'x'"):
        recipe("sgd", "x")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"optimizer": "adam"}, "optimizer is one of adamw, sam, asam, asam-kwon, not 'adam'"),
        ({"scope": "half"}, "scope is one of full"),
        ({"steps": 0}, "at least 1"),
        ({"warmup": 200}, "warmup lies in"),
        ({"lr": float("nan")}, "lr is 0 or more"),
        ({"rho": 0.5}, "adamw takes no rho"),
        ({"optimizer": "sam"}, "sam needs rho"),
        ({"crop": 0.0}, "crop lies in"),
        ({"label_smoothing": 1.0}, "label_smoothing lies in"),
        ({"clip_norm": 0.0}, "clip_norm is above 0"),
        ({"weight_decay": -1.0}, "weight_decay is 0 or more"),
    ],
)
def test_bad_values_are_refused_in_one_line(changes, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        Recipe("x", **{"optimizer": "adamw"} | changes)
    assert "\n" not in str(caught.value)


@given(st.integers(2, 400), st.data())
def test_the_learning_rate_warms_up_and_falls_to_nearly_zero(steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    plan = Recipe("x", "adamw", steps=steps, warmup=warmup, lr=1.0)
    rates = [plan.learning_rate(step) for step in range(steps)]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[warmup] == 1.0
    assert all(0 < rate <= 1 for rate in rates)
    assert dataclasses.replace(plan, lr=0.0).learning_rate(0) == 0
