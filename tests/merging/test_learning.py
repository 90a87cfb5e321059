"""Learned coefficients against autograd through the merged weights, and what learning may and may not see."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.func import functional_call

from saftnb.delta import LowRank, dense
from saftnb.evaluate import suite_accuracy
from saftnb.finetune import SharpnessAware, resume, store
from saftnb.merging import learn
from saftnb.merging.coefficients import AtOutputs, InWeights, Values, blocks, correlation, resident, scaled
from saftnb.merging.learning import PRESETS, RATES, _describe, pool
from saftnb.merging.learning_loop import Learning, Plan
from saftnb.suites import load_suite
from saftnb.task_vector import TaskVector

CPU = torch.device("cpu")
QUICK = {"steps": 4, "batch_size": 8, "examples": 12, "views": 0, "device": "cpu", "progress": False}


@pytest.fixture(autouse=True)
def fresh_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture(scope="module")
def suite():
    return load_suite("thimble")


@pytest.fixture(scope="module")
def pairs():
    return load_suite("thimble-nli")


def random_vectors(suite, size=0.02, tangent=False):
    draw = torch.Generator().manual_seed(1)
    shapes = {name: p.shape for name, p in suite.tower(tangent=tangent).named_parameters()}
    return {
        task: TaskVector({name: size * torch.randn(shape, generator=draw) for name, shape in shapes.items()})
        for task in suite.tasks
    }


def random_adapters(names, shapes, tasks, rank=2):
    draw = torch.Generator().manual_seed(2)

    def adapter():
        return {
            name: LowRank(
                0.3 * torch.randn(shapes[name][0], rank, generator=draw),
                0.1 * torch.randn(rank, shapes[name][1], generator=draw),
            )
            for name in names
        }

    return {task: TaskVector(adapter()) for task in tasks}


def image_adapters(suite):
    shapes = {
        n: p.shape for n, p in suite.tower().named_parameters() if n.endswith(("q_proj.weight", "out_proj.weight"))
    }
    return random_adapters(list(shapes), shapes, suite.tasks)


def pair_adapters(pairs):
    shapes = {n: p.shape for n, p in pairs.backbone.model.named_parameters() if n in pairs.backbone.layers}
    return random_adapters(list(shapes), shapes, pairs.tasks)


def plan(**changes):
    given = {
        "objective": "distillation", "by": "channel", "rho": None, "steps": 4, "examples": 12, "views": 0,
        "batch_size": 8, "lr": 0.01, "start": 0.4, "temperature": 1.0, "optimizer": "adam", "momentum": 0.0,
        "weight_decay": 0.0, "perturbation": "sam", "clamp": None, "schedule": "constant",
    }  # fmt: skip
    return Plan(**given | changes)


def learning(suite, vectors, tangent=False, seed=0, **changes):
    chosen = plan(**changes)
    values = Values(list(vectors.values()), chosen.by, chosen.start, CPU, chosen.clamp)
    with torch.no_grad():  # no two alike
        draw = torch.Generator().manual_seed(3)
        for p in values.learned.values():
            p += 0.1 * torch.randn(p.shape, generator=draw) if chosen.by != "weights" else 0
    return Learning(suite, vectors, values, chosen, seed, tangent, CPU)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def reference_loss(one, suite, vectors, c, tangent=False):
    """The step's loss as a differentiable function of the coefficients: whole merged weights, autograd all the way."""
    tower = suite.tower(tangent=tangent)
    merged = {}
    for name, p in tower.named_parameters():
        merged[name] = p.detach()
        for number, vector in enumerate(vectors.values()):
            if name in vector:
                own = (c["all"] if "all" in c else c[name])[number]
                delta = dense(vector[name])
                merged[name] = merged[name] + own.reshape(-1, *[1] * (delta.ndim - 1)) * delta
    total = 0
    for task, vector in vectors.items():
        model = suite.classifier(task, tower)
        batch = suite.tasks[task].validation.images[pool(60, 12, 0)[one.batch(task, one.next_step)]]
        found = functional_call(model, {f"tower.{name}": value for name, value in merged.items()}, (batch,))
        teacher = suite.classifier(task, suite.tower(vector, tangent=tangent))(batch).detach()
        T = one.plan.temperature
        if one.plan.objective == "entropy":
            shares = found.softmax(dim=1)
            total = total - (shares * shares.log()).sum(dim=1).mean()
        else:
            total = total + F.kl_div(
                (found / T).log_softmax(dim=1), (teacher / T).softmax(dim=1), reduction="batchmean"
            )
    return total


