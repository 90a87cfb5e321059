"""`import saftnb as sn`: light, lazy, and the same objects as in the rooms."""

import subprocess
import sys

import pytest
import torch

import saftnb as sn
from saftnb.evaluate import accuracies, suite_hits
from saftnb.finetune import finetune
from saftnb.merging import TaskVector, merge


def test_every_name_is_there_and_is_that_of_its_room():
    assert sn.merge is merge
    modules = {"plots", "reference", "__version__"}
    assert all(callable(getattr(sn, name)) for name in sn.__all__ if name not in modules)
    assert set(sn.__all__) == set(dir(sn))
    with pytest.raises(AttributeError, match="module 'saftnb' has no attribute 'mergers'"):
        sn.mergers  # noqa: B018


def test_the_import_itself_loads_nothing():
    code = "import sys, saftnb; sys.exit(any(m in sys.modules for m in ('torch', 'pandas', 'saftnb.suites')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_from_experts_to_one_model(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path))
    suite = sn.load_suite("thimble")
    experts = sn.task_vectors(suite, "sgd", seed=0, progress=False)
    assert list(experts) == list(suite.tasks)
    first = next(iter(suite.tasks))
    alone = sn.finetune(suite, first, "sgd", 0).task_vector
    assert sn.finetune.finetune is finetune  # the room of that name is still there, too
    assert all(torch.equal(experts[first][name], alone[name]) for name in alone)
    assert list(sn.task_vectors(suite, "sgd", seed=0, tasks=[first])) == [first]
    merged = sn.merge(experts, "ties", keep=0.1, scale=0.5)
    listed = sn.merge(list(experts.values()), "ties", keep=0.1, scale=0.5)
    assert all(torch.equal(merged[name], listed[name]) for name in merged)
    measured = sn.accuracy(suite, merged)
    assert list(measured.index) == [*suite.tasks, "mean"]
    expected = accuracies(suite_hits(suite, merged))
    assert measured.drop("mean").to_dict() == expected
    assert measured["mean"] == pytest.approx(sum(expected.values()) / len(expected))
    assert len(sn.accuracy(suite, tasks=[first], examples=10)) == 2


def test_one_task_vector_is_no_list_of_them():
    with pytest.raises(ValueError, match="takes several task vectors, in a list or by task, and got one TaskVector"):
        sn.merge(TaskVector({"w": torch.ones(2)}), "average")
