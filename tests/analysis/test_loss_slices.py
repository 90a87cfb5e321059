"""Losses along lines through a model's weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from saftnb.analysis import ascent_direction, loss_slice, random_direction
from saftnb.suites import load_suite


@pytest.fixture(scope="module")
def suite():
    return load_suite("thimble")


def norm(direction):
    return math.sqrt(sum(float(d.square().sum()) for d in direction.values()))


def test_directions_have_norm_one(suite):
    model, split = suite.classifier("digits"), suite.tasks["digits"].train[:40]
    directions = [random_direction(model, 0), random_direction(model, 1)]
    directions += [ascent_direction(model, split, kind) for kind in ("sam", "asam")]
    assert [norm(d) for d in directions] == pytest.approx([1.0] * 4, abs=1e-4)
    assert not torch.equal(*(d["proj"] for d in directions[:2]))
    assert torch.equal(random_direction(model, 0)["proj"], directions[0]["proj"])


def test_the_ascent_direction_is_the_gradient_of_the_mean_loss(suite):
    model, train = suite.classifier("digits"), suite.tasks["digits"].train
    split = train[torch.arange(600) % len(train)]  # more than one batch, the last one shorter
    model.tower.requires_grad_(True)
    F.cross_entropy(model(split.images), split.labels).backward()
    length = math.sqrt(sum(float(p.grad.square().sum()) for p in model.tower.parameters()))
    found = ascent_direction(model, split, "sam")
    for name, p in model.tower.named_parameters():
        torch.testing.assert_close(found[name], p.grad / length, atol=1e-4, rtol=1e-3)


def test_a_slice_is_the_loss_at_the_moved_weights(suite):
    model, split = suite.classifier("digits"), suite.tasks["digits"].test
    before = {name: p.clone() for name, p in model.tower.named_parameters()}
    direction = ascent_direction(model, split, "sam")
    frame = loss_slice(model, direction, [0.0, 0.1, 0.2], split)
    assert all(torch.equal(p, before[name]) for name, p in model.tower.named_parameters())
    assert list(frame.columns) == ["distance", "loss", "accuracy"]
    moved = suite.classifier("digits")
    with torch.no_grad():
        assert frame["loss"][0] == pytest.approx(F.cross_entropy(moved(split.images), split.labels).item(), rel=1e-5)
        for name, p in moved.tower.named_parameters():
            p.add_(0.2 * direction[name])
        assert frame["loss"][2] == pytest.approx(F.cross_entropy(moved(split.images), split.labels).item(), rel=1e-4)
    assert frame["loss"].is_monotonic_increasing


def test_a_zero_gradient_has_no_direction(suite):
    model = suite.classifier("digits")
    model.head.zero_()
    with pytest.raises(ValueError, match="the direction is zero"):
        ascent_direction(model, suite.tasks["digits"].train[:10])
