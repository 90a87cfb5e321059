"""Whole pieces of work survive the same faults: a training, a learning, a merge, a run, a kept list, a report."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from saftnb.batch.run import run_one
from saftnb.finetune import experts, finetune, recipe, store
from saftnb.merging import learn, learning
from saftnb.suites import load_suite
from saftnb.suites.stored import StoredSplit
from saftnb.task_vector import LowRank, TaskVector
from tests.faults.desk import place_desk, runs, write_notebooks
from tests.faults.injector import FULL, READ_ONLY, command, files, survives


class Steps:
    """Stands in for `Training`: four steps of one number, saved after each."""

    best_head, head, seconds = None, None, 1.0

    def __init__(self, model, task, plan, seed, device):
        self.state = {"next_step": 0, "weight": torch.ones(3)}

    def load_state(self, state):
        self.state = state

    def run(self, save, *, label, progress):
        while self.state["next_step"] < 4:
            weight = self.state["weight"] * 1.5 + self.state["next_step"]
            self.state = {"next_step": self.state["next_step"] + 1, "weight": weight}
            save(self.state)

    def task_vector(self):
        return TaskVector({"w": self.state["weight"]})

    def close(self):
        pass

    history, best_accuracy = ((4, 0.5, 0.25),), 0.25


def test_a_training_with_its_states(root, monkeypatch):
    suite = load_suite("thimble")
    monkeypatch.setattr(experts, "Training", Steps)
    for built in ("tower", "classifier"):
        monkeypatch.setattr(type(suite), built, lambda *_, **__: None)
    plan = recipe("sgd", suite)
    inputs = experts.describe(suite, "digits", plan, 0, torch.device("cpu"))

    def look(_):
        found = store.load(inputs)
        return found and (found.task_vector["w"].tolist(), str(found.history))

    calls = survives(lambda _: finetune(suite, "digits", plan, device="cpu", progress=False), root, look)
    state = f"rename store/.partial/{store.folder_name(inputs)}.pt"
    assert calls.count(state) == 4
    assert files(root).keys() == {"store", "store/.partial"} | {
        f"store/{store.folder_name(inputs)}{name}"
        for name in ("", "/task_vector.safetensors", "/history.csv", "/manifest.json")
    }


def test_learned_coefficients(root, monkeypatch):
    suite = load_suite("thimble")
    name, shape = next((n, p.shape) for n, p in suite.tower().named_parameters())
    vectors = {task: TaskVector({name: torch.full(shape, 0.5 + at)}) for at, task in enumerate(suite.tasks)}

    class Learned:
        curve, seconds = ((1, 0.5, 0.25),), 1.0

        def __init__(self, suite, vectors, values, *_):
            self.values = values

        def finish(self, inputs, progress):
            self.values.fill({key: value + 0.25 for key, value in self.values.tensors().items()})
            experts.save_state({"next_step": 1}, store.partial_file(inputs))

    monkeypatch.setattr(learning, "Learning", Learned)

    def look(root):
        found = [path for path in (root / "store").glob("thimble-learned*") if (path / "manifest.json").exists()]
        return [files(path).keys() for path in found]

    work = lambda _: learn(suite, vectors, steps=1, device="cpu", progress=False)  # noqa: E731
    survives(work, root, look, faults=[FULL])
    with monkeypatch.context() as patch:
        patch.setattr(learning, "Learning", None)
        assert all((value > 0.7).all() for value in work(root).values.values())


class Table:
    """The few things that a `StoredSplit` asks of a table of pictures."""

    def __init__(self, count):
        draws = np.random.default_rng(0)
        self.images = [Image.fromarray(draws.integers(0, 256, (9 + n, 8, 3), dtype=np.uint8)) for n in range(count)]
        self.data = SimpleNamespace(column=lambda _: np.zeros(count, np.int64))

    def __getitem__(self, row):
        return {"image": self.images[row]}


@pytest.mark.parametrize("part", ["images", "_places"])
def test_a_split_that_is_decoded(root, part):
    table = Table(3)
    work = lambda root: getattr(StoredSplit(table, torch.arange(3), 8, root, identity="t", name="t"), part)  # noqa: E731

    def look(root):
        return {name: content for name, content in files(root).items() if not name.startswith(".") and content}

    survives(work, root, look, faults=[FULL, READ_ONLY])
    assert [name.rpartition(".")[2] for name in files(root)] == ["u8"]


@pytest.fixture
def adapters(tmp_path):
    draws = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        factors = torch.randn(6, 2, generator=draws), torch.randn(2, 6, generator=draws)
        TaskVector({"layer.weight": LowRank(*factors)}).to_adapter(tmp_path / name, base="owner/model")
    return [str(tmp_path / name) for name in ("one", "two")]


@pytest.mark.parametrize("before", [None, "average"])
def test_a_merge_of_adapters(root, adapters, before):
    def work(root, *more):
        command("merge", *adapters, "--method", "ties", "--space", "knots", "-o", str(root / "out"), *more)

    def look(root):
        return files(root / "out") if (root / "out").exists() else None

    if before:
        command("merge", *adapters, "--method", before, "-o", str(root / "out"))
    again = lambda root: work(root, "--force")  # noqa: E731
    survives(again if before else work, root, look, again)
    assert look(root).keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_a_merge_of_models(root, tmp_path):
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        weight = torch.full((5, 5), float(len(name) + ord(name[0])))
        TaskVector({"a": weight, "b": weight}).save(tmp_path / name / "model.safetensors")
    words = ["--base", str(tmp_path / "base"), str(tmp_path / "one"), str(tmp_path / "two"), "--method", "average"]

    def work(root, *more):
        command("merge", *words, "-o", str(root / "out"), *more)

    look = lambda root: files(root / "out") if (root / "out").exists() else None  # noqa: E731
    survives(work, root, look, lambda root: work(root, "--force"), [FULL, READ_ONLY])


@pytest.fixture
def desk(root, tmp_path, monkeypatch):
    return place_desk(root, tmp_path, monkeypatch)


@pytest.mark.parametrize("before", [None, 1])
def test_a_run(desk, before):
    """What was complete is there until the new is: in its place, or set aside."""
    if before:
        assert run_one(runs(desk)[0])["status"] == "done"
    write_notebooks(2)
    run = runs(desk)[0]

    def work(_):
        assert run_one(run)["status"] == "done"

    def look(root):
        done = run.folder.done
        folder = run.folder.path if done else root / "runs" / "g" / ".previous" / run.id
        file = folder / "results.json"
        return json.loads(file.read_text()) if file.exists() else None

    survives(work, desk, look, lambda _: run_one(run, again=False), [FULL], but="runs/g/.previous")


def test_a_kept_list(desk):
    """Each file is the old one or the new one; the list, which comes last, decides."""
    for run in runs(desk):
        assert run_one(run)["status"] == "done"
    command("keep", "g.yaml", "--runs", str(desk / "runs"))
    old = (desk / "kept" / "total.csv").read_text()
    write_notebooks(2)
    for run in runs(desk):
        assert run_one(run)["status"] == "done"

    def look(root):
        assert (root / "kept" / "total.csv").read_text() in (old, "value\n2\n")
        return (root / "kept" / "runs.json").read_text()

    survives(lambda root: command("keep", "g.yaml", "--runs", str(root / "runs")), desk, look, faults=[FULL, READ_ONLY])
    assert (desk / "kept" / "total.csv").read_text() == "value\n2\n" != old


def test_a_report(desk):
    for run in runs(desk):
        assert run_one(run)["status"] == "done"
    command("report", str(desk / "runs" / "g"), "-o", str(desk / "report"))
    write_notebooks(2)
    for run in runs(desk):
        assert run_one(run)["status"] == "done"
    work = lambda root: command("report", str(root / "runs" / "g"), "-o", str(root / "report"))  # noqa: E731
    survives(work, desk, lambda root: files(root / "report"), faults=[FULL])
