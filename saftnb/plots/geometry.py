"""What the analyses measure: disentanglement, linearity, alignment, spectra."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from saftnb.plots.style import LABELS, QUIET, colour_of, marker_of


def disentanglement_maps(frame: pd.DataFrame, side: float = 1.0) -> Figure:
    """ξ(α1, α2) side by side on one colour scale: a row a pair, a column a recipe, a dashed box at ±`side`.

    Columns pair ("one, two"), recipe, alpha_1, alpha_2, xi.
    """
    pairs, recipes = list(dict.fromkeys(frame["pair"])), list(dict.fromkeys(frame["recipe"]))
    figure, axes = plt.subplots(
        len(pairs), len(recipes), figsize=(3.4 * len(recipes) + 0.8, 3.1 * len(pairs)), squeeze=False
    )
    top = float(frame["xi"].max())
    for line, pair in zip(axes, pairs, strict=True):
        first, second = pair.split(", ")
        for axis, recipe in zip(line, recipes, strict=True):
            part = frame[(frame["pair"] == pair) & (frame["recipe"] == recipe)]
            table = part.groupby(["alpha_2", "alpha_1"])["xi"].mean().unstack("alpha_1")
            mesh = axis.pcolormesh(
                table.columns, table.index, table, vmin=0, vmax=top, cmap="mako_r", shading="nearest"
            )
            box = plt.Rectangle((-side, -side), 2 * side, 2 * side, fill=False, linestyle="--", color="#e07b39", lw=1.6)
            axis.add_patch(box)
            inside = part[(part["alpha_1"].abs() <= side + 1e-9) & (part["alpha_2"].abs() <= side + 1e-9)]
            axis.set_title(f"{LABELS.get(recipe, recipe)}: {inside['xi'].mean():.3f} in the box", fontsize=10)
            axis.set(xlabel=f"α of {first}", ylabel=f"α of {second}", aspect="equal")
            axis.grid(False)
    figure.colorbar(mesh, ax=axes, label="disentanglement error ξ", shrink=0.8)
    return figure


def block_linearity(frame: pd.DataFrame) -> Figure:
    """Distance and coefficient after every block; columns recipe, block, distance, coefficient, a row a pair and seed.

    The line is the mean over the rows, the band one standard deviation of them.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, value, label in (
        (axes[0], "distance", "cosine distance, 0: linear"),
        (axes[1], "coefficient", "coefficient ⟨A, B⟩ / ‖B‖², 1: linear"),
    ):
        for recipe, part in frame.groupby("recipe", sort=False):
            grouped = part.groupby("block")[value]
            mean, spread = grouped.mean(), grouped.std().fillna(0)
            axis.plot(
                mean.index, mean, color=colour_of(recipe), marker=marker_of(recipe), label=LABELS.get(recipe, recipe)
            )
            axis.fill_between(
                mean.index, mean - spread, mean + spread, color=colour_of(recipe), alpha=0.15, linewidth=0
            )
        axis.set(xlabel="transformer block", ylabel=label, xticks=sorted(frame["block"].unique()))
    axes[1].axhline(1, color=QUIET, linewidth=0.8)
    axes[0].legend(loc="best", fontsize=8)
    return figure


def joint_losses(frame: pd.DataFrame) -> Figure:
    """The joint loss (above) and its gap δ (below) along the segment between two task models, a column a pair.

    Columns pair ("one, two"), recipe, alpha (weight of the first), loss, gap, a row a seed; bands span the seeds.
    """
    pairs = list(dict.fromkeys(frame["pair"]))
    figure, axes = plt.subplots(
        2, len(pairs), figsize=(3.5 * len(pairs) + 0.6, 5), sharex=True, sharey="row", squeeze=False
    )
    for column, pair in enumerate(pairs):
        for recipe, part in frame[frame["pair"] == pair].groupby("recipe", sort=False):
            for axis, value in zip(axes[:, column], ("loss", "gap"), strict=True):
                grouped = part.groupby("alpha")[value]
                mean = grouped.mean()
                axis.plot(
                    mean.index,
                    mean,
                    color=colour_of(recipe),
                    marker=marker_of(recipe),
                    label=LABELS.get(recipe, recipe),
                )
                axis.fill_between(
                    mean.index, grouped.min(), grouped.max(), color=colour_of(recipe), alpha=0.15, linewidth=0
                )
        axes[0][column].set_title(pair, fontsize=10)
        axes[1][column].axhline(0, color=QUIET, linewidth=0.8)
        axes[1][column].set_xlabel(f"weight α of {pair.split(', ')[0]}")
    axes[0][0].set_ylabel("joint loss L, nats")
    axes[1][0].set_ylabel("gap δ(α), nats")
    axes[0][0].legend(loc="best", fontsize=8)
    return figure


_UPDATES = {"full": "#5b7796", "LoRA": "#4f9d97", "LoRA, KnOTS's basis": "#b3446c"}