@pytest.mark.parametrize(
    ("by", "kind", "changes"),
    [
        ("channel", "full", {}), ("parameter", "full", {"temperature": 2.0}), ("task", "full", {}),
        ("channel", "lora", {}), ("parameter", "lora", {"objective": "entropy"}), ("task", "lora", {}),
        ("channel", "tangent", {}), ("parameter", "full", {"objective": "entropy", "clamp": (0.3, 0.45)}),
    ],
)  # fmt: skip
def test_gradients_are_those_of_autograd_through_the_merged_weights(suite, by, kind, changes):
    vectors = image_adapters(suite) if kind == "lora" else random_vectors(suite, tangent=kind == "tangent")
    one = learning(suite, vectors, tangent=kind == "tangent", by=by, **changes)
    c = {key: p.detach().clone().requires_grad_(True) for key, p in one.values.learned.items()}
    bounded = {key: p if one.plan.clamp is None else p.clamp(*one.plan.clamp) for key, p in c.items()}
    expected = reference_loss(one, suite, vectors, bounded, tangent=kind == "tangent")
    expected.backward()
    one.optimizer.step = lambda closure: closure()  # the gradients, no step
    assert one.step() == pytest.approx(expected.item(), rel=1e-4)
    for key, p in one.values.learned.items():
        torch.testing.assert_close(p.grad, c[key].grad, rtol=2e-3, atol=2e-5)
    assert any(p.grad.abs().max() > 1e-3 for p in one.values.learned.values())


def test_all_weights_have_their_own_gradient_and_start_at_the_average(suite):
    vectors = random_vectors(suite)
    one = learning(suite, vectors, by="weights")
    average = sum(vectors.values()) / 2
    for name, p in one.values.learned.items():
        torch.testing.assert_close(p.detach(), average[name])
    one.optimizer.step = lambda closure: closure()
    one.step()
    name = next(n for n in vectors["digits"] if n.endswith("out_proj.weight"))
    gradient = one.values.learned[name].grad
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    ends = []
    for sign in (1, -1):  # a slow derivative
        with torch.no_grad():
            one.values.learned[name].add_(sign * 1e-2 * direction)
        one.model.place()
        ends.append(sum(one.loss(task, 0).item() for task in vectors))
        with torch.no_grad():
            one.values.learned[name].sub_(sign * 1e-2 * direction)
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.02)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10))
def test_blocks_of_a_low_rank_delta_are_those_of_its_product(rows, columns, rank, seed):
    draw = torch.Generator().manual_seed(seed)
    delta = LowRank(torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw))
    gradient = torch.randn(rows, columns, generator=draw)
    for by in ("channel", "parameter"):
        count = blocks(delta, by)
        c = torch.randn(count, generator=draw)
        torch.testing.assert_close(scaled(delta, c).dense(), scaled(delta.dense(), c))
        torch.testing.assert_close(
            correlation(gradient, delta, count), correlation(gradient, delta.dense(), count), rtol=1e-4, atol=1e-5
        )
        # a move of c along its gradient moves ⟨gradient, c ∘ Δ⟩ by the gradient's square
        slope = correlation(gradient, delta, count)
        change = (gradient * (scaled(delta, c + slope).dense() - scaled(delta, c).dense())).sum()
        assert float(change) == pytest.approx(float(slope.square().sum()), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 2, 2)])
