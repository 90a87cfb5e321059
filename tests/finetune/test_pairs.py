"""Adapters and heads for sentence pairs."""

import copy

import pytest
import torch
import torch.nn.functional as F

from saftnb.backbones import threads
from saftnb.evaluate import SuiteAccuracy, accuracies, individual_hits, suite_hits
from saftnb.finetune import SharpnessAware, TaskVectors, ascent_step, finetune, measure, recipe, store
from saftnb.finetune.train import CPU_THREADS, Training
from saftnb.suites import load_suite
from saftnb.task_vector import LowRank

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path / "store"))


@pytest.fixture(scope="module")
def suite():
    return load_suite("thimble-nli")


def plan(name="lora", **changes):
    return recipe(name, "thimble-nli", **{"rank": 2} | changes)


def test_an_adapter_and_its_head_are_trained_kept_and_found_again(suite):
    before = {name: value.clone() for name, value in suite.backbone.model.state_dict().items()}
    result = finetune(suite, "kinds", plan(), progress=False)
    after = suite.backbone.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert sorted(result.task_vector) == sorted(suite.backbone.layers)
    assert all(isinstance(d, LowRank) and d.B.shape[1] == 2 for d in result.task_vector.values())
    assert not torch.equal(result.head, suite.head("kinds"))
    again = finetune(suite, "kinds", plan(), progress=False)
    assert torch.equal(again.head, result.head)
    own = suite.with_heads({"kinds": result.head})
    found = accuracies(individual_hits(own, {"kinds": result.task_vector}, split="validation"))
    assert found["kinds"] == pytest.approx(result.validation_accuracy, abs=1e-6)
    head = store.store_root() / store.folder_name(result.inputs) / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged"):
        assert store.load(result.inputs) is None


def test_tasks_share_their_start_and_seeds_do_not(suite):
    def start(task, seed):
        training = Training(suite.classifier(task), suite.tasks[task], plan(), seed, CPU)
        training.close()
        return training.start

    kinds, coordination, other = start("kinds", 0), start("coordination", 0), start("kinds", 1)
    assert all(torch.equal(kinds[name], coordination[name]) for name in kinds)
    assert not all(torch.equal(kinds[name], other[name]) for name in kinds)


def test_a_cut_off_training_ends_with_the_same_bits(suite):
    settings = plan("lora+saft", dropout=0.1)
    whole = Training(suite.classifier("kinds"), suite.tasks["kinds"], settings, 0, CPU)
    whole.run(lambda state: None, label="", progress=False)
    whole.close()
    first = Training(suite.classifier("kinds"), suite.tasks["kinds"], settings, 0, CPU)
    with threads(CPU_THREADS):
        for _ in range(3):
            first.step()
    state = copy.deepcopy(first.state())
    first.close()
    second = Training(suite.classifier("kinds"), suite.tasks["kinds"], settings, 0, CPU)
    second.load_state(state)
    second.run(lambda state: None, label="", progress=False)
    second.close()
    assert torch.equal(second.best_head, whole.best_head)
    assert all(torch.equal(second.best[name], value) for name, value in whole.best.items())
    assert not any("weight" in name and "lora" not in name for name in state["trained"])


def test_what_a_sharpness_aware_step_perturbs(suite):
    """The gradient that AdamW gets is that at w + ε, ε of the factors alone: against a second pass by hand."""
    settings = plan("lora+saft", rho=0.5, clip_norm=1e9)
    run = Training(suite.classifier("kinds"), suite.tasks["kinds"], settings, 0, CPU)
    for _ in range(3):
        run.step()  # B is 0 at first
    tokens, labels = next(run.batches)
    model = run.classifier.train()
    names = list(run.trained)
    parameters = [*run.trained.values(), run.head]

    def gradients():
        for p in parameters:
            p.grad = None
        F.cross_entropy(model(tokens), labels).backward()
        return [p.grad.clone() for p in parameters]

    gradients()
    eps = ascent_step([(name, p) for name, p in run.trained.items()], "asam", 0.5)
    with torch.no_grad():
        for p, e in zip(run.trained.values(), eps, strict=True):
            p.add_(e)
    expected = gradients()
    with torch.no_grad():
        for p, e in zip(run.trained.values(), eps, strict=True):
            p.sub_(e)

    def closure():
        run.optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), labels)
        loss.backward()
        return loss

    run.optimizer.step(closure)
    run.close()
    for name, p, wanted in zip([*names, "head"], parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, atol=1e-5, rtol=1e-3, msg=name)


