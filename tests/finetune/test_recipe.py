"""Recipes are validated before anything is trained."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saftnb.finetune import Recipe, matched, recipe


def test_named_recipes_differ_in_the_optimizer_and_share_the_rest_of_the_budget():
    for suite in ("pocket", "thimble"):
        sgd, saft = recipe("sgd", suite), recipe("saft", suite)
        assert (sgd.optimizer, saft.optimizer) == ("adamw", "asam")
        assert (sgd.steps, sgd.batch_size, sgd.clip_norm) == (saft.steps, saft.batch_size, saft.clip_norm)


def test_changes_make_another_recipe():
    assert recipe("sgd", "pocket", lr=0.5).lr == 0.5


@pytest.mark.parametrize("suite", ["pocket", "thimble"])
def test_the_controls_are_what_they_are_called(suite):
    sgd, saft, twice = recipe("sgd", suite), recipe("saft", suite), recipe("sgd-2x", suite)
    assert (sgd.gradients, saft.gradients) == (1, 2)
    assert twice.steps * twice.gradients == saft.steps * saft.gradients
    assert twice.optimizer == "adamw"
    assert recipe("sgd-wd0", suite).weight_decay == 0.0
    assert [recipe(name, suite).optimizer for name in ("sam", "asam-kwon")] == ["sam", "asam-kwon"]
    assert recipe("saft", suite, rho=0.0).gradients == 1
    stopped = matched(sgd, 0.75)
    assert stopped == dataclasses.replace(sgd, name="sgd-matched", stop_at=0.75, evaluate_every=10)


def test_a_name_may_carry_changes():
    plan = recipe("saft@lr=3e-4,rho=0.1,steps=50", "pocket")
    changed = recipe("saft", "pocket", lr=3e-4, rho=0.1, steps=50)
    assert plan == dataclasses.replace(changed, name="saft@lr=3e-4,rho=0.1,steps=50")
    assert type(plan.steps) is int
    typed = recipe("saft@precision=bf16,compile=true,clip=first,stop_at=none,crop=0", "pocket")
    changes = {"precision": "bf16", "compile": True, "clip": "first", "stop_at": None, "crop": 0.0}
    assert typed == dataclasses.replace(recipe("saft", "pocket"), name=typed.name, **changes)
    for wrong, message in {
        "saft@rho": "'rho' is not rho= and a number or none", "saft@lr=big": "'lr=big' is not lr= and a number",
        "saft@steps=2.5": "'steps=2.5' is not steps= and a whole number", "saft@speed=1": "a recipe has no speed",
        "saft@compile=yes": "'compile=yes' is not compile= and true or false",
        "saft@precision=fp8": "precision is one of float32, bf16, not 'fp8'",
        "saft@rho=-1": "asam needs rho, 0 or more, not -1.0",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            recipe(wrong, "pocket")


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


def test_the_named_rows_are_optimizer_times_scope_in_every_suite():
    rows = {"sgd": "full", "ftts": "tangent", "ftlo": "attention"}
    for suite in ("pocket", "thimble", "vision8"):
        for name, scope in rows.items():
            plain = recipe(name, suite)
            sharp = recipe("saft" if name == "sgd" else f"{name}+saft", suite)
            assert (plain.optimizer, sharp.optimizer, plain.rho) == ("adamw", "asam", None)
            assert plain.scope == sharp.scope == scope
            assert plain.tangent == (scope == "tangent")


def test_vision8_carries_the_papers_values():
    saft, sam = recipe("saft", "vision8"), recipe("sam", "vision8")
    assert (saft.lr, saft.weight_decay, saft.steps, saft.batch_size, saft.warmup) == (1e-5, 0.1, 8000, 128, 500)
    assert (saft.rho, sam.rho, saft.label_smoothing, saft.crop) == (0.5, 0.05, 0.0, 0.9)
    assert (saft.clip, saft.clip_norm, saft.evaluate_every) == ("first", 1.0, 0)
    text = repr(recipe("ftlo+saft", "vision8"))
    assert all(f"{field.name}=" in text for field in dataclasses.fields(Recipe))


def test_fields_that_came_later_are_named_only_where_they_differ():
    """Checkpoints from before a field existed are still found."""
    assert not {"clip", "accumulate", "precision", "compile"} & recipe("saft", "pocket").inputs().keys()
    changed = recipe("saft", "pocket", accumulate=2, precision="bf16").inputs()
    assert (changed["accumulate"], changed["precision"]) == (2, "bf16")
    assert set(dataclasses.asdict(recipe("saft", "pocket"))) - recipe("saft", "pocket").inputs().keys() == {
        "clip", "accumulate", "precision", "compile", "rank", "alpha", "dropout", "patience", "min_delta",
        "schedule", "checkpointing", "shared_init",
    }  # fmt: skip