def test_blocks_of_every_shape(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for by in ("channel", "parameter"):
        count = blocks(delta, by)
        assert count == (shape[0] if by == "channel" and len(shape) > 1 else 1)
        c = torch.arange(1.0, count + 1)
        moved = scaled(delta, c)
        assert moved.shape == delta.shape
        if count > 1:
            torch.testing.assert_close(moved[1], 2 * delta[1])
        torch.testing.assert_close(correlation(delta, delta, count).sum(), delta.square().sum())


def test_steps_are_those_of_the_optimizer_on_autograds_gradients(suite):
    vectors = random_vectors(suite)
    how = {"by": "parameter", "lr": 0.05, "start": 0.4, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1}
    found = learn(suite, vectors, **how, **QUICK)
    one = learning(suite, vectors, by="parameter")  # for its batches
    c = {key: torch.full_like(p, 0.4).requires_grad_(True) for key, p in one.values.learned.items()}
    sgd = torch.optim.SGD(c.values(), lr=0.05, momentum=0.9, weight_decay=0.1)
    rates = plan(lr=0.05, schedule="cosine")
    for step in range(QUICK["steps"]):
        one.next_step = step
        sgd.param_groups[0]["lr"] = rates.rate(step)
        sgd.zero_grad()
        reference_loss(one, suite, vectors, c).backward()
        sgd.step()
    for key, value in found.values.items():
        torch.testing.assert_close(value, c[key].detach(), rtol=1e-4, atol=1e-5)
    moved = torch.cat([value.flatten() for value in found.values.values()])
    assert (moved - 0.4).abs().max() > 1e-3
    assert isinstance(plan().build(one.values), torch.optim.Adam)


def test_a_sharpness_aware_step_is_that_of_the_optimizer(suite):
    vectors = random_vectors(suite)
    one = learning(suite, vectors, rho=0.3)
    assert isinstance(one.optimizer, SharpnessAware)
    assert (one.optimizer.rho, one.optimizer.perturbation) == (0.3, "sam")
    calls, placed = [], []
    real = one.loss

    def noted(task, step):
        calls.append(task)
        placed.append(one.model.weights["proj"].sum().item())
        return real(task, step)

    one.loss = noted
    one.step()
    assert calls == list(vectors) * 2
    assert placed[0] == placed[1] != placed[2] == placed[3]  # the second gradient is taken elsewhere
    plain = learning(suite, vectors)
    plain.step()
    assert not equal(one.values.learned, plain.values.learned)


def test_one_task_at_its_own_model_has_nothing_to_learn(suite):
    vectors = {"digits": random_vectors(suite)["digits"]}
    found = learn(suite, vectors, start=1.0, optimizer="sgd", **QUICK)
    assert found.curve["loss"].abs().max() < 1e-6
    one = learning(suite, vectors, start=1.0)
    assert one.step() > 1e-4  # where it has moved away, there is a loss


def test_the_same_bits_twice_and_in_another_order(suite, fresh_store, monkeypatch):
    vectors = random_vectors(suite)
    first = learn(suite, vectors, **QUICK)
    monkeypatch.setenv("SAFTNB_STORE", f"{fresh_store}-2")
    second = learn(suite, dict(reversed(vectors.items())), **QUICK)
    assert equal(first.values, second.values)
    assert equal(dict(first.vector), dict(second.vector))
    assert first.fingerprint == second.fingerprint
    other = learn(suite, vectors, seed=1, **QUICK)
    assert not equal(first.values, other.values)


def test_what_was_learned_is_found_again(suite, fresh_store, monkeypatch):
    vectors = random_vectors(suite)
    first = learn(suite, vectors, **QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(Learning, "step", None)
        again = learn(suite, vectors, **QUICK)
    assert equal(dict(first.vector), dict(again.vector))
    assert first.coefficients.equals(again.coefficients)
    assert again.curve.round(6).equals(first.curve.round(6))
    file = next(fresh_store.glob("*/values.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.warns(UserWarning, match="damaged"):
        relearned = learn(suite, vectors, **QUICK)
    assert equal(first.values, relearned.values)


def test_everything_that_decides_the_result_is_in_its_fingerprint(suite):
    vectors = random_vectors(suite)
    changes = [
        {}, {"by": "task"}, {"objective": "entropy"}, {"rho": 0.1}, {"steps": 3}, {"examples": 11}, {"views": 5},
        {"batch_size": 7}, {"lr": 0.5}, {"start": 0.1}, {"temperature": 3.0}, {"clamp": (0, 1)}, {"schedule": "cosine"},
        {"optimizer": "sgd"}, {"momentum": 0.1}, {"weight_decay": 0.1}, {"perturbation": "asam"},
    ]  # fmt: skip
    assert {name for change in changes for name in change} == {field.name for field in dataclasses.fields(Plan)}
    described = [_describe(suite, vectors, plan(**change), 0, False, CPU) for change in changes]
    described.append(_describe(suite, vectors, plan(), 1, False, CPU))
    described.append(_describe(suite, vectors, plan(), 0, True, CPU))
    described.append(_describe(suite, vectors | {"digits": 2 * vectors["digits"]}, plan(), 0, False, CPU))
    described.append(_describe(suite, {"digits": vectors["digits"]}, plan(), 0, False, CPU))
    assert len({store.fingerprint(one) for one in described}) == len(described)
    assert learn(suite, vectors, **QUICK).fingerprint == learn(suite, vectors, **QUICK | {"progress": True}).fingerprint


def test_it_goes_on_where_it_was_cut_off(suite, fresh_store, monkeypatch):
    vectors = random_vectors(suite)
    whole = learn(suite, vectors, rho=0.1, **QUICK | {"steps": 7})
    monkeypatch.setenv("SAFTNB_STORE", f"{fresh_store}-2")
    monkeypatch.setattr(resume, "SAVE_EVERY", 3)  # between two looks
    monkeypatch.setattr(resume, "SAVE_SHARE", float("inf"))
    real, steps = Learning.step, []

    def step(self):
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(self.next_step)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Learning, "step", step)
        with pytest.raises(KeyboardInterrupt):
            learn(suite, vectors, rho=0.1, **QUICK | {"steps": 7})
    taken = []
    monkeypatch.setattr(Learning, "step", lambda self: taken.append(self.next_step) or real(self))
    resumed = learn(suite, vectors, rho=0.1, **QUICK | {"steps": 7})
    assert taken == [3, 4, 5, 6]
    assert equal(whole.values, resumed.values)
    assert whole.curve.equals(resumed.curve)


def test_kill_9_loses_nothing(suite, fresh_store, tmp_path, monkeypatch):
    script = tmp_path / "learn.py"
    script.write_text(
        textwrap.dedent("""
        from saftnb.finetune import resume
        from saftnb.merging import learn
        from saftnb.suites import load_suite
        from tests.merging.test_learning import random_vectors
        resume.SAVE_EVERY = 3
        suite = load_suite("thimble")
        learn(suite, random_vectors(suite), steps=24, batch_size=8, examples=12, views=0, device="cpu", progress=False)
    """)
    )
    process = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": os.getcwd()})
    deadline = time.time() + 60
    while not list((fresh_store / ".partial").glob("*.pt")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not [path for path in fresh_store.iterdir() if path.name != ".partial"]
    resumed = learn(suite, random_vectors(suite), **QUICK | {"steps": 24})
    monkeypatch.setenv("SAFTNB_STORE", f"{fresh_store}-2")
    assert equal(resumed.values, learn(suite, random_vectors(suite), **QUICK | {"steps": 24}).values)


def with_task(suite, name, **changes):
    """The suite with another version of one task."""
    tasks = {task: suite.tasks[task] for task in suite.tasks}
    tasks[name] = dataclasses.replace(tasks[name], **changes)
    return dataclasses.replace(suite, tasks=tasks, _heads={})


def test_labels_and_test_pictures_decide_nothing(suite):
    vectors = random_vectors(suite)
    first = learn(suite, vectors, **QUICK)
    split = suite.tasks["digits"].validation
    strange = dataclasses.replace(split, labels=split.labels.flip(0))
    other = learn(with_task(suite, "digits", validation=strange), vectors, **QUICK)
    assert other.fingerprint != first.fingerprint
    assert equal(first.values, other.values)
    assert not first.curve["validation_accuracy"].equals(other.curve["validation_accuracy"])
    hidden = suite.tasks["digits"].test[:5]
    assert equal(first.values, learn(with_task(suite, "digits", test=hidden), vectors, **QUICK).values)


def test_pools_are_drawn_without_labels_and_nested(suite):
    split = suite.tasks["digits"].validation
    pools = {n: pool(len(split), n, 0) for n in (4, 16, 0)}
    assert torch.equal(pools[16][:4], pools[4])
    assert torch.equal(pools[0][:16], pools[16])
    assert pools[0].sort().values.tolist() == list(range(len(split)))
    assert not torch.equal(pool(len(split), 16, 1), pools[16])
    few = learning(suite, random_vectors(suite), examples=4).pools["digits"]
    assert torch.equal(few, split.images[pools[4]])
    labels = split.labels[pools[16]]
    assert len(labels.unique()) < 10  # a prefix of the split would be balanced


def test_few_pictures_get_crops_which_their_own_model_has_seen(suite):
    vectors = random_vectors(suite)
    one = learning(suite, vectors, examples=5, views=18)
    pool, bare = one.pools["digits"], learning(suite, vectors, examples=5).pools["digits"]
    assert len(pool) == 15
    assert torch.equal(pool[:5], bare)
    assert not torch.equal(pool[5:10], bare)
    assert not torch.equal(pool[5:10], pool[10:])
    gap = (pool[5:10].float() - bare.float()).abs().mean()
    assert gap < (bare[1:].float() - bare[:-1].float()).abs().mean()  # a crop is nearer to its own picture
    teacher = suite.classifier("digits", suite.tower(vectors["digits"]))
    torch.testing.assert_close(one.teachers["digits"][12], teacher(pool[12:13]).log_softmax(dim=1)[0].detach())
    assert len(learning(suite, vectors, examples=12, views=18).pools["digits"]) == 12
    everything = {"examples": 0, "views": 120}  # the same pictures for every seed, and one round of crops
    first, other = (learning(suite, vectors, seed=seed, **everything).pools["digits"] for seed in (0, 1))
    assert len(first) == 120
    assert torch.equal(first[:60], other[:60])
    assert not torch.equal(first[60:], other[60:])
    assert not equal(learn(suite, vectors, **QUICK).values, learn(suite, vectors, **QUICK | {"views": 30}).values)


def test_batches_are_epochs_of_the_pool(suite):
    one = learning(suite, random_vectors(suite), examples=12, batch_size=5)
    seen = [one.batch("digits", step) for step in range(4)]
    assert all(len(batch) == 5 for batch in seen)
    assert len(torch.cat(seen[:2]).unique()) == 10  # two batches an epoch, of different pictures
    assert not torch.equal(seen[0], seen[2])
    small = learning(suite, random_vectors(suite), examples=3)
    assert sorted(small.batch("digits", 0).tolist()) == [0, 1, 2]


def test_adapters_stay_low_rank_and_agree_with_their_products(suite):
    vectors = image_adapters(suite)
    found = learn(suite, vectors, **QUICK)
    assert all(isinstance(d, LowRank) and d.B.shape[1] == 4 for d in found.vector.values())
    products = learn(suite, {task: vector.dense() for task, vector in vectors.items()}, **QUICK)
    for name, delta in found.vector.items():
        torch.testing.assert_close(delta.dense(), products.vector[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("by", ["channel", "parameter", "task", "weights"])
def test_sentence_pairs_learn_at_the_outputs_what_they_would_in_the_weights(pairs, by):
    before = {name: value.clone() for name, value in pairs.backbone.model.state_dict().items()}
    vectors = pair_adapters(pairs)
    quick = QUICK | {"steps": 2, "lr": 0.01}
    found = learn(pairs, vectors, by=by, **quick)
    products = {task: vector.dense() for task, vector in vectors.items()}
    through = learn(pairs, products, by=by, **quick)
    low = all(isinstance(delta, LowRank) for delta in found.vector.values())
    assert low == (by != "weights")
    for key, value in found.values.items():
        torch.testing.assert_close(value, through.values[key], rtol=1e-2, atol=2e-4)
    after = pairs.backbone.model.state_dict()
    assert equal(before, dict(after))
    start = 0.5 if by != "weights" else sum(products.values())[next(iter(found.values))] / 2
    assert (next(iter(found.values.values())) - start).abs().max() > 1e-4


def test_the_gradients_of_pairs_are_the_losses_own(pairs):
    vectors = pair_adapters(pairs)
    one = learning(pairs, vectors, by="parameter")
    one.optimizer.step = lambda closure: closure()
    one.step()
    key = max(one.values.learned, key=lambda name: float(one.values.learned[name].grad.abs().max()))
    slope = float(one.values.learned[key].grad[0, 0])
    ends = []
    for move in (0.02, -0.02):
        with torch.no_grad():
            one.values.learned[key][0, 0] += move
            one.model.place()
            ends.append(sum(one.loss(task, 0).item() for task in vectors))
            one.values.learned[key][0, 0] -= move
    assert slope == pytest.approx((ends[0] - ends[1]) / 0.04, rel=0.03)


@pytest.mark.parametrize("objective", ["distillation", "entropy"])
def test_a_class_that_a_task_lacks_gives_no_nan(pairs, objective):
    assert any(len(task.allowed) < 3 for task in pairs.tasks.values())
    found = learn(pairs, pair_adapters(pairs), objective=objective, **QUICK)
    assert found.curve["loss"].notna().all()


def test_clamped_coefficients_count_within_their_bounds(suite):
    found = learn(suite, random_vectors(suite), by="parameter", lr=0.5, start=0.9, clamp=(0.0, 1.0), **QUICK)
    raw = torch.cat([value.flatten() for value in found.values.values()])
    assert raw.max() > 1
    assert 0 <= found.coefficients.min().min() <= found.coefficients.max().max() == 1
    name = "proj"
    vectors = random_vectors(suite)
    c = found.coefficients.loc[name]
    torch.testing.assert_close(found.vector[name], sum(c[task] * vectors[task][name] for task in vectors))


def test_the_curve_has_mean_losses_and_validation_accuracies(suite, monkeypatch):
    real, losses = Learning.step, []

    def step(self):
        losses.append(real(self))
        return losses[-1]

    monkeypatch.setattr(Learning, "step", step)
    vectors = random_vectors(suite)
    found = learn(suite, vectors, **QUICK | {"steps": 8})
    assert found.curve["step"].tolist() == [0, 2, 4, 6, 8]
    expected = [losses[0], *(sum(losses[i : i + 2]) / 2 for i in (0, 2, 4, 6))]
    assert found.curve["loss"].tolist() == pytest.approx(expected)
    for row, vector in ((0, sum(vectors.values()) / 2), (4, found.vector)):
        accuracy = suite_accuracy(suite, vector, split="validation", device="cpu")["mean"]
        assert found.curve["validation_accuracy"][row] == pytest.approx(accuracy, abs=1e-6)
    assert len(learn(suite, vectors, **QUICK | {"steps": 1}).curve) == 2


def test_vectors_move_to_a_gpu_only_where_there_is_room(suite, monkeypatch):
    vector = random_vectors(suite)["digits"]
    moved = []
    monkeypatch.setattr(TaskVector, "to", lambda self, device: moved.append(device) or self)
    for free in (7 * vector.numel(), 9 * vector.numel()):  # four bytes an entry, twice
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        resident(vector, torch.device("cuda"))
    assert len(moved) == 1
    assert resident(vector, CPU) is vector


def test_the_tables_of_coefficients(suite):
    vectors = random_vectors(suite)
    channel = learn(suite, vectors, **QUICK)
    assert channel.coefficients.columns.tolist() == [(t, s) for t in vectors for s in ("mean", "spread")]
    value = channel.values["proj"]
    assert channel.coefficients.loc["proj", ("patterns", "mean")] == pytest.approx(value[1].mean().item())
    assert channel.coefficients.loc["proj", ("patterns", "spread")] == pytest.approx(value[1].std(correction=0).item())
    assert learn(suite, vectors, by="task", **QUICK).coefficients.shape == (1, 2)
    assert learn(suite, vectors, by="weights", **QUICK).coefficients.empty


@pytest.mark.parametrize("preset", PRESETS)
def test_the_papers_settings_run(suite, preset):
    plans = {"adamerging": (torch.optim.Adam, None), "samerging": (SharpnessAware, "asam")}
    values = Values(list(random_vectors(suite).values()), "parameter", 0.3, CPU)
    settings = {k: v for k, v in PRESETS[preset].items() if k != "views"}
    optimizer = plan(**settings).build(values)
    assert (type(optimizer), getattr(optimizer, "perturbation", None)) == plans[preset]
    found = learn(suite, random_vectors(suite), **PRESETS[preset] | QUICK)
    assert found.inputs["plan"]["by"] == "parameter"
    assert found.coefficients.shape == (len(random_vectors(suite)["digits"]), 2)


def test_adapters_in_half_precision_are_learned_in_float32(suite):
    vectors = {task: vector.to(torch.bfloat16) for task, vector in image_adapters(suite).items()}
    found = learn(suite, vectors, **QUICK)
    assert all(delta.dtype == torch.bfloat16 for delta in found.vector.values())
    assert all(value.dtype == torch.float32 for value in found.values.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "guessing"}, "objective is one of distillation, entropy, not 'guessing'"),
        ({"by": "layer"}, "by is one of channel, parameter, task, weights, not 'layer'"),
        ({"steps": 0}, "steps and batch_size are at least 1"),
        ({"examples": -1}, "examples is a number a task, or 0 for all, not -1"),
        ({"views": -1}, "views is a number a task"),
        ({"lr": 0.0}, "lr is above 0"),
        ({"lr": float("nan")}, "lr is above 0"),
        ({"rho": -0.1}, "rho is a number from 0"),
        ({"temperature": 0.0}, "temperature is above 0"),
        ({"clamp": (1.0, 0.0)}, "clamp is two rising numbers"),
        ({"clamp": (0.0, 1.0), "by": "weights"}, "clamp bounds coefficients"),
        ({"start": float("inf")}, "start is a finite number"),
        ({"momentum": 1.0}, "momentum lies in 0 to 1"),
        ({"optimizer": "adagrad"}, "optimizer is one of adam, sgd"),
    ],
)
def test_a_bad_setting_is_one_line(suite, changes, message, fresh_store):
    with pytest.raises(ValueError, match=message) as caught:
        learn(suite, random_vectors(suite), **QUICK | changes)
    assert "\n" not in str(caught.value)
    assert not fresh_store.exists()


def test_vectors_that_do_not_belong_are_one_line(suite, pairs, fresh_store):
    vectors = random_vectors(suite)
    with pytest.raises(KeyError, match="has no task 'cars'"):
        learn(suite, {"cars": vectors["digits"]}, **QUICK)
    with pytest.raises(ValueError, match="learn takes task vectors by task"):
        learn(suite, {}, **QUICK)
    with pytest.raises(ValueError, match="learn takes task vectors by task"):
        learn(suite, vectors["digits"], **QUICK)
    strange = {task: TaskVector({"other.weight": torch.ones(2, 2)}) for task in vectors}
    with pytest.raises(ValueError, match="do not belong to suite 'thimble'.* no parameter 'other.weight'"):
        learn(suite, strange, **QUICK)
    with pytest.raises(ValueError, match="'digits' and 'patterns' have different parameters"):
        learn(suite, vectors | {"patterns": strange["patterns"]}, **QUICK)
    with pytest.raises(ValueError, match="another base"):
        learn(pairs, dict.fromkeys(pairs.tasks, strange["digits"]), **QUICK)
    none = suite.tasks["digits"].validation[:0]
    empty = dataclasses.replace(suite, tasks={"digits": _without_pictures(suite.tasks["digits"], none)})
    with pytest.raises(ValueError, match="'digits' has no validation pictures"):
        learn(empty, {"digits": vectors["digits"]}, **QUICK)
    assert not fresh_store.exists()


def _without_pictures(task, none):
    bare = object.__new__(type(task))
    for field in dataclasses.fields(task):
        object.__setattr__(bare, field.name, getattr(task, field.name))
    object.__setattr__(bare, "validation", none)
    return bare


@pytest.mark.parametrize("rho", [None, 0.1])
def test_a_loss_that_is_not_finite_keeps_the_last_good_values(suite, fresh_store, monkeypatch, rho):
    vectors = random_vectors(suite)
    good = learn(suite, vectors, rho=rho, schedule="constant", **QUICK | {"steps": 2})
    real = Learning.loss

    def loss(self, task, step):
        return real(self, task, step) * (float("nan") if step == 2 else 1.0)

    monkeypatch.setattr(Learning, "loss", loss)
    with pytest.raises(
        FloatingPointError, match="the loss is nan at step 3; the values after 2 steps are kept"
    ) as caught:
        learn(suite, vectors, rho=rho, schedule="constant", **QUICK)
    name = str(caught.value).split("as .partial/")[1]
    assert equal(good.values, load_file(fresh_store / ".partial" / name))


def test_every_kind_has_a_rate():
    assert set(RATES) == {"channel", "parameter", "task", "weights"}


def test_the_schedule_warms_up_and_falls_to_nothing():
    rates = [plan(lr=1.0, steps=100, schedule="cosine").rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == pytest.approx(rates[19], abs=0.02)
    assert rates == sorted(rates[:20]) + sorted(rates[20:], reverse=True)
    assert rates[-1] < 1e-3
    assert {plan(lr=0.3).rate(step) for step in range(4)} == {0.3}


def test_models_of_both_ways_give_back_what_is_placed(suite, pairs):
    vectors = random_vectors(suite)
    values = Values(list(vectors.values()), "task", 0.5, CPU)
    model = InWeights(suite.tower(), values)
    model.place()
    expected = values.vector().apply_to(suite.tower()).state_dict()
    assert equal(dict(model.tower.state_dict()), dict(expected))
    adapters = pair_adapters(pairs)
    values = Values(list(adapters.values()), "channel", 0.5, CPU)
    tower = pairs.tower()
    AtOutputs(tower, values).place()
    inputs = pairs.tasks["kinds"].test[:4].inputs
    torch.testing.assert_close(tower(inputs), pairs.tower(values.vector())(inputs))


@pytest.mark.parametrize("low", [True, False])
def test_a_layer_that_the_loss_does_not_see_has_no_gradient_and_stops_nothing(pairs, low):
    """MiniLM's pooler runs, and what stands for a pair does not come from it."""
    unseen = "pooler.dense.weight"
    width = pairs.backbone.width
    delta = LowRank(torch.ones(width, 1), torch.ones(1, width)) if low else torch.ones(width, width)
    vectors = [TaskVector({**vector, unseen: delta}) for vector in pair_adapters(pairs).values()]
    values = Values(vectors, "parameter", 0.5, CPU)
    tower = pairs.tower()
    model = AtOutputs(tower, values)
    model.place()
    tower(pairs.tasks["kinds"].test[:4].inputs).square().sum().backward()
    model.collect()
    assert {name for name, p in values.learned.items() if p.grad is None} == {unseen}
