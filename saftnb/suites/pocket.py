"""The pocket tasks: three with real pictures that pip packages ship, three that our own renderer draws.

28×28 RGB. Splits are fixed by `SPLIT_SEED`, rendered pictures by `RENDER_SEED`. The generator settings that
the pre-training corpus must not share stand in `backbones/corpus.py`.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from saftnb import render
from saftnb.disk import whole_file
from saftnb.paths import data_root
from saftnb.render import PATTERNS, glyphs, paint, pattern, scatter, shapes
from saftnb.suites import sources
from saftnb.suites.task import Task, divide

SPLIT_SEED, RENDER_SEED = 0, 20250
DRAWERS = ("numpy", "pillow", "matplotlib")  # packages that decide what a rendered picture looks like
_DIGITS = tuple("0123456789")
# Prompts were chosen on zero-shot validation accuracy alone.
_DIGIT_PROMPTS = ("the digit {}", "the number {}", "a handwritten digit {}")
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
FONTS = {
    "sans serif": "DejaVuSans.ttf", "bold sans serif": "DejaVuSans-Bold.ttf",
    "italic sans serif": "DejaVuSans-Oblique.ttf", "serif": "STIXGeneral.ttf", "bold serif": "STIXGeneralBol.ttf",
    "italic serif": "STIXGeneralItalic.ttf", "typewriter": "DejaVuSansMono.ttf",
    "bold typewriter": "DejaVuSansMono-Bold.ttf",
}  # fmt: skip
_COUNTS = ("one", "two", "three", "four", "five", "six")
Names = tuple[str, ...]
Colour = tuple[float, float, float]
Draw = Callable[[int, np.random.Generator], np.ndarray]  # a picture uint8 (3, h, w) of a label


def _greys(generator: np.random.Generator, contrast: float) -> tuple[Colour, Colour]:
    """Ink and ground as greys at least `contrast` (0 to 255) apart, in either order."""
    low = generator.uniform(0, 255 - contrast)
    pair = (low, generator.uniform(low + contrast, 255))
    ink, ground = pair if generator.random() < 0.5 else pair[::-1]
    return (ink, ink, ink), (ground, ground, ground)


def _grain(picture: np.ndarray, generator: np.random.Generator, deviation: float) -> np.ndarray:
    """Add grey Gaussian noise of the given standard deviation (0 to 255)."""
    noise = generator.normal(scale=deviation, size=picture.shape[1:])
    return (picture + noise).round().clip(0, 255).astype(np.uint8)


@cache
def _fonts() -> list[Path]:
    """The files of `FONTS`, which come with matplotlib, found without importing it."""
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        raise sources.MissingSource("the fonts come with matplotlib: pip install 'saftnb[notebooks]'")
    folder = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
    return [folder / file for file in FONTS.values()]


def _fonts_picture(label: int, generator: np.random.Generator) -> np.ndarray:
    letters = "".join(generator.choice(list("ABDEGHKMNRSTabdefghikmnrst"), size=2))
    mask = glyphs(
        letters, _fonts()[label], height=generator.uniform(14, 17),
        angle=generator.uniform(-4, 4), shift=generator.uniform(-2, 2, size=2).tolist(),
    )  # fmt: skip
    return _grain(paint(mask, *_greys(generator, 120)), generator, 12)


def _counts_picture(label: int, generator: np.random.Generator) -> np.ndarray:
    count = label + 1
    radii = generator.uniform(1.7, 2.8, size=count)
    centres = scatter(count, 6.4, 3.0, generator)
    kinds = generator.choice(("disc", "square", "diamond"), size=count)
    mask = shapes(list(kinds), centres, list(radii), list(generator.uniform(0, 6, size=count)))
    return _grain(paint(mask, *_greys(generator, 110)), generator, 12)


def _patterns_picture(label: int, generator: np.random.Generator) -> np.ndarray:
    period, tilt = generator.uniform(4.5, 8.5), generator.uniform(-14, 14)
    mask = pattern(PATTERNS[label], generator, period=period, tilt=tilt)
    return _grain(paint(mask, *_greys(generator, 90)), generator, 35)


def _render(draw: Draw, classes: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Drawing takes seconds: the pictures are kept under `data_root()`, after a hash of them and of what decides them,
    so that those of other code and those of a damaged file are drawn anew."""
    labels = np.arange(count) % classes
    asked = f"{_drawn_by()} {classes} {count} {seed}".encode()
    file = data_root() / "rendered" / f"{draw.__name__.strip('_')}.u8"
    kept = b""
    with suppress(OSError):
        kept = file.read_bytes()
    pixels = memoryview(kept)[32:]
    if sha256(asked + pixels).digest() == kept[:32]:
        return np.frombuffer(pixels, np.uint8).reshape(count, 3, render.SIZE, render.SIZE), labels
    generator = np.random.default_rng([RENDER_SEED, seed])
    images = np.stack([draw(int(label), generator) for label in labels])
    with suppress(OSError):  # where nothing can be written they are drawn each time
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file, durable=False) as part:
            part.write_bytes(sha256(asked + images.data).digest() + images.data)
    return images, labels


