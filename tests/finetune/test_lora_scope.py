"""The scope "lora": adapters that train, as task vectors of low rank."""

import pytest
import torch

from saftnb.backbones import add_lora, lora_vector
from saftnb.evaluate import accuracy
from saftnb.finetune import finetune, recipe
from saftnb.finetune.measure import gradient_flops
from saftnb.finetune.train import Training, adapter_seed
from saftnb.suites import load_suite
from saftnb.task_vector import LowRank

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path / "store"))


@pytest.fixture(scope="module")
def suite():
    return load_suite("thimble")


def plan(name="lora", **changes):
    return recipe(name, "thimble", **{"steps": 6, "warmup": 2, "evaluate_every": 3, "rank": 4} | changes)


def training(suite, plan, seed=0):
    return Training(suite.classifier("digits"), suite.tasks["digits"], plan, seed, CPU)


@pytest.mark.parametrize("name", ["lora", "lora+saft"])
def test_adapters_train_to_low_rank_task_vectors(suite, name):
    trained = finetune(suite, "digits", plan(name, alpha=8), progress=False)
    vector = trained.task_vector
    assert all(isinstance(delta, LowRank) and delta.B.shape[1] == 4 for delta in vector.values())
    assert {n.split(".")[-2] for n in vector} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert vector.norm() > 0
    tower = suite.tower(vector)
    again = accuracy(suite.classifier("digits", tower), suite.tasks["digits"].validation)
    assert again == pytest.approx(trained.validation_accuracy, abs=0.02)
    stored = finetune(suite, "digits", plan(name, alpha=8), progress=False).task_vector
    assert all(torch.equal(stored[n].B, d.B) and torch.equal(stored[n].A, d.A) for n, d in vector.items())


def test_the_scale_of_an_adapter_is_alpha_over_rank(suite):
    """The task vector is what PEFT's own forward pass adds."""
    run = training(suite, plan(alpha=12, dropout=0.0))
    for _ in range(3):
        run.step()
    run.look(0.0)
    images = suite.tasks["digits"].test[:20].images
    with torch.no_grad():
        theirs = run.classifier.eval()(images)
        ours = suite.classifier("digits", suite.tower(run.task_vector()))(images)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_interrupted_training_with_dropout_ends_in_the_same_bits(suite):
    whole = training(suite, plan("lora+saft", dropout=0.3))
    whole.run(lambda state: None, label="", progress=False)
    first = training(suite, plan("lora+saft", dropout=0.3))
    for _ in range(4):
        loss = first.step()
        if first.next_step == 3:
            first.look(loss)
    torch.rand(7)  # whatever happens to the global generator in between
    second = training(suite, plan("lora+saft", dropout=0.3))
    second.load_state(first.state())
    second.run(lambda state: None, label="", progress=False)
    assert whole.history == second.history
    ours, theirs = whole.task_vector(), second.task_vector()
    assert all(torch.equal(ours[n].B, theirs[n].B) and torch.equal(ours[n].A, theirs[n].A) for n in ours)


def test_steps_leave_the_global_generator_alone_and_dropout_matters(suite):
    state = torch.get_rng_state()
    one, two = training(suite, plan(dropout=0.5)), training(suite, plan(dropout=0.0))
    losses = [[run.step() for _ in range(3)] for run in (one, two)]
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0][0] == losses[1][0]  # B is 0: nothing to drop
    assert losses[0][2] != losses[1][2]


def test_asam_has_no_perturbation_while_b_is_zero(suite):
    """At the first step |w| g is 0 on B, and A's gradient is 0: SAFT's first step is AdamW's, clipped."""
    steps = {name: training(suite, plan(name, dropout=0.2)) for name in ("lora", "lora+saft")}
    after = {}
    for name, run in steps.items():
        run.step()
        after[name] = {n: p.detach().clone() for n, p in run.trained.items()}
    assert all(torch.equal(after["lora"][n], after["lora+saft"][n]) for n in after["lora"])
    for name, run in steps.items():
        run.step()
        after[name] = {n: p.detach().clone() for n, p in run.trained.items()}
    assert not all(torch.equal(after["lora"][n], after["lora+saft"][n]) for n in after["lora"])


def test_patience_ends_a_training_that_gains_too_little(suite):
    run = training(suite, plan(patience=2, min_delta=0.05))
    for accuracies, ends in (
        ([0.5, 0.6, 0.64], False),
        ([0.5, 0.6, 0.64, 0.65], True),
        ([0.5, 0.6, 0.62, 0.66], False),
    ):
        run.history = [(i, 0.0, accuracy) for i, accuracy in enumerate(accuracies)]
        assert run.reached is ends
    none = training(suite, plan())
    none.history = [(i, 0.0, 0.5) for i in range(50)]
    assert not none.reached


def test_ranks_may_differ_and_the_first_factors_follow_the_seed(suite):
    small, large = (training(suite, plan(rank=r)) for r in (2, 8))
    sizes = [sum(p.numel() for p in run.trained.values()) for run in (small, large)]
    assert sizes[1] == 4 * sizes[0]
    tower = add_lora(suite.tower(), rank=2, seed=adapter_seed(suite.tasks["digits"], plan(), 0))
    assert torch.equal(
        small.classifier.tower.state_dict()["transformer.resblocks.0.attn.q_proj.lora_A.default.weight"],
        tower.state_dict()["transformer.resblocks.0.attn.q_proj.lora_A.default.weight"],
    )
    assert not lora_vector({n: p for n, p in tower.named_parameters() if "lora_" in n}, 1.0).norm()


def test_all_tasks_start_from_one_a_or_each_from_its_own(suite):
    """KnOTS's released script copies one LoRA model for every task; with separate ones the fingerprints differ, too."""

    def first(task, seed, shared):
        recipe_ = plan(shared_init=shared)
        run = Training(suite.classifier(task, suite.tower()), suite.tasks[task], recipe_, seed, torch.device("cpu"))
        return {name: p.detach() for name, p in run.trained.items() if "lora_A" in name}

    def equal(a, b):
        return all(torch.equal(a[name], b[name]) for name in a)

    one, two = list(suite.tasks)[:2]
    assert equal(first(one, 0, True), first(two, 0, True))
    assert not equal(first(one, 0, True), first(one, 1, True))
    assert not equal(first(one, 0, False), first(two, 0, False))
    assert not equal(first(one, 0, False), first(one, 1, False))
    assert plan().shared_init
    assert plan().inputs()["shared_init"] is True  # named, since older checkpoints of the same fields had separate ones
    assert plan(shared_init=False).inputs() != plan().inputs()


def test_the_paper_s_values():
    knots = recipe("lora", "vision8")
    assert (knots.rank, knots.alpha, knots.dropout, knots.lr, knots.weight_decay) == (16, 16, 0.1, 3e-4, 0.1)
    assert (knots.steps, knots.batch_size, knots.evaluate_every, knots.patience, knots.min_delta) == (
        50_000,
        32,
        2000,
        5,
        1e-3,
    )
    assert gradient_flops("pocket-0", "lora") < gradient_flops("pocket-0", "full")
