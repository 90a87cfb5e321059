"""Eight processes that need one checkpoint: one training, also where the one that trains is killed."""

import json
import multiprocessing
import os
import signal
import warnings

import pytest
import torch

from saftnb.finetune import experts, finetune, recipe, store
from saftnb.suites import load_suite
from saftnb.task_vector import TaskVector
from tests.faults.test_work_faults import Steps

CROWD = 8


class Logged(Steps):
    """Notes each step; the first process that trains may be killed after two."""

    log, dies = None, False

    def run(self, save, *, label, progress):
        super().run(lambda state: self.note(state, save), label=label, progress=progress)

    def note(self, state, save):
        save(state)
        line = json.dumps([os.getpid(), state["next_step"]]) + "\n"
        with open(self.log, "a") as log:
            log.write(line)
        if self.dies and state["next_step"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("dies", [False, True])
def test_one_training(tmp_path, monkeypatch, dies):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path / "store"))
    suite = load_suite("thimble")
    for built in ("tower", "classifier"):
        monkeypatch.setattr(type(suite), built, lambda *_, **__: None)
    monkeypatch.setattr(experts, "Training", Logged)
    monkeypatch.setattr(Logged, "log", tmp_path / "log")
    monkeypatch.setattr(Logged, "dies", dies)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        fork = multiprocessing.get_context("fork")
        ready, answers = fork.Barrier(CROWD), fork.SimpleQueue()

        def need():
            ready.wait(60)
            found = finetune(suite, "digits", recipe("sgd", suite), device="cpu", progress=False)
            answers.put((found.task_vector["w"].tolist(), found.weights_sha256, found.fingerprint))

        crowd = [fork.Process(target=need) for _ in range(CROWD)]
        for one in crowd:
            one.start()
    for one in crowd:
        one.join(60)
    assert sorted(one.exitcode for one in crowd) == sorted([0] * (CROWD - dies) + [-signal.SIGKILL] * dies)
    steps = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [step for _, step in steps] == [1, 2, 3, 4]
    assert len({pid for pid, _ in steps}) == 1 + dies
    found = [answers.get() for _ in range(CROWD - dies)]
    weight = torch.ones(3)
    for step in range(4):
        weight = weight * 1.5 + step
    assert all(one == found[0] for one in found)
    assert found[0][0] == weight.tolist()
    assert [path.name for path in (tmp_path / "store").iterdir() if path.name != ".partial"] == [
        store.folder_name(experts.describe(suite, "digits", recipe("sgd", suite), 0, torch.device("cpu")))
    ]
    assert not list((tmp_path / "store" / ".partial").iterdir())
    assert TaskVector.load(next((tmp_path / "store").glob("*/*.safetensors")))["w"].tolist() == weight.tolist()