@cache
def _drawn_by() -> str:
    """Changes with all that draws: our code, and the packages that draw and bring fonts."""
    there = [f"{found.name} {found.version}" for name in DRAWERS for found in distributions(name=name)]
    code = [Path(file).read_text() for file in (__file__, render.__file__)]
    return sha256("\n".join([*there, *code]).encode()).hexdigest()


# name -> (origin, class names, prompts, source of (images, labels), {split: pictures})
_SIZES = {"test": 1200, "validation": 500, "train": 4000}
_TASKS: dict[str, tuple[str, Names, Names, Callable[[], tuple[np.ndarray, np.ndarray]], dict[str, int]]] = {
    "mnist": ("real", _DIGITS, _DIGIT_PROMPTS, sources.mnist, {"test": 1200, "validation": 500, "train": 3300}),
    "digits": ("real", _DIGITS, _DIGIT_PROMPTS, sources.digits, {"test": 500, "validation": 300, "train": 990}),
    "animals": ("real", ANIMALS, ("a silhouette of a {}", "a picture of a {}"), sources.animals, _SIZES),
    "fonts": (
        "rendered", tuple(FONTS), ("letters in {} type", "{} letters", "text in a {} typeface"),
        lambda: _render(_fonts_picture, len(FONTS), 6000, 1), _SIZES,
    ),
    "counts": (
        "rendered", _COUNTS,
        ("a picture of {} shapes", "a picture of {} circles", "a picture of {} squares", "a picture of {} stars"),
        lambda: _render(_counts_picture, len(_COUNTS), 6000, 2), _SIZES,
    ),
    "patterns": (
        "rendered", PATTERNS, ("a picture of {}", "a pattern of {}"),
        lambda: _render(_patterns_picture, len(PATTERNS), 6000, 3), _SIZES,
    ),
}  # fmt: skip
POCKET_TASKS = tuple(_TASKS)


def prompts() -> list[str]:
    """Every prompt of every pocket task, for the backbone's vocabulary."""
    return [
        template.format(name) for _, names, templates, *_ in _TASKS.values() for template in templates for name in names
    ]


@cache
def pocket_task(name: str) -> Task:
    """Load or render one pocket task.

    Raises:
        KeyError: unknown name.
        MissingSource: the package that ships the pictures is not installed.
    """
    origin, class_names, templates, source, sizes = _TASKS[name]
    images, labels = source()
    return Task(name, origin, tuple(class_names), templates, **divide(images, labels, sizes, SPLIT_SEED))


def thimble_task(name: str) -> Task:
    """A few hundred pictures of a pocket task, its first ones of each split, for tests."""
    task = pocket_task(name)
    parts = {"train": task.train[:256], "validation": task.validation[:60], "test": task.test[:100]}
    return Task(task.name, task.origin, task.class_names, task.prompts, **parts)
