"""Fine-tuning is memoised by content, resumable, and the same bits for the same seed."""

import dataclasses
import gc
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref

import pytest
import torch
import torch.nn.functional as F

from saftnb import disk
from saftnb.evaluate import accuracy
from saftnb.finetune import TaskVectors, finetune, recipe, resume, store
from saftnb.finetune import train as train_module
from saftnb.finetune.train import Training, draw_batch
from saftnb.suites import load_suite
from saftnb.suites.task import random_resized_crop
from saftnb.task_vector import TaskVector

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture(scope="module")
def suite():
    return load_suite("thimble")


def plan(name="saft", **changes):
    return recipe(name, "thimble", **{"steps": 6, "warmup": 2, "evaluate_every": 3, "batch_size": 16} | changes)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def count_steps(monkeypatch):
    steps = []
    real = Training.step
    monkeypatch.setattr(Training, "step", lambda self: steps.append(self.next_step) or real(self))
    return steps


def test_trained_once_then_loaded_with_the_same_bits(suite, monkeypatch):
    steps = count_steps(monkeypatch)
    first = finetune(suite, "digits", plan(), progress=False)
    assert len(steps) == 6
    second = finetune(suite, "digits", plan(), progress=False)
    assert len(steps) == 6
    assert equal(first.task_vector, second.task_vector)
    assert first.history.equals(second.history)
    assert first.fingerprint == second.fingerprint
    file = store.store_root() / store.folder_name(first.inputs) / "task_vector.safetensors"
    assert first.weights_sha256 == second.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_run_notes_the_checkpoints_that_it_trained_or_loaded(suite, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_RUN_DIR", str(tmp_path))
    first = finetune(suite, "digits", plan(steps=3), progress=False)
    noted = json.loads((tmp_path / ".checkpoints.json").read_text())
    assert noted == [{"name": store.folder_name(first.inputs), "fingerprint": first.fingerprint}]
    (tmp_path / ".checkpoints.json").unlink()
    finetune(suite, "digits", plan(steps=3), progress=False)
    assert json.loads((tmp_path / ".checkpoints.json").read_text()) == noted


def test_the_same_seed_gives_the_same_bits_and_another_does_not(suite, fresh_store, monkeypatch):
    first = finetune(suite, "digits", plan(), progress=False)
    monkeypatch.setenv("SAFTNB_STORE", str(fresh_store) + "-2")
    torch.manual_seed(99)  # training draws nothing from the global generator
    torch.set_num_threads(1)
    assert equal(first.task_vector, finetune(suite, "digits", plan(), progress=False).task_vector)
    assert not equal(first.task_vector, finetune(suite, "digits", plan(), seed=1, progress=False).task_vector)


def test_everything_that_decides_the_result_is_in_the_fingerprint(suite):
    from saftnb.finetune.experts import describe

    base = describe(suite, "digits", plan(), 0, CPU)
    others = [
        describe(suite, "patterns", plan(), 0, CPU),
        describe(suite, "digits", plan(lr=1e-4), 0, CPU),
        describe(suite, "digits", plan("sgd"), 0, CPU),
        describe(suite, "digits", plan(), 1, CPU),
        describe(suite, "digits", plan(), 0, torch.device("cuda")),
        base | {"data": "other"},
        base | {"backbone": "other"},
        base | {"version": 0},
        describe(suite, "digits", plan(clip="first"), 0, CPU),
        describe(suite, "digits", plan(accumulate=2), 0, CPU),
        describe(suite, "digits", plan(precision="bf16"), 0, CPU),
        describe(suite, "digits", plan(compile=True), 0, CPU),
        describe(suite, "digits", plan(patience=2), 0, CPU),
        describe(suite, "digits", plan(rank=2), 0, CPU),
    ]
    assert len({store.fingerprint(inputs) for inputs in (base, *others)}) == 15
    changes = {"clip": "first", "accumulate": 2, "precision": "bf16", "compile": True, "rank": 2, "alpha": 3}
    changes |= {"dropout": 0.2, "patience": 1, "min_delta": 0.1, "schedule": "linear", "checkpointing": True}
    changes |= {"shared_init": False}
    everything = plan(**changes).inputs()
    assert set(everything) == {field.name for field in dataclasses.fields(plan())}


def test_the_result_learns_and_is_the_best_look(suite):
    result = finetune(suite, "patterns", recipe("sgd", suite), progress=False)
    assert list(result.history["step"]) == [8, 16, 24]
    assert result.validation_accuracy == result.history["validation_accuracy"].max()
    tuned = suite.classifier("patterns")
    result.task_vector.apply_to(tuned.tower)
    validation = suite.tasks["patterns"].validation
    assert accuracy(tuned, validation) == pytest.approx(result.validation_accuracy, abs=0.011)
    assert accuracy(tuned, validation) > accuracy(suite.classifier("patterns"), validation) + 0.1


def test_a_recipe_stops_at_the_accuracy_it_is_given(suite, monkeypatch):
    """The weights are those that the whole training has at that look, since the schedule stays the same."""
    changes = {"batch_size": 32, "evaluate_every": 4}
    whole = finetune(suite, "patterns", recipe("sgd", suite, **changes), progress=False)
    looks = whole.history
    place = looks["validation_accuracy"].argmax()
    wanted, steps_there = looks["validation_accuracy"].iloc[place], looks["step"].iloc[place]
    assert 4 < steps_there < 24
    stopping = recipe("sgd", suite, **changes, stop_at=wanted)
    steps = count_steps(monkeypatch)
    stopped = finetune(suite, "patterns", stopping, progress=False)
    assert len(steps) == steps_there
    assert stopped.validation_accuracy == wanted
    assert stopped.history.equals(looks.iloc[: place + 1])
    reference = Training(suite.classifier("patterns"), suite.tasks["patterns"], recipe("sgd", suite, **changes), 0, CPU)
    with train_module.threads(1):
        for _ in range(steps_there):
            reference.step()
    tuned = suite.classifier("patterns")
    stopped.task_vector.apply_to(tuned.tower)
    for got, expected in zip(tuned.tower.parameters(), reference.classifier.tower.parameters(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_an_accuracy_out_of_reach_lets_it_train_to_the_end(suite):
    never = finetune(suite, "patterns", plan("sgd", stop_at=1.0, evaluate_every=2), progress=False)
    assert never.history["step"].tolist() == [2, 4, 6]


def test_the_earliest_of_equal_looks_is_kept(suite):
    training = Training(suite.classifier("digits"), suite.tasks["digits"], plan(lr=0.0), 0, CPU)
    training.look(0.0)
    before = {name: p.clone() for name, p in training.best.items()}
    with torch.no_grad():
        for p in training.classifier.tower.parameters():
            p.mul_(1 + 1e-7)
    training.look(0.0)
    assert training.history[0][2] == training.history[1][2]
    assert equal(before, training.best)


@pytest.mark.parametrize("name", ["sgd", "saft"])
def test_a_step_is_the_plain_loop_written_out(suite, name):
    """Slow reference: AdamW by its formula, the ASAM ascent by its formula, clipping, warm-up."""
    task, settings = suite.tasks["digits"], plan(name)
    training = Training(suite.classifier("digits"), task, settings, 0, CPU)
    model = suite.classifier("digits").train()
    model.tower.requires_grad_(True)
    params = list(model.tower.parameters())
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for step in range(3):
        pixels, labels = draw_batch(task.train, settings, 0, step)

        def gradients(pixels=pixels, labels=labels):
            return torch.autograd.grad(F.cross_entropy(model(pixels), labels), params)

        g = gradients()
        if name == "saft":
            saved = [p.detach().clone() for p in params]
            norm = sum(((p.abs() * d) ** 2).sum() for p, d in zip(saved, g, strict=True)).sqrt()
            with torch.no_grad():
                for p, w, d in zip(params, saved, g, strict=True):
                    p.copy_(w + settings.rho * w**2 * d / (norm + 1e-12))
            g = gradients()
            with torch.no_grad():
                for p, w in zip(params, saved, strict=True):
                    p.copy_(w)
        total = sum((d**2).sum() for d in g).sqrt()
        g = [d * min(1.0, settings.clip_norm / (total.item() + 1e-6)) for d in g]
        rate = settings.lr * (step + 1) / 2 if step < 2 else settings.learning_rate(step)
        with torch.no_grad():
            for i, p in enumerate(params):
                m[i], v[i] = 0.9 * m[i] + 0.1 * g[i], 0.999 * v[i] + 0.001 * g[i] ** 2
                p.mul_(1 - rate * settings.weight_decay)
                p.sub_(rate * (m[i] / (1 - 0.9 ** (step + 1))) / ((v[i] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
        training.step()
    # AdamW's step has size lr whatever the gradient, so weights whose gradient is nearly 0 may differ by 2 lr.
    ours = torch.cat([p.detach().flatten() for p in training.classifier.tower.parameters()])
    theirs = torch.cat([p.detach().flatten() for p in params])
    assert (ours - theirs).abs().mean() < 1e-2 * settings.lr


@pytest.mark.parametrize("name", ["ftlo", "ftlo+saft"])
def test_the_attention_scope_trains_the_attention_weights_alone(suite, name):
    before = dict(suite.backbone.image_tower().named_parameters())
    training = Training(suite.classifier("digits"), suite.tasks["digits"], plan(name), 0, CPU)
    for _ in range(3):
        training.step()
    after = dict(training.classifier.tower.named_parameters())
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    blocks = range(len(suite.backbone.image_tower().transformer.resblocks))
    expected = {f"transformer.resblocks.{b}.attn.{part}_proj.weight" for b in blocks for part in ("q", "k", "v", "out")}
    assert moved == expected
    result = finetune(suite, "digits", plan(name, steps=3), progress=False)
    assert set(result.task_vector) == expected


@pytest.mark.parametrize("name", ["ftts", "ftts+saft"])
def test_a_tangent_step_is_the_plain_loop_on_the_taylor_model(suite, name):
    """Slow reference: the Taylor model by one backward-mode product per embedding entry, plain gradient descent."""
    task, settings = suite.tasks["digits"], plan(name, batch_size=2, weight_decay=0.0, clip_norm=1e9)
    training = Training(suite.classifier("digits", suite.tower(tangent=True)), task, settings, 0, CPU)
    start = suite.tower()
    vector = {
        n: 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for n, p in start.named_parameters()
    }
    TaskVector(vector).apply_to(training.classifier.tower)
    pixels, labels = draw_batch(task.train, settings, 0, 0)
    head, names = suite.classifier("digits"), list(vector)
    rows = start.requires_grad_(True)(head.pixels(pixels))
    jacobian = [
        [torch.autograd.grad(entry, list(start.parameters()), retain_graph=True) for entry in row] for row in rows
    ]
    theta0 = [p.detach() for p in start.parameters()]

    def gradient(theta):
        theta = [t.clone().requires_grad_(True) for t in theta]
        embeddings = torch.stack([
            torch.stack([
                value.detach() + sum((j * (t - t0)).sum() for j, t, t0 in zip(entry, theta, theta0, strict=True))
                for value, entry in zip(row, entries, strict=True)
            ])
            for row, entries in zip(rows, jacobian, strict=True)
        ])  # fmt: skip
        return torch.autograd.grad(F.cross_entropy(head.classify(embeddings), labels), theta)

    theta = [t0 + vector[n] for n, t0 in zip(names, theta0, strict=True)]
    expected = gradient(theta)
    if name == "ftts+saft":  # |w| is |θ|, not |θ − θ0|
        norm = sum(((t * g) ** 2).sum() for t, g in zip(theta, expected, strict=True)).sqrt()
        expected = gradient([t + settings.rho * t**2 * g / norm for t, g in zip(theta, expected, strict=True)])
    training.optimizer.zero_grad()
    training.step()
    for p, wanted in zip(training.classifier.tower.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, atol=2e-4 * float(wanted.abs().max()) + 1e-7, rtol=2e-3)


def test_a_tangent_model_is_trained_saved_and_read_as_one(suite):
    result = finetune(suite, "patterns", recipe("ftts", suite), progress=False)
    validation = suite.tasks["patterns"].validation
    tuned = suite.classifier("patterns", suite.tower(result.task_vector, tangent=True))
    assert accuracy(tuned, validation) == pytest.approx(result.validation_accuracy, abs=0.011)
    assert accuracy(tuned, validation) > accuracy(suite.classifier("patterns"), validation) + 0.05


@pytest.mark.parametrize("name", ["sgd", "saft", "ftts"])
def test_accumulated_gradients_are_those_of_the_whole_batch(suite, name):
    grads = []
    for accumulate in (1, 3):
        settings = plan(name, accumulate=accumulate)
        model = suite.classifier("digits", suite.tower(tangent=settings.tangent))
        training = Training(model, suite.tasks["digits"], settings, 0, CPU)
        losses = [training.step() for _ in range(1)]
        grads.append([torch.tensor(losses), *(p.grad for p in model.tower.parameters())])
    for one, three in zip(*grads, strict=True):
        torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-3)


def test_clipping_the_first_gradient_alone_leaves_the_update_unclipped(suite):
    norms = {}
    for clip in ("both", "first"):
        training = Training(suite.classifier("digits"), suite.tasks["digits"], plan(clip=clip, clip_norm=0.01), 0, CPU)
        training.step()
        norms[clip] = sum(p.grad.square().sum() for p in training.trained.values()).sqrt().item()
    assert norms["both"] == pytest.approx(0.01, rel=1e-3)
    assert norms["first"] > 0.1
    plain = Training(
        suite.classifier("digits"), suite.tasks["digits"], plan("sgd", clip="first", clip_norm=0.01), 0, CPU
    )
    plain.step()
    assert sum(p.grad.square().sum() for p in plain.trained.values()).sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_no_interval_means_a_look_an_epoch(suite):
    result = finetune(suite, "digits", plan("sgd", steps=9, batch_size=64, evaluate_every=0), progress=False)
    assert result.history["step"].tolist() == [4, 8, 9]  # 256 pictures are four batches


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no bfloat16 instructions")
@pytest.mark.parametrize("name", ["saft", "ftts"])
def test_bf16_runs_the_tower_in_bfloat16_and_all_else_in_float32(suite, name):
    seen, grads = [], []
    for precision in ("float32", "bf16"):
        settings = plan(name, precision=precision)
        model = suite.classifier("digits", suite.tower(tangent=settings.tangent))
        model.tower.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
        training = Training(model, suite.tasks["digits"], settings, 0, CPU)
        training.step()
        grads.append(torch.cat([p.grad.flatten() for p in model.tower.parameters()]))
        assert {p.dtype for p in model.tower.parameters()} == {torch.float32}
        assert model(suite.tasks["digits"].test.images[:2]).dtype == torch.float32
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert torch.cosine_similarity(*grads, dim=0) > 0.97


def test_a_device_without_bfloat16_is_refused_before_training(suite, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="no bfloat16 instructions; use precision 'float32'"):
        finetune(suite, "digits", plan(precision="bf16"), device="cpu")


def test_compiling_changes_no_gradient_beyond_rounding(suite):
    grads = []
    for compiled in (False, True):
        model = suite.classifier("digits")
        del model.tower.transformer.resblocks[1:]  # compiling takes its time
        training = Training(model, suite.tasks["digits"], plan(compile=compiled), 0, CPU)
        training.step()
        grads.append([p.grad for p in training.trained.values()])
    for plain, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-3)


def test_interrupted_training_goes_on_to_the_same_bits(suite, fresh_store, monkeypatch):
    whole = finetune(suite, "digits", plan(), progress=False)
    monkeypatch.setenv("SAFTNB_STORE", str(fresh_store) + "-2")
    monkeypatch.setattr(resume, "SAVE_EVERY", 2)
    monkeypatch.setattr(resume, "SAVE_SHARE", float("inf"))
    real = Training.step

    def dies(self):
        if self.next_step == 5:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            finetune(suite, "digits", plan(), progress=False)
    steps = count_steps(monkeypatch)
    resumed = finetune(suite, "digits", plan(), progress=False)
    assert steps == [4, 5]
    assert equal(whole.task_vector, resumed.task_vector)
    assert whole.history.equals(resumed.history)
    assert not list((store.store_root() / ".partial").glob("*.pt"))


def test_slow_saves_are_made_less_often(suite, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_EVERY", 1)
    settings = plan("sgd", steps=30, evaluate_every=30)
    saved = []
    training = Training(suite.classifier("digits"), suite.tasks["digits"], settings, 0, CPU)
    training.run(lambda state: saved.append(state["next_step"]) or time.sleep(0.3), label="", progress=False)
    assert saved[0] == 1
    assert len(saved) < 10


def test_a_training_state_that_cannot_be_read_is_left_aside(suite, fresh_store, monkeypatch):
    inputs_of = finetune(suite, "digits", plan(), progress=False)
    monkeypatch.setenv("SAFTNB_STORE", str(fresh_store) + "-2")
    state = store.store_root() / ".partial" / f"{store.folder_name(inputs_of.inputs)}.pt"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"not a training state")
    with pytest.warns(UserWarning, match="cannot be read"):
        again = finetune(suite, "digits", plan(), progress=False)
    assert equal(again.task_vector, inputs_of.task_vector)


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest", "missing"])
def test_a_damaged_checkpoint_is_trained_again(suite, monkeypatch, damage):
    first = finetune(suite, "digits", plan(), progress=False)
    folder = store.store_root() / store.folder_name(first.inputs)
    weights = folder / "task_vector.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:1000])
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        weights.unlink()
    steps = count_steps(monkeypatch)
    with pytest.warns(UserWarning, match="is damaged and is trained again"):
        again = finetune(suite, "digits", plan(), progress=False)
    assert len(steps) == 6
    assert equal(first.task_vector, again.task_vector)
    assert finetune(suite, "digits", plan(), progress=False).fingerprint == first.fingerprint


def test_a_failing_write_leaves_no_checkpoint(suite, monkeypatch):
    monkeypatch.setattr(disk, "_take_place", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        finetune(suite, "digits", plan(steps=3), progress=False)
    assert [p.name for p in store.store_root().iterdir()] == [".partial"]


def _train_and_count(queue, folder):
    os.environ["SAFTNB_STORE"] = folder
    steps = []
    real = Training.step
    Training.step = lambda self: steps.append(0) or real(self)
    result = finetune(load_suite("thimble"), "digits", plan(), progress=False)
    queue.put((len(steps), result.fingerprint))


def test_two_processes_that_need_the_same_checkpoint_train_it_once(fresh_store):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once for both
    queue = context.Queue()
    workers = [context.Process(target=_train_and_count, args=(queue, str(fresh_store))) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=100) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(steps for steps, _ in answers) == [0, 6]
    assert len({fingerprint for _, fingerprint in answers}) == 1


def test_kill_9_in_mid_training_loses_nothing(suite, fresh_store, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        from saftnb.finetune import finetune, recipe, resume
        from saftnb.suites import load_suite
        resume.SAVE_EVERY = 2
        plan = recipe("saft", "thimble", steps=24, warmup=2, evaluate_every=8, batch_size=16)
        finetune(load_suite("thimble"), "digits", plan, progress=False)
    """)
    )
    process = subprocess.Popen([sys.executable, script])
    deadline = time.time() + 60
    while not list((fresh_store / ".partial").glob("*.pt")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not [p for p in fresh_store.iterdir() if p.name != ".partial"]
    long = plan(steps=24, evaluate_every=8)
    resumed = finetune(suite, "digits", long, progress=False)
    os.environ["SAFTNB_STORE"] = str(fresh_store) + "-2"  # the fixture's monkeypatch puts it back
    assert equal(resumed.task_vector, finetune(suite, "digits", long, progress=False).task_vector)


def test_the_manifest_tells_what_was_trained_and_holds_no_path(suite, tmp_path):
    result = finetune(suite, "digits", plan(), progress=False)
    text = (store.store_root() / store.folder_name(result.inputs) / "manifest.json").read_text()
    manifest = json.loads(text)
    assert manifest["inputs"]["recipe"]["optimizer"] == "asam"
    assert str(tmp_path) not in text


def test_batches_are_shuffled_epochs(suite):
    split = suite.tasks["digits"].train
    settings = plan(batch_size=100, crop=1.0)
    epoch = [draw_batch(split, settings, 0, step)[1] for step in range(2)]
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(epoch), split.labels[order[:200]])
    assert not torch.equal(draw_batch(split, settings, 0, 2)[1], epoch[0])
    assert not torch.equal(draw_batch(split, settings, 1, 0)[1], epoch[0])


def test_crops_keep_most_of_the_picture():
    images = torch.randint(0, 256, (50, 3, 28, 28), dtype=torch.uint8)
    ramp = torch.arange(28, dtype=torch.uint8).expand(50, 3, 28, 28) * 9
    whole = random_resized_crop(ramp, 0.9, torch.Generator().manual_seed(0)) * 255 / 9
    span = whole[:, 0, 0, -1] - whole[:, 0, 0, 0]
    assert span.min() > 27 * 0.82  # √(0.9 · 3/4)
    assert span.max() <= 27
    assert span.std() > 0.2
    again = random_resized_crop(images, 0.9, torch.Generator().manual_seed(0))
    assert torch.equal(again, random_resized_crop(images, 0.9, torch.Generator().manual_seed(0)))


def test_unknown_tasks_and_recipes_stop_before_training(suite):
    with pytest.raises(KeyError, match="no task 'cars'"):
        finetune(suite, "cars")
    with pytest.raises(ValueError, match="no recipe 'saf'"):
        finetune(suite, "digits", "saf")
    with pytest.raises(ValueError, match="'gpu' is unknown"):
        finetune(suite, "digits", device="gpu")
    assert not store.store_root().exists()


def test_training_fixes_its_own_thread_count(suite, monkeypatch):
    seen = []
    real = Training.step
    monkeypatch.setattr(Training, "step", lambda self: seen.append(torch.get_num_threads()) or real(self))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        finetune(suite, "digits", plan(steps=3), progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 1]


def test_task_vectors_are_all_trained_first_and_then_loaded_one_recipe_and_seed_at_a_time(suite, monkeypatch):
    steps = count_steps(monkeypatch)
    plans = {"sgd": plan("sgd"), "saft": plan()}
    vectors = TaskVectors(suite, plans, [0, 1], progress=False)
    assert len(steps) == 2 * 2 * 2 * 6
    assert list(vectors) == [("sgd", 0), ("sgd", 1), ("saft", 0), ("saft", 1)]
    found = weakref.ref(vectors["sgd", 1]["digits"])
    assert vectors["sgd", 1]["digits"] is found()
    direct = finetune(suite, "digits", plans["saft"], 1, progress=False).task_vector
    assert equal(vectors["saft", 1]["digits"], direct)
    gc.collect()
    assert found() is None
    assert len(steps) == 2 * 2 * 2 * 6
    assert list(vectors["sgd", 0]) == ["digits", "patterns"]
    assert list(TaskVectors(suite, plans, [0], ["patterns"], progress=False)["sgd", 0]) == ["patterns"]
    with pytest.raises(KeyError):
        vectors["sgd", 2]