def alignment(frame: pd.DataFrame) -> Figure:
    """Mean linear CKA between tasks, layer by layer, a panel a view; bands are one standard deviation over pairs.

    Columns view, updates, layer, cka, a row a pair (and seed); layers are drawn in their order.
    """
    views = list(dict.fromkeys(frame["view"]))
    layers = list(dict.fromkeys(frame["layer"]))
    figure, axes = plt.subplots(1, len(views), figsize=(4.8 * len(views), 3.3), sharey=True, squeeze=False)
    for axis, view in zip(axes[0], views, strict=True):
        for updates, part in frame[frame["view"] == view].groupby("updates", sort=False):
            grouped = part.groupby("layer")["cka"]
            mean, spread = grouped.mean().reindex(layers), grouped.std().reindex(layers).fillna(0)
            colour = _UPDATES.get(updates, QUIET)
            axis.plot(range(len(layers)), mean, "o-", markersize=3, color=colour, label=updates)
            axis.fill_between(range(len(layers)), mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=view, xlabel="attention matrix, by depth (q, k, v, out)", ylim=(0, 1))
    axes[0][0].set_ylabel("linear CKA between two tasks")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9)
    return figure


def alignment_heatmaps(frame: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Linear CKA between every two tasks, mean over layers and seeds, a panel for each view and kind of updates.

    Columns view, updates, task_1, task_2, cka.
    """
    panels = list(dict.fromkeys(zip(frame["view"], frame["updates"], strict=True)))
    side = 0.42 * len(tasks) + 1.1
    figure, axes = plt.subplots(1, len(panels), figsize=(side * len(panels) + 1, side + 0.6), squeeze=False)
    for number, (axis, (view, updates)) in enumerate(zip(axes[0], panels, strict=True)):
        part = frame[(frame["view"] == view) & (frame["updates"] == updates)]
        table = part.groupby(["task_1", "task_2"])["cka"].mean().unstack().reindex(index=tasks, columns=tasks)
        table = table.fillna(table.T)
        sns.heatmap(
            table, vmin=0, vmax=1, cmap="mako_r", square=True, ax=axis, cbar=number == len(panels) - 1,
            yticklabels=number == 0, annot=True, fmt=".2f", annot_kws={"fontsize": 6.5},
        )  # fmt: skip
        axis.set(xlabel="", ylabel="")
        axis.set_title(f"{updates}\n{view}", fontsize=9)
        axis.tick_params(length=0, labelsize=8)
        axis.grid(False)
    return figure


def kept_entries(frame: pd.DataFrame, keep: float) -> Figure:
    """Share of kept entries that coincide, and of those with equal signs; a dot a pair of tasks, a diamond their mean.

    Columns updates, task_1, task_2, seed, overlap, agreement; `keep`: the share kept, which is the overlap by chance.
    """
    kinds = list(dict.fromkeys(frame["updates"]))
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.9 + 0.5 * len(kinds)), sharey=True)
    scatter = np.random.default_rng(0)
    for axis, value, label, chance in (
        (axes[0], "overlap", "share of kept entries that coincide", keep),
        (axes[1], "agreement", "share of those with equal signs", 0.5),
    ):
        for row, updates in enumerate(kinds):
            part = frame[frame["updates"] == updates].groupby(["task_1", "task_2"])[value].mean()
            colour = _UPDATES.get(updates, "#c49a2c")
            axis.plot(part, row + scatter.uniform(-0.15, 0.15, len(part)), "o", color=colour, alpha=0.4, markersize=4)
            axis.plot(part.mean(), row, "D", color=colour, markersize=8, markeredgecolor="white")
        axis.axvline(chance, color=QUIET, linestyle="--", linewidth=1)
        axis.annotate(
            "chance", (chance, -0.45), (4, 0), textcoords="offset points", fontsize=8, color=QUIET, va="center"
        )
        axis.set(xlabel=label, xlim=(0, 1))
    axes[0].set(yticks=range(len(kinds)), yticklabels=kinds)
    axes[0].set_ylim(len(kinds) - 0.5, -0.6)
    return figure


def update_spectra(frame: pd.DataFrame) -> Figure:
    """Singular values of single tasks' updates and of all side by side, mean over layers, tasks and seeds, a panel a
    recipe.

    Columns recipe, task ("joint" for all), index, value.
    """
    recipes = list(dict.fromkeys(frame["recipe"]))
    figure, axes = plt.subplots(1, len(recipes), figsize=(4.4 * len(recipes), 3.1), squeeze=False)
    for axis, recipe in zip(axes[0], recipes, strict=True):
        part = frame[frame["recipe"] == recipe]
        for label, chosen, style in (
            ("one task", part[part["task"] != "joint"], "-"),
            ("all tasks side by side", part[part["task"] == "joint"], "--"),
        ):
            mean = chosen.groupby("index")["value"].mean()
            mean = mean[mean > 1e-6 * mean.max()]
            axis.plot(mean.index, mean, style, color=colour_of(recipe), label=label)
        axis.set(title=LABELS.get(recipe, recipe), xlabel="index of the singular value", yscale="log")
    axes[0][0].set_ylabel("singular value, mean of matrices")
    axes[0][0].legend(loc="best", fontsize=8)
    return figure
