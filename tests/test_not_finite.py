"""NaN and infinity stop with a line that says where, wherever they come up; none reaches a table or a file."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from saftnb.analysis import loss_slice, random_direction
from saftnb.analysis.alignment import layer_inputs, linear_cka, shared_directions, update_cka, update_spectra
from saftnb.analysis.calibration import recovered_share
from saftnb.analysis.finite import finite_table
from saftnb.analysis.linearity import cross_task_linearity, joint_loss
from saftnb.analysis.sharpness import hessian_eigenvalues, lanczos, loss_plane
from saftnb.evaluate import (
    ModelFamily,
    SuiteAccuracy,
    accuracies,
    ensemble_hits,
    finite_logits,
    individual_hits,
    suite_accuracy,
    suite_hits,
)
from saftnb.finetune import finetune, recipe, resume
from saftnb.finetune.train import Training
from saftnb.merging import LowRank, TaskVector, learn, merge
from saftnb.merging.grid_search import coordinate_search, search, search_subsets
from saftnb.merging.learning_loop import Learning
from saftnb.merging.statistics import suite_statistics
from saftnb.scores import differences, score_table
from saftnb.suites import load_suite

SUITE = load_suite("thimble")
FIRST = "conv1.weight"
NAN = torch.tensor(math.nan)


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def stops(do, *words: str) -> None:
    """`do` raises FloatingPointError with one line that has these words, in this order."""
    with pytest.raises(FloatingPointError) as caught:
        do()
    assert re.search(".*".join(map(re.escape, words)), str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def full(value: float = 0.01, **changed: float) -> TaskVector:
    """A task vector of all of the tower's weights, one of them poisoned where asked for."""
    deltas = {name: torch.full(p.shape, value) for name, p in SUITE.tower().named_parameters()}
    for name, poison in changed.items():
        deltas[name.replace("__", ".")].view(-1)[0] = poison
    return TaskVector(deltas)


HUGE = full(1e38)  # finite, but no model with it has finite embeddings


# Training


def poisoned(monkeypatch, step: int, name: str, value: float) -> None:
    """From a step on (from 1), a gradient of one parameter is not finite."""
    real = Training.step

    def with_hook(self):
        if self.next_step == step - 1:
            p = self.trained[name]
            p.register_hook(lambda gradient: torch.full_like(gradient, value))
        return real(self)

    monkeypatch.setattr(Training, "step", with_hook)


def train(plan="sgd", steps=8, suite=SUITE, task="digits", **changes):
    quick = {"batch_size": 8} | changes
    return finetune(suite, task, replace(recipe(plan, suite).shortened(steps), **quick), progress=False)


def states(store: Path) -> list[dict]:
    return [torch.load(file, weights_only=True) for file in store.glob(".partial/*.pt")]


