"""Each kind of file that the library writes survives death, a full disk, a read-only one and errors at every call."""

import warnings
from functools import partial

import pandas as pd
import pytest
import torch

from saftnb import disk
from saftnb.analysis import kept_merges
from saftnb.analysis.kept_merges import Merged
from saftnb.disk import restore, whole_file, whole_folder
from saftnb.finetune import store
from saftnb.finetune.resume import load_state, save_state
from saftnb.run_folder import read_json, write_json
from saftnb.task_vector import LowRank, TaskVector
from tests.faults.injector import files, survives

INPUTS = {"name": "thing", "seed": 0}


def text_of(name, root):
    return (root / name).read_text() if (root / name).exists() else None


def names(calls):
    return {call.split()[0] for call in calls}


@pytest.mark.parametrize("before", [None, "one"])
def test_a_file(root, before):
    def work(root):
        with whole_file(root / "a.txt") as part:
            part.write_text("two")

    if before:
        (root / "a.txt").write_text(before)
    calls = survives(work, root, partial(text_of, "a.txt"))
    assert names(calls) == {"openat", "write", "chmod", "fsync", "rename", "unlink"}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("before", [None, "one"])
def test_a_folder(root, before, exchange, monkeypatch):
    """Without an exchange of names the old folder may have to be put back first."""
    if not exchange:
        monkeypatch.setattr(disk, "_exchanged", lambda *_: False)

    def work(root):
        with whole_folder(root / "out") as part:
            (part / "deep").mkdir()
            (part / "deep" / "a.txt").write_text("two")
            (part / "b.txt").write_text("two")

    def look(root):
        if not exchange:
            restore(root / "out")
        return files(root / "out") if (root / "out").exists() else None

    if before:
        (root / "out").mkdir()
        (root / "out" / "a.txt").write_text(before)
    calls = survives(work, root, look)
    assert ("renameat2" in names(calls)) == bool(before and exchange)
    assert len([call for call in calls if call.startswith("rename")]) == (3 if before and not exchange else 1)


def test_json(root):
    write_json(root / "a.json", {"value": "one" * 3000})
    survives(lambda root: write_json(root / "a.json", [2] * 3000), root, lambda root: read_json(root / "a.json"))


def vector(seed=0):
    draws = torch.Generator().manual_seed(seed)
    low = LowRank(torch.randn(5, 2, generator=draws), torch.randn(2, 3, generator=draws))
    return TaskVector({"a.weight": torch.randn(4, 3, generator=draws), "b.weight": low})


def test_a_task_vector(root):
    vector(0).save(root / "a.safetensors")
    work = vector(1).save
    survives(
        lambda root: work(root / "a.safetensors"), root, lambda root: TaskVector.load(root / "a.safetensors").checksum()
    )


@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_a_checkpoint_of_the_store(root, before):
    history = pd.DataFrame([(1, 0.5, 0.25)], columns=["step", "loss", "validation_accuracy"])
    inputs = {"suite": "s", "task": "t", "recipe": {"name": "r"}, "seed": 0}
    head = torch.arange(6.0).reshape(3, 2)
    made = store.FineTuned(vector(), history, 0.25, 1.0, store.fingerprint(inputs), inputs, head=head)

    def look(root):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if before == "damaged" else "error")
            found = store.load(inputs)
        return found and (found.task_vector.checksum(), found.weights_sha256, found.head.tolist(), str(found.history))

    if before == "damaged":
        store.save(made)
        (root / "store" / store.folder_name(inputs) / "history.csv").write_text("")
    survives(lambda _: store.save(made), root, look)


def test_a_training_state(root):
    def work(root):
        save_state({"next_step": 2, "weights": torch.ones(300)}, root / "a.pt")

    save_state({"next_step": 1, "weights": torch.zeros(300)}, root / "a.pt")
    survives(work, root, lambda root: str(load_state(root / "a.pt")))


def test_kept_merges(root):
    made = Merged(None, {"merged": {"digits": torch.tensor([True, False, True])}}, {})

    def look(root):
        found = store.read(INPUTS | {"code": kept_merges.CODE}, kept_merges._take, ("hits.safetensors", "found.json"))
        return found and found.tested["merged"]["digits"].tolist()

    survives(lambda _: kept_merges.kept(INPUTS, lambda: made), root, look)
