"""What must hold on a CUDA device too; skipped where there is none."""

import pytest
import torch

import saftnb as sn
from saftnb.analysis import ascent_direction, comparison, loss_slice
from saftnb.evaluate import ModelFamily, accuracy, logits
from saftnb.finetune import SharpnessAware, finetune, recipe, resume, train
from saftnb.merging import LowRank, TaskVector, learn, merge
from saftnb.suites import load_suite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_fine_tuning_learns_and_its_result_is_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path))
    suite = load_suite("thimble")
    result = finetune(suite, "patterns", recipe("saft", suite), device="cuda", progress=False)
    assert all(delta.device.type == "cpu" for delta in result.task_vector.values())
    tuned = suite.classifier("patterns")
    result.task_vector.apply_to(tuned.tower)
    split = suite.tasks["patterns"].test
    assert accuracy(tuned, split, device="cuda") > accuracy(suite.classifier("patterns"), split, device="cuda") + 0.1


def test_an_interrupted_training_goes_on_and_keeps_a_best_look_from_before(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path))
    monkeypatch.setattr(resume, "SAVE_EVERY", 2)
    suite = load_suite("thimble")
    plan = recipe("saft", suite, steps=6, warmup=2, evaluate_every=2)
    real = train.Training.look
    looks = iter([0.9, 0.1, 0.1, 0.1])  # the first look stays the best

    def look(self, loss):
        real(self, loss)
        accuracy = next(looks)
        self.best_accuracy = max(self.best_accuracy, accuracy) if len(self.history) == 1 else self.best_accuracy
        if self.next_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "look", look)
        with pytest.raises(KeyboardInterrupt):
            finetune(suite, "patterns", plan, device="cuda", progress=False)
    result = finetune(suite, "patterns", plan, device="cuda", progress=False)
    assert all(delta.device.type == "cpu" for delta in result.task_vector.values())


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"accumulate": 2}])
def test_a_tangent_model_trains_and_its_embeddings_are_the_same_on_both_devices(tmp_path, monkeypatch, changes):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path))
    suite = load_suite("thimble")
    vector = finetune(suite, "patterns", recipe("ftts", suite, **changes), device="cuda", progress=False).task_vector
    families = [ModelFamily(suite, [vector], tangent=True, device=device) for device in ("cpu", "cuda")]
    both = [family.logits("patterns", [1.0]) for family in families]
    torch.testing.assert_close(*both, atol=5e-2, rtol=1e-2)
    assert families[1].hits("patterns", [1.0]).sum() > families[1].hits("patterns", [0.0]).sum()


def test_a_slice_is_the_same_on_both_devices():
    suite = load_suite("thimble")
    model, split = suite.classifier("digits"), suite.tasks["digits"].test
    direction = ascent_direction(model, split, device="cuda")
    both = [loss_slice(model, direction, [0.0, 0.1], split, device=device)["loss"] for device in ("cpu", "cuda")]
    assert both[0].tolist() == pytest.approx(both[1].tolist(), rel=1e-3)


@pytest.mark.parametrize("kind", ["sam", "asam", "asam-kwon"])
def test_a_sharpness_aware_step_is_the_same_on_both_devices(kind):
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
        x, y = torch.randn(9, 5), torch.randint(0, 2, (9,))
        net, x, y = net.to(device), x.to(device), y.to(device)
        optimizer = SharpnessAware(torch.optim.SGD(net.named_parameters(), lr=0.1), perturbation=kind)

        def closure(net=net, x=x, y=y, optimizer=optimizer):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        results.append(torch.cat([p.detach().cpu().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "settings"), [("average", {}), ("task_arithmetic", {"scale": 0.3}), ("ties", {})])
def test_merging_is_the_same_on_both_devices(method, settings):
    generator = torch.Generator().manual_seed(0)
    vectors = [TaskVector({n: torch.randn(40, 30, generator=generator) for n in "ab"}) for _ in range(4)]
    ours = merge(vectors, method, **settings)
    theirs = merge([vector.to("cuda") for vector in vectors], method, **settings).to("cpu")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("room", [True, False])
def test_learning_to_merge_agrees_with_the_cpu_wherever_the_vectors_lie(tmp_path, monkeypatch, room):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path))
    if not room:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    suite, draw = load_suite("thimble"), torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in suite.tower().named_parameters()}
    vectors = {
        task: TaskVector({name: 0.02 * torch.randn(shape, generator=draw) for name, shape in shapes.items()})
        for task in suite.tasks
    }
    quick = {"steps": 3, "pictures": 12, "optimizer": "sgd", "lr": 1e-2, "rho": 0.1, "progress": False}
    found = {device: learn(suite, vectors, device=device, **quick) for device in ("cpu", "cuda")}
    for key, value in found["cpu"].values.items():
        torch.testing.assert_close(found["cuda"].values[key], value, atol=1e-3, rtol=1e-2)
    assert all(delta.device.type == "cpu" for delta in found["cuda"].vector.values())


@pytest.mark.parametrize("name", ["sgd", "lora"])
def test_a_comparison_merges_on_the_device_and_finds_what_the_cpu_finds(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path))
    suite, grids = load_suite("thimble"), {"ties": {"scale": [0.5, 1.0], "keep": [0.2]}, "tsv_m": {"scale": [1.0]}}
    vectors = sn.TaskVectors(suite, {name: recipe(name, suite)}, [0], device="cuda", progress=False)
    seen, real = [], comparison.represent
    monkeypatch.setattr(
        comparison, "represent", lambda experts, *a, **k: seen.append(experts) or real(experts, *a, **k)
    )
    both = [sn.compare(suite, vectors, grids, device=device, progress=False) for device in ("cpu", "cuda")]
    places = [{delta.device.type for vector in experts.values() for delta in vector.values()} for experts in seen]
    assert places == [{"cpu"}, {"cuda"}]
    one, other = (found.scores()["mean"] for found in both)
    assert (one - other).abs().max() < 2  # of 100: pictures whose two largest logits are all but equal


def test_dare_drops_the_same_entries_on_both_devices():
    draw = torch.Generator().manual_seed(0)
    factors = [LowRank(torch.randn(1500, 4, generator=draw), torch.randn(4, 900, generator=draw)) for _ in range(3)]
    vectors = [TaskVector({"w": one}) for one in factors]  # large enough to be formed row by row
    here = merge(vectors, "dare_ties", drop=0.5)["w"]
    there = merge([vector.to("cuda") for vector in vectors], "dare_ties", drop=0.5)["w"].cpu()
    assert ((here == 0) != (there == 0)).float().mean() < 1e-3
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-2)


def test_bf16_evaluates_near_float32_and_leaves_the_matrix_products_as_they_were():
    exact, rounded = (load_suite("thimble", precision=precision) for precision in ("float32", "bf16"))
    images, before = exact.tasks["digits"].test.images[:50], torch.get_float32_matmul_precision()
    one, other = (logits(suite.classifier("digits"), images, device="cuda") for suite in (exact, rounded))
    assert 0 < (one - other).abs().max() < 0.05 * one.abs().max()
    assert torch.get_float32_matmul_precision() == before
