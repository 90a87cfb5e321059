"""Small seeded pictures: glyphs, groups of shapes, textures.

Two rooms draw with these primitives, with settings that never overlap: the pocket backbone's
pre-training corpus (`backbones/corpus.py`) and the rendered pocket tasks (`suites/pocket.py`).
A mask is a float32 array (size, size) in [0, 1]: 1 is ink, 0 is ground.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 28
_OVER = 4  # masks are drawn this many times larger and averaged down, which anti-aliases them

SHAPES = ("disc", "square", "triangle", "diamond", "star", "ring")
PATTERNS = (
    "horizontal stripes", "vertical stripes", "diagonal stripes", "checkerboard", "grid",
    "dots", "zigzag", "rings", "noise", "gradient",
)  # fmt: skip


@cache
def _font(path: Path, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), pixels)


def _shrink(canvas: Image.Image, size: int) -> np.ndarray:
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255


def glyphs(
    text: str, font: Path, *, height: float, angle: float = 0.0, shift: Sequence[float] = (0, 0), stroke: int = 0,
    size: int = SIZE,
) -> np.ndarray:  # fmt: skip
    """Mask of `text` set in the font file `font`.

    Args:
        height: font size in pixels of the final picture.
        angle: rotation in degrees, counter-clockwise.
        shift: (x, y) offset of the centre in pixels.
        stroke: quarter pixels by which every line is thickened on each side.

    Raises:
        OSError: the font file is missing or unreadable.
    """
    side = size * _OVER
    canvas = Image.new("L", (side, side))
    centre = (side / 2 + shift[0] * _OVER, side / 2 + shift[1] * _OVER)
    ImageDraw.Draw(canvas).text(centre, text, 255, _font(font, round(height * _OVER)), "mm", stroke_width=stroke)
    if angle:
        canvas = canvas.rotate(angle, Image.Resampling.BILINEAR)
    return _shrink(canvas, size)


def _outline(kind: str, x: float, y: float, radius: float, angle: float) -> list[tuple[float, float]]:
    """Corners of a polygon of the given kind around (x, y)."""
    corners, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "diamond": (4, 0.55), "star": (10, 0.45)}[kind]
    turns = angle + np.arange(corners) * 2 * np.pi / corners
    radii = np.where(np.arange(corners) % 2 == 1, radius * inner, radius)
    return [(x + r * np.cos(t), y + r * np.sin(t)) for r, t in zip(radii, turns, strict=True)]


def shapes(
    kinds: Sequence[str], centres: np.ndarray, radii: Sequence[float], angles: Sequence[float], *, size: int = SIZE
) -> np.ndarray:
    """Mask of several shapes: kinds from `SHAPES`, centres (n, 2) and radii (n,) in pixels, angles in radians."""
    canvas = Image.new("L", (size * _OVER, size * _OVER))
    draw = ImageDraw.Draw(canvas)
    for kind, (x, y), radius, angle in zip(kinds, centres * _OVER, np.asarray(radii) * _OVER, angles, strict=True):
        box = (x - radius, y - radius, x + radius, y + radius)
        if kind == "disc":
            draw.ellipse(box, fill=255)
        elif kind == "ring":
            draw.ellipse(box, outline=255, width=max(2, round(radius * 0.4)))
        else:
            draw.polygon(_outline(kind, x, y, radius, angle), fill=255)
    return _shrink(canvas, size)


def scatter(count: int, gap: float, margin: float, generator: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """`count` points (count, 2) at least `gap` pixels apart and `margin` from the border.

    Draws again from the start whenever a point finds no room, so the result is never short.
    """
    while True:
        points: list[np.ndarray] = []
        for _ in range(40 * count):
            point = generator.uniform(margin, size - margin, size=2)
            if all(np.hypot(*(point - other)) >= gap for other in points):
                points.append(point)
            if len(points) == count:
                return np.array(points)


def pattern(
    kind: str, generator: np.random.Generator, *, period: float, tilt: float = 0.0, size: int = SIZE
) -> np.ndarray:
    """Mask of a texture of `PATTERNS` with a period in pixels, tilted by `tilt` degrees, at a random phase."""
    y, x = np.mgrid[:size, :size].astype(np.float32) - size / 2
    turn = np.deg2rad(tilt + (45 if kind == "diagonal stripes" else 0))
    u = (x * np.cos(turn) + y * np.sin(turn)) / period + generator.uniform()
    v = (y * np.cos(turn) - x * np.sin(turn)) / period + generator.uniform()
    wave_u, wave_v = np.sin(2 * np.pi * u), np.sin(2 * np.pi * v)
    centre = generator.uniform(-size / 6, size / 6, size=2)
    if kind == "vertical stripes":
        mask = wave_u
    elif kind in ("horizontal stripes", "diagonal stripes"):
        mask = wave_v
    elif kind == "checkerboard":
        mask = wave_u * wave_v * 4
    elif kind == "grid":
        mask = np.maximum(wave_u, wave_v) * 3 - 2.2
    elif kind == "dots":
        mask = wave_u + wave_v - 0.8
    elif kind == "zigzag":
        mask = np.sin(2 * np.pi * (v + 0.9 * np.abs(u - np.floor(u) - 0.5)))
    elif kind == "rings":
        mask = np.sin(2 * np.pi * np.hypot(x - centre[0], y - centre[1]) / period)
    elif kind == "noise":
        mask = generator.normal(size=(size, size)) * 1.5
    elif kind == "gradient":
        turn = generator.uniform(0, 2 * np.pi)
        return np.clip(0.5 + (x * np.cos(turn) + y * np.sin(turn)) / size, 0, 1).astype(np.float32)
    else:
        raise ValueError(f"unknown pattern {kind!r}; known: {', '.join(PATTERNS)}")
    return np.clip(0.5 + mask, 0, 1).astype(np.float32)


def paint(mask: np.ndarray, ink: Sequence[float], ground: Sequence[float]) -> np.ndarray:
    """Colour a mask (size, size): uint8 picture (3, size, size) from RGB triples in 0 to 255."""
    over, under = np.asarray(ink, np.float32)[:, None, None], np.asarray(ground, np.float32)[:, None, None]
    return (under + (over - under) * mask).round().clip(0, 255).astype(np.uint8)
