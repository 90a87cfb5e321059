"""The three drawings of ideas, as SVG in notebooks/drawings (run it from anywhere; it takes seconds).

python tests/tools/draw.py [FOLDER]
"""

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse

from saftnb import plots

FOLDER = Path(__file__).parents[2] / "notebooks" / "drawings"
BLUE, ORANGE, INK, QUIET = "#5b7796", "#e07b39", "#222222", "#8a8a8a"


def arrow(axis, start, end, colour, width=2.0, style="-|>"):
    """A straight arrow between two points of the plane."""
    axis.annotate(
        "", end, start, arrowprops={"arrowstyle": style, "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0}
    )


def note(axis, text, place, colour=INK, **options):
    axis.text(*place, text, color=colour, **{"fontsize": 11, "ha": "left", "va": "center"} | options)


def blank(axis):
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def sam() -> Figure:
    """The loss around w: one step up to the edge of the ball, its gradient there, and the step from w with that one."""
    figure, axis = plt.subplots(figsize=(6.8, 3.6))
    x, y = np.meshgrid(np.linspace(-3.2, 5.2, 400), np.linspace(-2.4, 2.4, 300))
    loss = 0.25 * x**2 + 1.6 * y**2 + 0.5 * x * y
    axis.contour(x, y, loss, levels=[0.1, 0.5, 1.2, 2.2, 3.5, 5.2, 7.5, 10.5], colors="#c9d3de", linewidths=1)

    def gradient(place):
        return np.array([0.5 * place[0] + 0.5 * place[1], 3.2 * place[1] + 0.5 * place[0]])

    w, rho = np.array([2.3, 0.35]), 0.85
    g = gradient(w)
    up = w + rho * g / np.linalg.norm(g)
    second = gradient(up)
    axis.add_patch(Circle(w, rho, facecolor="#fdf1e8", edgecolor=ORANGE, lw=1.2, linestyle="--", zorder=1))
    arrow(axis, w, up, ORANGE)
    arrow(axis, w, w - 0.42 * g, BLUE, 2.6)
    arrow(axis, w, w - 0.42 * second, ORANGE, 2.6)
    axis.plot(*w, "o", color=INK, markersize=7, zorder=5)
    axis.plot(*up, "o", color=ORANGE, markersize=6, zorder=5)
    note(axis, "$w$", w + [0.12, -0.13])
    note(axis, "$w + \\epsilon$: the worst place in the ball,\nas far as the gradient tells", up + [0.16, 0.1], ORANGE)
    note(axis, "plain step: $-\\nabla L(w)$", w - 0.42 * g + [-0.12, 0.05], BLUE, ha="right")
    note(
        axis,
        "sharpness-aware step: $-\\nabla L(w + \\epsilon)$,\ntaken from $w$",
        w - 0.42 * second + [0.2, 0.2],
        ORANGE,
    )
    note(axis, "radius $\\rho$", w + [-0.8, 0.6], ORANGE, ha="right")
    note(axis, "loss $L$, lower inside", (-3.1, 1.75), QUIET)
    axis.set(xlim=(-3.2, 5.2), ylim=(-2.3, 2.0), aspect="equal")
    blank(axis)
    return figure


def basin() -> Figure:
    """θ0, two task vectors, their sum, and where each task's loss is low."""
    figure, axis = plt.subplots(figsize=(6.4, 3.9))
    one, two = np.array([2.6, 0.45]), np.array([0.35, 2.1])
    for size, shade in ((1.0, 0.12), (0.7, 0.16)):
        axis.add_patch(Ellipse(one + [0.25, 0.9], 2.6 * size, 4.4 * size, angle=-12, color=BLUE, alpha=shade, lw=0))
        axis.add_patch(Ellipse(two + [1.1, 0.2], 4.9 * size, 2.1 * size, angle=-8, color=ORANGE, alpha=shade, lw=0))
    arrow(axis, (0, 0), one, BLUE)
    arrow(axis, (0, 0), two, ORANGE)
    both = 0.85 * (one + two)
    arrow(axis, (0, 0), both, INK, 2.6)
    for start in (0.85 * one, 0.85 * two):
        axis.plot(*zip(start, both, strict=True), ":", color=QUIET, lw=1.3)
    axis.plot(0, 0, "o", color=INK, markersize=7)
    note(axis, "$\\theta_0$, the pre-trained model", (0.08, -0.28))
    note(axis, "$\\tau_1$", one + [0.1, -0.08], BLUE)
    note(axis, "$\\tau_2$", two + [-0.28, 0.12], ORANGE)
    note(axis, "$\\theta_0 + \\lambda(\\tau_1 + \\tau_2)$:\none model, good at both", both + [0.14, 0.1])
    note(axis, "task 1 is solved here", (2.9, -0.75), BLUE)
    note(axis, "task 2 is solved here", (-1.0, 2.95), ORANGE)
    axis.set(xlim=(-1.3, 5.3), ylim=(-1.2, 3.5), aspect="equal")
    blank(axis)
    return figure


def shared_basis() -> Figure:
    """Two rank-1 updates as matrices, and the same two in the basis of their joint SVD."""
    rng = np.random.default_rng(4)
    outputs, inputs = rng.normal(size=(2, 6)), rng.normal(size=(2, 8))
    outputs[1] = 0.5 * outputs[0] + outputs[1]
    updates = [np.outer(outputs[t], inputs[t]) / 2 for t in (0, 1)]
    u, values, vt = np.linalg.svd(np.hstack(updates), full_matrices=False)
    shared, parts = u[:, :2], np.split(values[:2, None] * vt[:2], 2, axis=1)
    figure = plt.figure(figsize=(8.2, 3.4), layout="none")
    limit = max(np.abs(m).max() for m in (*updates, *parts))

    def draw(matrix, place, title, colour):
        height, width = (0.07 * side for side in matrix.shape)
        axis = figure.add_axes([place[0], place[1] - height, width * 0.5, height])
        axis.imshow(matrix, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_title(title, fontsize=11, fontweight="normal", color=colour, loc="center")
        axis.set(xticks=np.arange(-0.5, matrix.shape[1]), yticks=np.arange(-0.5, matrix.shape[0]))
        axis.tick_params(length=0, labelbottom=False, labelleft=False)
        axis.grid(True, color="white", linewidth=1.2)
        axis.spines[:].set_visible(False)

    figure.text(0.02, 0.93, "Weights: 48 entries for each task", fontsize=12, fontweight="bold", color=INK)
    draw(updates[0], (0.02, 0.78), "$\\Delta_1$, rank 1", BLUE)
    draw(updates[1], (0.32, 0.78), "$\\Delta_2$, rank 1", ORANGE)
    figure.text(
        0.02,
        0.1,
        "TIES compares entry with entry, and every entry\nmixes all directions of both updates.",
        fontsize=10.5,
        color=INK,
    )
    figure.text(0.62, 0.93, "One shared basis: 16 entries", fontsize=12, fontweight="bold", color=INK)
    draw(shared, (0.63, 0.78), "$U$, shared", QUIET)
    draw(parts[0], (0.72, 0.78), "$R_1$", BLUE)
    draw(parts[1], (0.72, 0.52), "$R_2$", ORANGE)
    figure.text(
        0.62,
        0.1,
        "$\\Delta_t = U R_t$, exactly. Rows of $R_1$ and $R_2$\nmean the same, so they can be compared.",
        fontsize=10.5,
        color=INK,
    )
    return figure


def main(folder: Path) -> None:
    plots.use_style()
    matplotlib.rcParams |= {"svg.hashsalt": "saftnb", "svg.fonttype": "path", "mathtext.fontset": "cm"}
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (sam, basin, shared_basis):
        draw().savefig(folder / f"{draw.__name__}.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
