"""The primitives that draw our own pictures."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saftnb.render import PATTERNS, SHAPES, glyphs, paint, pattern, scatter, shapes

FONT = Path(find_spec("matplotlib").origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.floats(1, 6.4), st.integers(0, 10_000))
def test_scatter_keeps_its_distances(count, gap, seed):
    points = scatter(count, gap, 3.0, np.random.default_rng(seed))
    assert points.shape == (count, 2)
    assert points.min() >= 3
    assert points.max() <= 25
    for i in range(count):
        for j in range(i):
            assert np.hypot(*(points[i] - points[j])) >= gap


@pytest.mark.parametrize("kind", SHAPES)
def test_shapes_are_drawn_where_they_should_be(kind):
    mask = shapes([kind], np.array([[9.0, 18.0]]), [4.0], [0.3])
    y, x = np.mgrid[:28, :28] + 0.5
    assert mask.shape == (28, 28)
    assert abs((mask * x).sum() / mask.sum() - 9) < 0.7
    assert abs((mask * y).sum() / mask.sum() - 18) < 0.7
    assert mask[np.hypot(x - 9, y - 18) > 5.5].max() == 0


@pytest.mark.parametrize("kind", PATTERNS)
def test_patterns_are_seeded_masks(kind):
    first, again, other = (pattern(kind, np.random.default_rng(seed), period=6) for seed in (0, 0, 1))
    assert first.shape == (28, 28)
    assert first.min() >= 0
    assert first.max() <= 1
    assert first.std() > 0.1
    assert (first == again).all()
    assert (first != other).any()


def test_stripes_have_the_period_and_the_direction_asked_for():
    rows = pattern("horizontal stripes", np.random.default_rng(0), period=7)
    assert np.allclose(rows, rows[:, :1])
    assert np.allclose(rows[:-7], rows[7:], atol=1e-5)
    assert not np.allclose(rows[:-5], rows[5:], atol=0.2)
    columns = pattern("vertical stripes", np.random.default_rng(0), period=7)
    assert np.allclose(columns, columns[:1])


def test_glyphs_follow_their_pose():
    y, x = np.mgrid[:28, :28]
    plain, right = glyphs("o", FONT, height=16), glyphs("o", FONT, height=16, shift=(5, 0))
    centre = lambda mask, axis: (mask * axis).sum() / mask.sum()  # noqa: E731
    assert centre(right, x) - centre(plain, x) == pytest.approx(5, abs=0.2)
    assert centre(right, y) == pytest.approx(centre(plain, y), abs=0.2)
    assert glyphs("l", FONT, height=16, stroke=4).sum() > 1.5 * glyphs("l", FONT, height=16).sum()
    upright, turned = glyphs("l", FONT, height=20), glyphs("l", FONT, height=20, angle=90)
    assert upright.any(axis=1).sum() > upright.any(axis=0).sum()
    assert turned.any(axis=1).sum() < turned.any(axis=0).sum()


def test_paint_and_unknown_patterns():
    picture = paint(np.array([[0.0, 1.0]], np.float32), (200, 100, 0), (0, 0, 50))
    assert picture.tolist() == [[[0, 200]], [[0, 100]], [[50, 0]]]
    with pytest.raises(ValueError, match="unknown pattern 'plaid'"):
        pattern("plaid", np.random.default_rng(0), period=5)