@pytest.mark.parametrize("plan", ["sgd", "saft", "sam@clip=first"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_stops_training_and_the_last_good_state_stays(store, monkeypatch, plan, value):
    monkeypatch.setattr(resume, "SAVE_EVERY", 2)
    monkeypatch.setattr(resume, "SAVE_SHARE", math.inf)
    name = "transformer.resblocks.1.mlp.c_fc.weight"
    poisoned(monkeypatch, 6, name, value)
    stops(lambda: train(plan), f"thimble, digits, {plan}, seed 0: ", "at step 6; ",
          f"first in the gradient of '{name}'; ",
          "the state after step 4 is kept in the checkpoint store as .partial/thimble-digits-", ".pt")  # fmt: skip
    (state,) = states(store)
    assert state["next_step"] == 4
    assert all(p.isfinite().all() for p in state["tower"].values() if p.is_floating_point())
    assert not list(store.glob("*/manifest.json"))
    monkeypatch.undo()
    monkeypatch.setenv("SAFTNB_STORE", str(store))
    gone_on = train(plan)  # from the state that was kept
    monkeypatch.setenv("SAFTNB_STORE", str(store / "other"))
    assert gone_on.weights_sha256 == train(plan).weights_sha256


@pytest.mark.parametrize("plan", ["sgd", "saft"])
def test_a_poisoned_weight_stops_at_the_first_step_and_nothing_is_kept(store, monkeypatch, plan):
    tower = SUITE.backbone.image_tower()
    with torch.no_grad():
        tower.ln_pre.weight[3] = math.nan
    monkeypatch.setattr(type(SUITE.backbone), "image_tower", lambda self: tower)
    stops(lambda: train(plan), f"thimble, digits, {plan}, seed 0: ", "nan", "at step 1; first in the gradient of ", "; "
          "no state was saved before")  # fmt: skip
    assert not states(store)


def test_a_loss_is_named(monkeypatch):
    monkeypatch.setattr("saftnb.finetune.train.F.cross_entropy", lambda out, *_, **__: (0 * out).sum() + NAN)
    stops(lambda: train(), "thimble, digits, sgd, seed 0: the loss is nan at step 1; ")


def test_an_exploding_rate_is_caught_before_it_is_looked_at_or_saved(store, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_EVERY", 1)
    monkeypatch.setattr(resume, "SAVE_SHARE", math.inf)
    large = {"lr": 3e37, "warmup": 0, "weight_decay": 11.3}  # weights of more than 1 overflow in the first step
    line = "weights are not finite after step 1; first in the weight of '"
    stops(lambda: train(**large), f"thimble, digits, sgd, seed 0: {line}", "'; no state was saved before")
    assert not states(store)
    monkeypatch.undo()
    monkeypatch.setenv("SAFTNB_STORE", str(store))
    stops(lambda: train(**large, steps=1, evaluate_every=1), f"thimble, digits, sgd, seed 0: {line}")
    stops(lambda: train(lr=1e30, warmup=0), "thimble, digits, sgd, seed 0: the loss is ",
          "at step 2; first in the gradient")  # fmt: skip
    stops(
        lambda: train(lr=1e30, warmup=0, steps=1, evaluate_every=1),
        "validation after step 1: logits of ",
        "examples are not finite",
    )
    assert not list(store.glob("*/manifest.json"))


def test_adapters_and_heads_of_pairs_are_looked_at_too(monkeypatch):
    pairs = load_suite("thimble-nli")
    task = next(iter(pairs.tasks))
    real = Training.step

    def broken(self):
        if self.next_step == 1:
            self.head.register_hook(lambda gradient: gradient * NAN)
        return real(self)

    monkeypatch.setattr(Training, "step", broken)
    stops(lambda: finetune(pairs, task, "lora", progress=False),
          f"thimble-nli, {task}, lora, seed 0: the gradient is not finite "
          "at step 2; first in the gradient of 'head'")  # fmt: skip
    assert not any(".lora_" in name for name, _ in pairs.backbone.model.named_parameters()), "the model is as it was"


# Learning of coefficients


VECTORS = {"digits": full(0.001), "patterns": full(-0.001)}


def learned(**options):
    return learn(SUITE, VECTORS, steps=4, examples=8, views=0, progress=False, **options)


def test_a_gradient_stops_learning(store, monkeypatch):
    real = Learning.step

    def broken(self):
        if self.next_step == 2:
            self.model.weights[FIRST].register_hook(lambda gradient: gradient * NAN)
        return real(self)

    monkeypatch.setattr(Learning, "step", broken)
    stops(lambda: learned(by="parameter"),
          f"learn: thimble, digits, patterns: the gradient of '{FIRST}' is not finite at step 3; "
          "the values after 2 steps are kept in the checkpoint store as .partial/")  # fmt: skip
    (file,) = store.glob(".partial/*.safetensors")
    assert all(value.isfinite().all() for value in load_file(file).values())
    assert not list(store.glob("*/manifest.json"))


def test_an_exploding_rate_stops_learning_and_its_values_are_not_kept(store):
    large = {"optimizer": "sgd", "lr": 3e38, "weight_decay": 1e3, "schedule": "constant"}
    stops(lambda: learned(by="task", **large), "learn: thimble, digits, patterns: the learned 'all' is not finite "
          "after the update at step 1; these values are not kept, use a smaller lr")  # fmt: skip
    assert not list(store.glob(".partial/*.safetensors"))


def test_a_teacher_that_is_not_finite_is_named():
    given = {"digits": VECTORS["digits"], "patterns": HUGE}
    stops(lambda: learn(SUITE, given, steps=2, examples=8, views=0, progress=False),
          "learn: thimble, patterns's own model: logits of 8 of 8 examples are not finite")  # fmt: skip


# Statistics, merges, searches


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_statistics(method):
    stops(lambda: suite_statistics(SUITE, {"digits": HUGE}, method, pictures=4), "thimble, digits: the ",
          " is not finite")  # fmt: skip


def test_merges_that_overflow():
    w = {"w": torch.tensor([3e38, 1.0])}
    with pytest.raises(ValueError, match=r"^task_arithmetic: the merged 'w' overflows torch.float32; use a smaller"):
        merge([TaskVector(w)] * 2, "task_arithmetic")
    low = TaskVector({"w": LowRank(torch.full((2, 1), 300.0).half(), torch.full((1, 3), 300.0).half())})
    for space in ("weights", "core"):
        what = "the product of the merged 'w' overflows torch.float16: use float32"
        what = what if space == "weights" else "the merged 'w' overflows torch.float16; use a smaller scale"
        with pytest.raises(ValueError, match=f"^average: {what}$"):
            merge([low, low], "average", space=space)
    fine = TaskVector({"w": LowRank(torch.full((2, 1), 200.0).half(), torch.full((1, 3), 200.0).half())})
    assert merge([fine, fine], "average")["w"].dense().eq(40_000).all()


def test_vectors_that_are_not_finite_reach_no_model_and_no_file(tmp_path):
    model = nn.Linear(2, 2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for delta in (torch.tensor([[0, math.nan], [0, 0]]), torch.full((2, 2), math.inf), 1e39 * torch.ones(2, 2)):
        bad = TaskVector({"bias": torch.ones(2), "weight": delta})
        with pytest.raises(ValueError, match="^the delta of 'weight' has NaN or infinite values$"):
            bad.apply_to(model)
        with pytest.raises(ValueError, match="^cannot save 'weight': it has NaN or infinite values$"):
            bad.save(tmp_path / "v.safetensors")
    low = TaskVector({"weight": LowRank(torch.full((2, 1), math.inf), torch.ones(1, 2))})
    with pytest.raises(ValueError, match="^cannot write 'weight': it has NaN or infinite values$"):
        low.to_adapter(tmp_path / "adapter")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not list(tmp_path.glob("*"))


def scores(bad: float):
    """A score that is not finite at λ = 0.5 alone, for the task b."""
    return lambda v: {"a": 0.5, "b": bad if abs(float(v["w"][0]) - 1.0) < 0.1 else 0.6}


SMALL = {task: TaskVector({"w": torch.ones(2)}) for task in "ab"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_neither_wins_a_search_nor_loses_it(bad):
    grid = {"scale": [0.25, 0.5, 1.0]}
    line = f"search task_arithmetic: the score of b is {bad} at {{'scale': 0.5}}"
    stops(lambda: search(SMALL, "task_arithmetic", grid, scores(bad), progress=False), line)
    stops(lambda: coordinate_search(SMALL, "task_arithmetic", grid, scores(bad), progress=False), line)
    stops(lambda: search_subsets(SMALL, 2, "task_arithmetic", grid, lambda v, _: scores(bad)(v), progress=False), line)
    assert search(SMALL, "task_arithmetic", grid, scores(0.9), progress=False).best == {"scale": 0.5}


def test_a_merged_model_that_is_not_finite_stops_a_search_on_pictures():
    """Of NaN argmax makes class 0: such a model would have the accuracy of always saying so."""
    score, grid = SuiteAccuracy(SUITE, examples=5), {"scale": [0.0, 1.0]}
    where = "search task_arithmetic: thimble, digits, validation, coefficients [1.0]"
    stops(
        lambda: search([full(0.0), full(1e37)], "task_arithmetic", grid, score, progress=False),
        f"{where}: logits of 5 of 5 examples are not finite",
    )


# Evaluation


def test_logits():
    good = torch.tensor([[1.0, -math.inf, 2.0], [0.0, -math.inf, 5.0]])
    assert finite_logits(good) is good  # the class that this task does not have
    for bad in (math.nan, math.inf, -math.inf):
        spoiled = torch.tensor([[1.0, 2.0], [0.0, 1.0], [bad, 1.0], [1.0, bad]])
        stops(lambda spoiled=spoiled: finite_logits(spoiled), "logits of 2 of 4 examples are not finite, first of 2")


def test_evaluation_names_suite_task_split_and_how_many():
    two = {"digits": full(0.0), "patterns": HUGE}
    line = "logits of 7 of 7 examples are not finite, first of 0"
    stops(lambda: suite_hits(SUITE, HUGE, examples=7), f"thimble, digits, test: {line}")
    stops(lambda: suite_accuracy(SUITE, HUGE, examples=7, split="validation"), f"thimble, digits, validation: {line}")
    stops(lambda: individual_hits(SUITE, two, examples=7), f"thimble, patterns's own model, test: {line}")
    stops(lambda: ensemble_hits(SUITE, two, examples=7), f"thimble, digits, test, one of the ensemble: {line}")
    for tangent in (False, True):
        family = ModelFamily(SUITE, [HUGE], tangent=tangent)
        stops(lambda family=family: family.hits("digits", [1.0], pictures=7),
          f"thimble, digits, test, coefficients [1.0]: {line}")  # fmt: skip


def test_a_poisoned_picture_and_a_poisoned_head(monkeypatch):
    model = SUITE.classifier("digits")
    model.mean = torch.full_like(model.mean, math.nan)
    monkeypatch.setattr(type(SUITE), "classifier", lambda *_: model)
    stops(lambda: suite_hits(SUITE, examples=3), "thimble, digits, test: logits of 3 of 3 examples are not finite")
    monkeypatch.undo()
    head = torch.full_like(SUITE.head("digits"), 1.0)
    head[2] = math.nan
    monkeypatch.setitem(SUITE._heads, "digits", head)
    stops(lambda: suite_hits(SUITE, examples=3), "thimble, digits, test: logits of 3 of 3 examples are not finite")


# Tables and analyses


def test_tables_of_scores():
    hits = {"individual": {"a": torch.ones(4, dtype=torch.bool)}}
    with pytest.raises(ValueError, match="^a: nothing was tested, so there is no accuracy$"):
        accuracies({"a": torch.zeros(0, dtype=torch.bool)})
    with pytest.raises(ValueError, match="^b: nothing was tested, so there is no accuracy$"):
        score_table({("individual", "sgd", 0): hits["individual"] | {"b": torch.zeros(0, dtype=torch.bool)}})
    index = pd.MultiIndex.from_tuples([("x", 0), ("x", 1)], names=["model", "seed"])
    with pytest.raises(ValueError, match="needs at least one difference, all of them finite"):
        differences(pd.Series([1.0, math.nan], index), pd.Series([1.0, 2.0], index))
    share = {"zero_shot": pd.Series([0.1]), "individual": pd.Series([0.5])}
    with pytest.raises(ValueError, match="^the share of 0 is not finite: an accuracy is missing$"):
        recovered_share(pd.Series([math.nan]), **share)


def test_a_table_names_column_and_row():
    table = pd.DataFrame({"task": ["a", "b"], "n": [1, 2], "loss": [0.1, math.inf]})
    stops(lambda: finite_table(table, "toy"), "toy: loss is inf at task b, n 2")
    assert finite_table(table[:1], "toy").equals(table[:1])


def one_layer(value: float) -> TaskVector:
    return TaskVector({"w.weight": torch.eye(3) * value})


def test_analyses_of_vectors():
    pair = {"a": one_layer(1.0), "b": one_layer(math.nan)}
    line = "the task vector of b has NaN or infinite values in 'w.weight'"
    stops(lambda: update_spectra(pair), line)
    stops(lambda: shared_directions(pair), line)
    with pytest.raises(ValueError, match="vector 1 has NaN or infinite values in 'w.weight'"):
        update_cka(pair)
    stops(lambda: linear_cka(torch.randn(4, 2), torch.full((4, 2), math.inf)),
          "linear CKA of views that are not finite")  # fmt: skip
    assert math.isnan(linear_cka(torch.ones(4, 2), torch.randn(4, 2))), "of constant features there is none, as it says"


def test_analyses_of_models():
    pair = {"digits": HUGE, "patterns": full(0.0)}
    few = SUITE.tasks["digits"].test[:3]
    bad = SUITE.classifier("digits", HUGE.apply_to(SUITE.tower()))
    stops(lambda: cross_task_linearity(SUITE, pair, pictures=2),
          "thimble, cross-task linearity: distance is nan at task_1 digits")  # fmt: skip
    stops(lambda: joint_loss(SUITE, pair, pictures=3),
          "thimble, digits, test, coefficients [1.0, 0.0]: logits of 3 of 3")  # fmt: skip
    lost = {"digits": full(conv1__weight=math.nan), "patterns": full(0.02)}
    stops(lambda: loss_plane(SUITE, lost, 2, pictures=3), "thimble, digits, test, coefficients", "are not finite")
    stops(lambda: hessian_eigenvalues([(bad, few)], iterations=2),
          "product 1 of the Hessian with a vector is not finite")  # fmt: skip
    stops(lambda: lanczos(lambda v: v * NAN, torch.ones(4), iterations=2, seed=0), "product 1 of the Hessian")
    direction = random_direction(SUITE.classifier("digits"), 0)
    stops(lambda: loss_slice(SUITE.classifier("digits"), direction, [0.0, 1e39], few),
          "the loss at distance 1e+39: logits of 3 of 3 examples are not finite")  # fmt: skip


def test_what_poisoned_towers_give_to_their_layers(monkeypatch):
    monkeypatch.setattr(type(SUITE), "tower", lambda self: HUGE.apply_to(self.backbone.image_tower()))
    name = "transformer.resblocks.0.attn.q_proj.weight"
    stops(lambda: layer_inputs(SUITE, [name], pictures=2, rows=20),
          f"thimble: what the tower gives to '{name}' is not finite")  # fmt: skip
