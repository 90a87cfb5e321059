"""What the analyses measure: disentanglement, linearity, alignment, spectra."""

import itertools
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from saftnb.evaluate import seed_interval
from saftnb.plots.style import INK, LABELS, QUIET, colour_of, mako, marker_of


def disentanglement_maps(frame: pd.DataFrame, side: float = 1.0) -> Figure:
    """ξ(α1, α2) side by side on one colour scale: a row a pair, a column a recipe, a dashed box at ±`side`.

    The box's upper right quarter has a solid line. Above each map: the mean ξ of both.

    Columns pair ("one, two"), recipe, alpha_1, alpha_2, xi, a row a seed; their mean is drawn.
    """
    pairs, recipes = list(dict.fromkeys(frame["pair"])), list(dict.fromkeys(frame["recipe"]))
    figure, axes = plt.subplots(
        len(pairs), len(recipes), figsize=(3.4 * len(recipes) + 0.8, 3.3 * len(pairs)), squeeze=False
    )
    top = float(frame.groupby(["pair", "recipe", "alpha_1", "alpha_2"])["xi"].mean().max())
    for line, pair in zip(axes, pairs, strict=True):
        first, second = pair.split(", ")
        for axis, recipe in zip(line, recipes, strict=True):
            part = frame[(frame["pair"] == pair) & (frame["recipe"] == recipe)]
            table = part.groupby(["alpha_2", "alpha_1"])["xi"].mean().unstack("alpha_1")
            mesh = axis.pcolormesh(table.columns, table.index, table, vmin=0, vmax=top, cmap=mako(), shading="nearest")
            look = {"fill": False, "color": "#e07b39"}
            axis.add_patch(plt.Rectangle((-side, -side), 2 * side, 2 * side, linestyle="--", lw=1.6, **look))
            axis.add_patch(plt.Rectangle((0, 0), side, side, lw=2.4, **look))
            inside = part[(part["alpha_1"].abs() <= side + 1e-9) & (part["alpha_2"].abs() <= side + 1e-9)]
            quarter = inside.loc[(inside["alpha_1"] > 0) & (inside["alpha_2"] > 0), "xi"]
            means = f"mean ξ {inside['xi'].mean():.3f} in the box"
            if len(quarter):
                means += f", {quarter.mean():.3f} in its quarter"
            axis.set_title(means, fontsize=8.5, fontweight="normal", color=INK)
            if pair == pairs[0]:
                axis.annotate(
                    LABELS.get(recipe, recipe), (0, 1), (0, 20), xycoords="axes fraction", textcoords="offset points",
                    fontsize=11, fontweight="bold", color=INK,
                )  # fmt: skip
            axis.set(xlabel=f"α of {first}", ylabel=f"α of {second}", aspect="equal")
            axis.grid(False)
    figure.colorbar(mesh, ax=axes, label="disentanglement error ξ", shrink=0.8)
    return figure


def block_linearity(frame: pd.DataFrame) -> Figure:
    """Distance from linear after every block, its difference between two recipes, and the coefficient.

    A thin line or a dot is a pair of tasks (mean of its seeds), a thick one the mean of all; the bar of a difference
    is Student's 95 % interval over the seeds, where there are several. Columns recipe (two; of one there is no
    difference to show), seed, pair, block, distance, coefficient.
    """
    recipes = list(dict.fromkeys(frame["recipe"]))
    base, sharp = recipes[0], recipes[-1]
    panels = 3 if sharp != base else 2
    figure, axes = plt.subplots(1, panels, figsize=(3.8 * panels, 3.3))
    for axis, value in ((axes[0], "distance"), (axes[-1], "coefficient")):
        for recipe in recipes:
            part, colour = frame[frame["recipe"] == recipe], colour_of(recipe)
            axis.plot(
                part.pivot_table(index="block", columns="pair", values=value), color=colour, alpha=0.3, linewidth=0.8
            )
            look = {"color": colour, "marker": marker_of(recipe), "linewidth": 2.6, "label": LABELS.get(recipe, recipe)}
            axis.plot(part.groupby("block")[value].mean(), **look)
    gaps = frame.pivot_table(index=["block", "seed", "pair"], columns="recipe", values="distance")
    gaps = gaps[sharp] - gaps[base]
    scatter = np.random.default_rng(0)
    for block, part in gaps.groupby("block") if sharp != base else ():
        pairs, (mean, low, high) = part.groupby("pair").mean(), seed_interval(part.groupby("seed").mean())
        axes[1].plot(block + scatter.uniform(-0.2, 0.2, len(pairs)), pairs, ".", color=QUIET, alpha=0.7)
        reach = None if np.isnan(low) else [[mean - low], [high - mean]]
        axes[1].errorbar(
            block, mean, yerr=reach, fmt=marker_of(sharp), color=colour_of(sharp), linewidth=2.2, capsize=4
        )
    for axis, linear in zip(axes, (0, 0, 1)[-panels:], strict=True):
        axis.axhline(linear, color=INK, linewidth=0.8)
        axis.set(xlabel="transformer block", xticks=sorted(frame["block"].unique()))
    axes[0].set(title="cosine distance", ylabel="1 − cos(A, B), 0: linear")
    axes[1].set(  # of one recipe the last panel, which gets its own words below
        title=f"{LABELS.get(sharp, sharp)} minus {LABELS.get(base, base)}", ylabel="difference, below 0: more linear"
    )
    axes[-1].set(title="coefficient", ylabel="⟨A, B⟩ / ‖B‖², 1: linear")
    axes[0].legend(loc="upper left", fontsize=8)
    return figure