def test_a_group_that_is_not_perturbed_has_no_epsilon():
    one, two = torch.nn.Parameter(torch.tensor([2.0])), torch.nn.Parameter(torch.tensor([3.0]))
    base = torch.optim.SGD([{"params": [one]}, {"params": [two], "perturb": False}], lr=0.1)
    seen = []

    def closure():
        seen.append((one.item(), two.item()))
        base.zero_grad()
        loss = (one * two).sum()
        loss.backward()
        return loss

    SharpnessAware(base, 0.5, "sam").step(closure)
    assert seen == [(2.0, 3.0), (2.5, 3.0)]
    assert one.item() == pytest.approx(2.0 - 0.1 * 3.0)
    assert two.item() == pytest.approx(3.0 - 0.1 * 2.5)


def test_checkpointing_changes_no_gradient(suite):
    def gradient(checkpointing):
        run = Training(suite.classifier("kinds"), suite.tasks["kinds"], plan(checkpointing=checkpointing), 0, CPU)
        run.step()
        found = {name: p.grad.clone() for name, p in run.trained.items()}
        run.close()
        return found

    plain, saved = gradient(False), gradient(True)
    for name, wanted in plain.items():
        torch.testing.assert_close(saved[name], wanted, atol=1e-6, rtol=1e-4)


def test_only_adapters_are_trained(suite):
    full = recipe("sgd", "thimble")
    with pytest.raises(ValueError, match="adapters alone, scope lora, not 'full'"):
        Training(suite.classifier("kinds"), suite.tasks["kinds"], full, 0, CPU)
    with pytest.raises(ValueError, match="has no recipe 'sgd'"):
        recipe("sgd", suite)


def test_the_schedule_is_a_line():
    settings = plan(steps=10, warmup=2, lr=1.0, schedule="linear")
    rates = [settings.learning_rate(step) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, *[(10 - step) / 8 for step in range(2, 10)]])
    with pytest.raises(ValueError, match="schedule is one of cosine, linear"):
        plan(schedule="step")


def test_many_models_by_their_vectors_and_heads(suite):
    vectors = TaskVectors(suite, {"lora": plan()}, [0], progress=False)
    own = suite.with_heads(vectors.heads("lora", 0))
    score = SuiteAccuracy(own, examples=6)
    each = vectors["lora", 0]
    merged = sum(each.values())
    assert score(0.5 * merged) == accuracies(suite_hits(own, 0.5 * merged, split="validation", examples=6))


def test_the_work_of_llama_is_counted_and_other_models_are_refused():
    """A layer's matrices, by hand: a product costs 2 operations an entry and token; frozen weights need no gradient."""
    q, kv, mlp, tokens, layers = 4096 * 4096, 1024 * 4096, 3 * 4096 * 14336, measure.PAIR_TOKENS, 32
    forward = 2 * tokens * (2 * q + 2 * kv + mlp)
    counted = measure.pair_gradient_flops("meta-llama/Meta-Llama-3-8B") / layers
    # forward, again up to the layer's last product, and backward to the inputs
    assert counted == pytest.approx(3 * forward - 2 * tokens * mlp / 3, rel=0.02)
    with pytest.raises(ValueError, match="give budgets instead"):
        measure.pair_gradient_flops("minilm")
