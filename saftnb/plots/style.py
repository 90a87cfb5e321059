"""The project's colours, markers and names, and a strip of pictures."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from torch import Tensor

from saftnb.labels import LABELS as LABELS
from saftnb.labels import SPACE_LABELS
from saftnb.merging.bases import EVERY_SPACE

STYLE = Path(__file__).with_name("saftnb.mplstyle")
COLOURS = {
    "sgd": "#5b7796", "saft": "#e07b39",
    "sam": "#b3446c", "asam-kwon": "#8a5a2b",  # the other sharpness-aware steps: warm
    "ftts": "#6c5b9e", "ftts+saft": "#c49a2c", "ftlo": "#3a8f5c", "ftlo+saft": "#a8503a",
    "lora": "#4a7a9c", "lora+saft": "#d1612f",
    "sgd-matched": "#3f6fb5", "sgd-2x": "#2f4858", "sgd-wd0": "#4f9d97",  # the baseline's controls: cold
}  # fmt: skip
MARKERS = {"sgd": "o", "saft": "D", "ftts": "o", "ftts+saft": "D", "ftlo": "o", "ftlo+saft": "D",
           "lora": "o", "lora+saft": "D"}  # fmt: skip
SPACES = {  # merge space: its name, colour and marker
    "weights": (SPACE_LABELS["weights"], "#5b7796", "o"),
    "knots": (SPACE_LABELS["knots"], "#b3446c", "s"),
    "core": (SPACE_LABELS["core"], "#4f9d97", "^"),
    EVERY_SPACE: ("any of them: the same", "#8a8a8a", "D"),
}
INK, QUIET = "#222222", "#8a8a8a"


def colour_of(recipe: str) -> str:
    """A recipe's colour; one with changes in its name ("saft@rho=0.1") has that of the recipe it changes."""
    return COLOURS.get(recipe.partition("@")[0], QUIET)


def marker_of(recipe: str) -> str:
    return MARKERS.get(recipe.partition("@")[0], "o")


def mako() -> Colormap:
    """Seaborn's colour map mako, from light to dark."""
    import seaborn as sns  # takes seconds

    return sns.color_palette("mako_r", as_cmap=True)


def use_style() -> None:
    """Apply the project's matplotlib style to this session."""
    plt.style.use(STYLE)


def pictures(images: Tensor, captions: Sequence[str]) -> Figure:
    """A strip of uint8 pictures (n, 3, h, w), each with a caption above."""
    captions = [textwrap.fill(caption, 15) for caption in captions]
    lines = max(caption.count("\n") for caption in captions)
    figure, axes = plt.subplots(1, len(images), figsize=(len(images) * 0.95, 1.25 + 0.14 * lines))
    for axis, image, caption in zip(np.atleast_1d(axes), images, captions, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(caption, fontsize=7, fontweight="normal", loc="center")
        axis.axis("off")
    return figure