def joint_losses(frame: pd.DataFrame) -> Figure:
    """The joint loss (above) and its gap δ (below) along the segment between two task models, a column a pair.

    Columns pair ("one, two"), recipe, alpha (weight of the first), loss, gap, a row a seed; bands span the seeds.
    """
    pairs = list(dict.fromkeys(frame["pair"]))
    figure, axes = plt.subplots(
        2, len(pairs), figsize=(3.5 * len(pairs) + 0.6, 5), sharex="col", sharey="row", squeeze=False
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
        first, second = pair.split(", ")
        axes[0][column].set_title(pair, fontsize=10)
        axes[1][column].axhline(0, color=INK, linewidth=0.8)
        axes[1][column].set(xlabel=f"weight α of the {first} expert", xticks=[0, 0.5, 1])
        axes[1][column].set_xticklabels([f"0\n{second}", "0.5\nhalf way", f"1\n{first}"])
    low, high = axes[1][0].get_ylim()
    axes[1][0].set_ylim(low, max(high, 0.12 * (high - low)))  # room for the words
    words = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": QUIET}
    axes[1][0].annotate("above this line: a barrier", (0.5, 0), (0, 5), **words)
    axes[0][0].set_ylabel("joint loss L, nats")
    axes[1][0].set_ylabel("gap δ(α), nats")
    axes[0][0].legend(loc="best", fontsize=8)
    return figure


_UPDATES = {"full": "#5b7796", "LoRA": "#4f9d97", "LoRA, KnOTS's basis": "#b3446c"}


def alignment(frame: pd.DataFrame) -> Figure:
    """Mean linear CKA between tasks, layer by layer, a panel a view; bands are one standard deviation over pairs.

    What is in KnOTS's basis has a dashed line without a band, so that one sees what lies beneath it. A panel says so
    where two lines coincide, and why.

    Columns view, updates, layer, cka, a row a pair (and seed); layers are drawn in their order.
    """
    views, kinds, layers = (list(dict.fromkeys(frame[column])) for column in ("view", "updates", "layer"))
    names = [layer.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj") for layer in layers]
    figure, axes = plt.subplots(1, len(views), figsize=(4.9 * len(views), 3.5), sharey=True, squeeze=False)
    for axis, view in zip(axes[0], views, strict=True):
        means = {}
        for updates, part in frame[frame["view"] == view].groupby("updates", sort=False):
            grouped, colour, above = part.groupby("layer")["cka"], _UPDATES.get(updates, QUIET), "KnOTS" in updates
            mean, spread = grouped.mean().reindex(layers), grouped.std().reindex(layers).fillna(0)
            look = {"linestyle": "--", "linewidth": 1.4, "zorder": 4} if above else {"linewidth": 4.5, "alpha": 0.75}
            axis.plot(range(len(layers)), mean, color=colour, label=updates, **look)
            if not above:
                axis.fill_between(
                    range(len(layers)), mean - spread, mean + spread, color=colour, alpha=0.13, linewidth=0
                )
            means[updates] = mean
        for one, two in itertools.combinations(means, 2):
            if (means[one] - means[two]).abs().max() < 0.02:
                free = 0.93 if max(mean.max() for mean in means.values()) < 0.8 else 0.03
                axis.annotate(
                    f"{two} lies on {one}: linear CKA sees no rotation", (0.98, free), xycoords="axes fraction",
                    fontsize=8.5, ha="right", bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
                )  # fmt: skip
        axis.set(title=view, xlabel="attention matrix, block after block", ylim=(0, 1))
        if len(layers) <= 24:
            axis.set_xticks(range(len(layers)), names, fontsize=8)
    axes[0][0].set_ylabel("linear CKA between two tasks")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(kinds), fontsize=9)
    return figure


def alignment_heatmaps(frame: pd.DataFrame, tasks: Sequence[str]) -> Figure:
    """Linear CKA between every two tasks, mean over layers and seeds, a panel for each kind of updates.

    Columns updates, task_1, task_2, cka.
    """
    kinds = list(dict.fromkeys(frame["updates"]))
    side = 0.36 * len(tasks) + 1.0
    figure, axes = plt.subplots(1, len(kinds), figsize=(side * len(kinds) + 1, side), squeeze=False)
    for axis, updates in zip(axes[0], kinds, strict=True):
        part = frame[frame["updates"] == updates]
        table = part.groupby(["task_1", "task_2"])["cka"].mean().unstack().reindex(index=tasks, columns=tasks)
        mesh = axis.imshow(table.fillna(table.T), vmin=0, vmax=1, cmap=mako())
        axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
        axis.set_yticks(range(len(tasks)), tasks if axis is axes[0][0] else [])
        axis.set_title(updates)
        axis.tick_params(length=0, labelsize=9)
        axis.grid(False)
    figure.colorbar(mesh, ax=axes, label="linear CKA", shrink=0.9)
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
