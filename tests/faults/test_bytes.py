"""Every byte of a checkpoint and of a run flipped in turn, cut off, exchanged with another's: it is found and named."""

import shutil
import warnings

import pandas as pd
import pytest
import torch

from saftnb.batch.manifest import reason_to_run
from saftnb.batch.run import run_one
from saftnb.finetune import store
from saftnb.finetune.resume import load_state, save_state
from saftnb.run_folder import NOTEBOOK, OWN, RESULTS, write_json
from saftnb.task_vector import LowRank, TaskVector
from tests.faults.desk import place_desk, runs


def damages(content):
    """(what was done, the bytes after it): one bit of each byte in turn, and the file cut off at every tenth."""
    for place in range(len(content)):
        yield f"byte {place}", content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    for tenth in range(10):
        yield f"{tenth} tenths", content[: len(content) * tenth // 10]


def inputs(seed):
    return {"suite": "s", "task": "t", "recipe": {"name": "r", "rho": 0.5}, "seed": seed}


def checkpoint(seed):
    """A small model of sentence pairs in the store; returns its folder."""
    draws = torch.Generator().manual_seed(seed)
    low = LowRank(torch.randn(3, 1, generator=draws), torch.randn(1, 2, generator=draws))
    vector = TaskVector({"a": torch.randn(4, generator=draws), "b": low})
    history = pd.DataFrame([(4, 0.5, 0.25 + seed)], columns=["step", "loss", "validation_accuracy"])
    head = torch.randn(3, 2, generator=draws)
    known = store.fingerprint(inputs(seed))
    store.save(store.FineTuned(vector, history, 0.25 + seed, 11.5, known, inputs(seed), head=head))
    return store.store_root() / store.folder_name(inputs(seed))


def content(found):
    return (
        found.task_vector.checksum(), found.head.tolist(), found.history.to_csv(), found.validation_accuracy,
        found.seconds, found.fingerprint, found.inputs, found.weights_sha256,
    )  # fmt: skip


def loaded(seed=0):
    """What `load` returns, and its warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        return store.load(inputs(seed)), [str(one.message) for one in said]


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("SAFTNB_RUN_DIR", raising=False)


@pytest.mark.parametrize("name", ["manifest.json", "task_vector.safetensors", "head.safetensors", "history.csv"])
def test_a_checkpoint_with_a_damaged_file_is_trained_again(name):
    """Or it is what it was, where the bit means nothing: in the name of the manifest's own hash."""
    file = checkpoint(0) / name
    whole, before = content(loaded()[0]), file.read_bytes()
    harmless = 0
    for done, after in damages(before):
        file.write_bytes(after)
        found, said = loaded()
        if found is None:
            assert len(said) == 1, done
            assert said[0].startswith(f"checkpoint {file.parent.name} is damaged and is trained again: {name} "), said
            assert "\n" not in said[0]
        else:
            harmless += 1
            assert content(found) == whole, done
    assert harmless <= (20 if name == "manifest.json" else 0)
    file.write_bytes(before)
    assert content(loaded()[0]) == whole


@pytest.mark.parametrize(
    "names", [["manifest.json"], ["task_vector.safetensors"], ["task_vector.safetensors", "manifest.json"], []]
)
def test_a_checkpoint_with_anothers_files_is_trained_again(names):
    """[] stands for all of them."""
    one, other = checkpoint(0), checkpoint(1)
    for name in names or [file.name for file in other.iterdir()]:
        shutil.copy(other / name, one / name)
    found, said = loaded()
    assert found is None
    wrong = "manifest.json" if names != ["task_vector.safetensors"] else "task_vector.safetensors"
    assert f"is damaged and is trained again: {wrong} " in said[0]
    assert loaded(1)[0] is not None


def test_a_checkpoint_that_has_no_hash_of_its_manifest_is_still_read():
    """As they were written before there was one."""
    folder = checkpoint(0)
    whole = content(loaded()[0])
    text = (folder / "manifest.json").read_text()
    before, _, after = text.partition(',\n "manifest_sha256"')
    assert after
    (folder / "manifest.json").write_text(before + "\n}\n")
    assert content(loaded()[0]) == whole
    (folder / "manifest.json").write_text(before.replace('"rho": 0.5', '"rho": 0.1') + "\n}\n")
    assert loaded()[0] is None


def test_a_damaged_task_vector_is_refused(tmp_path):
    file = checkpoint(0) / "task_vector.safetensors"
    for done, after in damages(file.read_bytes()):
        file.write_bytes(after)
        with pytest.raises(ValueError, match="task_vector.safetensors") as refused:
            TaskVector.load(file)
        assert "\n" not in str(refused.value), done


def test_a_damaged_training_state_is_left_aside(tmp_path):
    """Or it is what it was: torch aligns its records with bytes that mean nothing."""
    file, state = tmp_path / "a.pt", {"next_step": 3, "weights": torch.arange(40.0)}
    save_state(state, file)
    noticed = set()
    for done, after in damages(file.read_bytes()):
        file.write_bytes(after)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = load_state(file)
        if found is None:
            noticed.add(done)
            assert "a.pt cannot be read: training starts anew" in str(said[-1].message)
        else:
            assert str(found) == str(state), done
    assert {f"{tenth} tenths" for tenth in range(10)} <= noticed


def test_anothers_training_state_is_left_aside(tmp_path):
    for name in ("a.pt", "b.pt"):
        save_state({"next_step": len(name)}, tmp_path / name)
    shutil.copy(tmp_path / "a.pt", tmp_path / "b.pt")
    with pytest.warns(UserWarning, match="b.pt cannot be read"):
        assert load_state(tmp_path / "b.pt") is None
    torch.save({"next_step": 7}, tmp_path / "b.pt")  # as they were written before they said whose they are
    assert load_state(tmp_path / "b.pt") == {"next_step": 7}


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run that is done."""
    run = runs(place_desk(tmp_path / "root", tmp_path, monkeypatch))[0]
    assert run_one(run)["status"] == "done"
    return run


@pytest.mark.parametrize("name", [RESULTS, NOTEBOOK])
def test_a_run_with_a_damaged_file_is_not_done(finished, name):
    file = finished.folder.path / name
    before = file.read_bytes()
    assert finished.folder.done
    for done, after in damages(before):
        file.write_bytes(after)
        assert not finished.folder.done, done
    file.write_bytes(before)
    assert reason_to_run(finished, "library") is None


def test_a_run_with_a_damaged_manifest_is_not_done(finished):
    """Or it says what it said: white space, or the name of its own hash, which the first manifests did not have."""
    file = finished.folder.manifest_file
    whole, before = finished.folder.manifest, file.read_bytes()
    believed = []
    for done, after in damages(before):
        file.write_bytes(after)
        if finished.folder.done:
            believed.append(done)
            said = finished.folder.manifest
            assert {name: said.get(name) for name in whole if name != OWN} == {
                n: v for n, v in whole.items() if n != OWN
            }
    assert len(believed) < len(before) / 4
    for tenth in range(10):
        file.write_bytes(before[: len(before) * tenth // 10])
        assert not finished.folder.done
    write_json(file, whole | {"seed": 1})
    assert reason_to_run(finished, "library") == "manifest.json was altered or is gone"
    finished.folder.seal({name: value for name, value in whole.items() if name != OWN} | {"parameters": {"seed": 5}})
    assert reason_to_run(finished, "library") == "its manifest is another run's"
    write_json(file, {name: value for name, value in whole.items() if name != OWN})
    assert reason_to_run(finished, "library") is None
    assert not list(finished.folder.lock_file.parent.iterdir())
