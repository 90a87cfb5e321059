"""The tangent model is the first-order Taylor polynomial of the tower, and linear in its weights."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from saftnb.backbones import TangentTower, tangent_embeddings
from saftnb.suites import load_suite
from saftnb.task_vector import TaskVector


@pytest.fixture(scope="module")
def tower():
    return load_suite("thimble").backbone.image_tower().double()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def direction(tower, seed, size=0.02):
    generator = torch.Generator().manual_seed(seed)
    return TaskVector(
        {n: size * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in tower.named_parameters()}
    )


@torch.no_grad()
def moved(tower, vector, distance):
    return (distance * vector).apply_to(copy.deepcopy(tower))


@torch.no_grad()
def test_at_the_start_it_is_the_tower_and_its_slope_is_the_finite_difference(tower, pixels):
    twin = TangentTower(tower)
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in tower.named_parameters()]
    torch.testing.assert_close(twin(pixels), tower(pixels))
    vector, h = direction(tower, 0), 1e-4
    slope = (moved(tower, vector, h)(pixels) - moved(tower, vector, -h)(pixels)) / (2 * h)
    got = vector.apply_to(TangentTower(tower))(pixels) - tower(pixels)
    torch.testing.assert_close(got, slope, atol=1e-6, rtol=1e-6)
    curved = vector.apply_to(copy.deepcopy(tower))(pixels) - tower(pixels)
    assert (curved - slope).abs().max() > 1e-3  # the tower itself is not linear at this distance


@settings(max_examples=10, deadline=None)
@given(a=st.floats(-3, 3), b=st.floats(-3, 3), seed=st.integers(0, 99))
def test_the_embedding_is_linear_in_the_weights(tower, pixels, a, b, seed):
    """f(θ0 + a τ1 + b τ2) = f0 + a J τ1 + b J τ2."""
    one, two = direction(tower, seed), direction(tower, seed + 100)
    with torch.no_grad():
        got = (a * one + b * two).apply_to(TangentTower(tower))(pixels)
        value, slopes = tangent_embeddings(tower, [one, two], pixels)
    torch.testing.assert_close(got, value + a * slopes[0] + b * slopes[1], atol=1e-9, rtol=1e-9)


def test_the_gradient_is_that_of_the_start_wherever_it_stands(tower, pixels):
    """∇θ of a linear function of the embedding does not depend on θ, and at θ0 it is the tower's own."""
    weights = torch.randn(3, tower.output_dim, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    plain = copy.deepcopy(tower).requires_grad_(True)
    (plain(pixels) * weights).sum().backward()
    for vector in (0 * direction(tower, 3), direction(tower, 3)):
        twin = vector.apply_to(TangentTower(tower)).requires_grad_(True)
        (twin(pixels) * weights).sum().backward()
        for ours, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-7)


@torch.no_grad()
def test_a_parameter_that_a_task_vector_lacks_does_not_move(tower, pixels):
    vector = direction(tower, 4)
    name = "transformer.resblocks.0.attn.q_proj.weight"
    part = TaskVector({name: vector[name]})
    whole = TaskVector({n: d if n == name else torch.zeros_like(d) for n, d in vector.items()})
    value, slopes = tangent_embeddings(tower, [part, whole], pixels)
    assert torch.equal(slopes[0], slopes[1])
    torch.testing.assert_close(value, tower(pixels))


@torch.no_grad()
def test_a_copy_a_move_and_a_saved_state_keep_start_and_weights(tower, pixels):
    twin = direction(tower, 5).apply_to(TangentTower(tower))
    copied = copy.deepcopy(twin)
    torch.testing.assert_close(copied(pixels), twin(pixels))
    assert copied.origin is not twin.origin
    other = TangentTower(tower)
    other.load_state_dict(twin.state_dict())
    torch.testing.assert_close(other(pixels), twin(pixels))
    assert next(copied.float().origin.parameters()).dtype == torch.float32
    torch.testing.assert_close(copied(pixels.float()).double(), twin(pixels), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(4)])
def test_towers_that_draw_or_keep_statistics_are_refused(layer):
    with pytest.raises(ValueError, match="1: a tangent model needs a tower without dropout and batch statistics"):
        TangentTower(nn.Sequential(nn.Linear(4, 4), layer))
