"""Learned coefficients: what they reach with how many pictures, what they are, how they were learned."""

import re
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from saftnb.labels import KIND_LABELS
from saftnb.plots.style import INK, LABELS, QUIET

KINDS = {"task": ("#a3b18a", "v"), "parameter": ("#4f9d97", "s"), "channel": ("#b3446c", "o"), "weights": (INK, "x")}


def learned_by_pictures(scores: pd.DataFrame, lines: Mapping[str, float]) -> Figure:
    """Test accuracy against the pictures a task that a merge was learned from.

    Args:
        scores: columns learned (a kind of `saftnb.merging.coefficients`), pictures, seed, accuracy in %. "all" pictures
            stand at the right. Bands span the seeds.
        lines: accuracies of models that learn nothing, drawn across.
    """
    figure, axis = plt.subplots(figsize=(7.6, 4.6))
    pools = list(dict.fromkeys(scores["pictures"]))
    for kind, part in scores.groupby("learned", sort=False):
        colour, marker = KINDS[kind]
        by_pool = part.groupby("pictures", sort=False)["accuracy"]
        places, means = range(len(pools)), by_pool.mean().loc[pools]
        axis.fill_between(places, by_pool.min().loc[pools], by_pool.max().loc[pools], color=colour, alpha=0.15, lw=0)
        style = "--" if kind == "weights" else "-"
        axis.plot(places, means, style, color=colour, marker=marker, label=KIND_LABELS[kind])
    edge = blended_transform_factory(axis.transAxes, axis.transData)
    named: dict[float, str] = {}  # where lines nearly meet, one place for their names
    for name, value in sorted(lines.items(), key=lambda line: line[1]):
        axis.axhline(value, color=QUIET, linewidth=1, linestyle=":")
        text = f"{LABELS.get(name, name)} {value:.1f}"
        near = [place for place in named if value - place < 1]
        named |= {near[-1]: f"{named[near[-1]]}, {text}"} if near else {value: text}
    for place, text in named.items():
        axis.text(1.01, place, text, transform=edge, va="center", fontsize=8, color=INK)
    axis.set_xticks(range(len(pools)), [str(pool) for pool in pools])
    axis.set(xlabel="pictures a task, without labels", ylabel="mean test accuracy, %")
    axis.set_xlim(-0.15, len(pools) - 0.85)
    axis.legend(title="what has a number of its own", loc="upper left", bbox_to_anchor=(0.01, 0.93))
    return figure


def learning_curves(curves: pd.DataFrame) -> Figure:
    """Loss over its first value, and validation accuracy, against steps; columns learning (its name), step, loss,
    validation_accuracy (0 to 1). Names that begin alike have one colour."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    colours = {"distillation": KINDS["channel"][0], "entropy": "#8a5a2b"}
    for name, part in curves.groupby("learning", sort=False):
        first, _, more = name.partition(", ")
        look = {"color": colours[first], "marker": "s" if more else "o", "ls": "--" if more else "-", "label": name}
        axes[0].plot(part["step"], part["loss"] / part["loss"].iloc[0], **look)
        axes[1].plot(part["step"], 100 * part["validation_accuracy"], **look)
    axes[0].set(ylabel="loss, as a share of the first", xlabel="steps", ylim=(0, None))
    axes[1].set(ylabel="validation accuracy, %", xlabel="steps")
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def coefficient_map(coefficients: pd.DataFrame, start: float) -> Figure:
    """Learned coefficients by part of the image tower (mean over its parameters) and task.

    Args:
        coefficients: a row a parameter of a CLIP image tower, a column a task. start: what has no colour.
    """
    parts = coefficients.groupby([_part(name) for name in coefficients.index], sort=False).mean()
    parts = parts.reindex(sorted(parts.index, key=lambda part: ["input", "block", "output"].index(part.split()[0])))
    figure, axis = plt.subplots(figsize=(1.6 + 0.85 * parts.shape[1], 1.2 + 0.36 * len(parts)))
    reach = max(np.abs(parts.to_numpy() - start).max(), 1e-9)
    drawn = axis.imshow(parts, cmap="PuOr_r", vmin=start - reach, vmax=start + reach, aspect="auto")
    for row, column in np.ndindex(*parts.shape):
        value = parts.iat[row, column]
        ink = "white" if abs(value - start) > 0.7 * reach else INK
        axis.text(column, row, f"{value:.2f}".replace("-", "−"), ha="center", va="center", fontsize=8, color=ink)
    axis.set_xticks(range(parts.shape[1]), parts.columns)
    axis.set_yticks(range(len(parts)), parts.index)
    axis.grid(False)
    figure.colorbar(drawn, ax=axis, label="mean coefficient")
    return figure


def _part(name: str) -> str:
    """Where a parameter of a CLIP image tower lies, from the input to the output."""
    block = re.search(r"resblocks\.(\d+)\.(attn|mlp|ln)", name)
    if block:
        kind = {"attn": "attention", "mlp": "MLP", "ln": "norms"}[block[2]]
        return f"block {int(block[1]) + 1}, {kind}"
    return "output" if name.startswith(("ln_post", "proj")) else "input"
