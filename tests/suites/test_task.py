"""Splits are disjoint, balanced and fixed by their seed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saftnb.suites import Split, Task
from saftnb.suites.task import divide, resample


def toy(count: int, classes: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count) % classes


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 5), st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_divide_is_disjoint_balanced_and_deterministic(classes, first, second, seed):
    images, labels = toy(80, classes)
    images[12 * classes] = images[0]  # a repeated picture of the same class
    splits = divide(images, labels, {"test": first, "train": second}, seed)
    assert (len(splits["test"]), len(splits["train"])) == (first, second)
    pictures = [image.numpy().tobytes() for split in splits.values() for image in split.images]
    assert len(set(pictures)) == first + second
    table = {image.tobytes(): label for image, label in zip(np.repeat(images[:, None], 3, 1), labels, strict=True)}
    for split in splits.values():
        assert all(table[i.numpy().tobytes()] % classes == y for i, y in zip(split.images, split.labels, strict=True))
    counts = splits["test"].labels.bincount(minlength=classes)
    assert counts.max() - counts.min() <= 1
    again = divide(images, labels, {"test": first, "train": second}, seed)
    assert splits["train"].sha256 == again["train"].sha256


def test_divide_says_when_pictures_run_out():
    images, labels = toy(10, 2)
    images[:] = images[0]
    with pytest.raises(ValueError, match="3 pictures wanted, 1 distinct"):
        divide(images, labels, {"test": 3}, 0)


def test_the_hash_sees_pictures_labels_and_prompts():
    images, labels = toy(20, 2)
    parts = divide(images, labels, {"train": 8, "validation": 4, "test": 4}, 0)
    task = Task("toy", "real", ("a", "b"), ("a {}", "the {}"), **parts)
    changed = parts["test"].images.clone()
    changed[0, 0, 0, 0] ^= 1
    others = [
        Task("toy", "real", ("a", "c"), ("a {}", "the {}"), **parts),
        Task("toy", "real", ("a", "b"), ("one {}", "the {}"), **parts),
        Task("toy", "real", ("a", "b"), ("a {}", "the {}"), **parts | {"test": Split(changed, parts["test"].labels)}),
    ]
    assert len({task.sha256, *(other.sha256 for other in others)}) == 4


def test_bad_tasks_and_splits_are_refused():
    images, labels = toy(20, 2)
    parts = divide(images, labels, {"train": 8, "validation": 4, "test": 4}, 0)
    with pytest.raises(ValueError, match="4 pictures of test stand in another split"):
        Task("toy", "real", ("a", "b"), ("a {}", "the {}"), **parts | {"test": parts["validation"]})
    assert torch.equal(parts["test"][:2].images, parts["test"].images[:2])


def test_resampling_deals_train_and_validation_anew_and_leaves_test_alone():
    images, labels = toy(120, 3)
    task = Task("toy", "real", ("a", "b", "c"), ("a {}", "the {}"), **divide(
        images, labels, {"test": 30, "validation": 24, "train": 66}, 0))  # fmt: skip
    assert resample(task, 0) is task
    first, second = resample(task, 1), resample(task, 2)
    pool = lambda t: {i.tobytes() for s in (t.train, t.validation) for i in s.images.numpy()}  # noqa: E731
    for other in (first, second):
        assert other.test is task.test
        assert (len(other.train), len(other.validation)) == (66, 24)
        assert pool(other) == pool(task)  # Task itself checks that the splits are disjoint
        assert (other.validation.labels.bincount() == 8).all()
    assert len({t.sha256 for t in (task, first, second)}) == 3
    assert resample(task, 1).sha256 == first.sha256
