"""Merges of LoRA adapters in several spaces."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from saftnb.evaluate import seed_interval
from saftnb.merging.spaces import EVERY_SPACE
from saftnb.plots.style import LABELS, QUIET, SPACES, colour_of, marker_of


def spaces_and_methods(scores: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Mean accuracy of every method in every space, a panel a recipe; bars span the seeds.

    Args:
        scores: accuracy in %, index (model, space, recipe, seed), with a column "mean"; "individual" among the models,
            whose accuracy is named at the right edge. The space is `EVERY_SPACE` where it makes no difference.
        methods: the models to show, from top to bottom.
    """
    means = scores["mean"].sort_index()
    own = means.xs("individual").groupby("recipe").mean()
    grouped = means[means.index.get_level_values("model").isin(methods)].groupby(["recipe", "space", "model"])
    middle, low, high = grouped.mean(), grouped.min(), grouped.max()
    recipes = list(dict.fromkeys(scores.index.get_level_values("recipe")))
    there = [space for space in SPACES if space in middle.index.unique("space")]
    apart = [space for space in there if space != EVERY_SPACE]
    size = (4.4 * len(recipes) + 1.4, 1.7 + 0.5 * len(methods))
    figure, axes = plt.subplots(1, len(recipes), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, recipe in zip(axes[0], recipes, strict=True):
        for space in there:
            part = middle.loc[recipe].loc[space]
            shift = 0 if space == EVERY_SPACE else 0.22 * (apart.index(space) - (len(apart) - 1) / 2)
            alone = [model for model in part.index if len(middle.loc[recipe].xs(model, level="model")) == 1]
            reach = [part - low.loc[recipe].loc[space], high.loc[recipe].loc[space] - part]
            name, colour, marker = SPACES[space]
            places = [methods.index(model) + shift * (model not in alone) for model in part.index]
            axis.errorbar(part, places, xerr=reach, fmt=marker, color=colour, label=name, markersize=7, linewidth=1.2)
        words = f"own adapters: {own[recipe]:.1f} % →"
        axis.annotate(words, (1, 0), (-4, 5), "axes fraction", "offset points", fontsize=8, ha="right", color=QUIET)
        axis.set(title=LABELS.get(recipe, recipe), xlabel="mean test accuracy over tasks, %")
        axis.set(yticks=range(len(methods)), yticklabels=[LABELS.get(method, method) for method in methods])
        axis.margins(x=0.12)
    axes[0][0].set_ylim(len(methods) - 0.3, -0.6)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9, title="merged in")
    return figure


def joint_task(frame: pd.DataFrame) -> Figure:
    """Accuracy of every model and space on the joint task, recipes side by side; bars span the seeds.

    Columns model, space, recipe, seed, accuracy (%).
    """
    rows = list(dict.fromkeys(zip(frame["model"], frame["space"], strict=True)))
    recipes = list(dict.fromkeys(frame["recipe"]))
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.38 * len(rows)))
    for number, recipe in enumerate(recipes):
        part = frame[frame["recipe"] == recipe].groupby(["model", "space"])["accuracy"]
        means, low, high = (value.reindex(rows) for value in (part.mean(), part.min(), part.max()))
        places = np.arange(len(rows)) + 0.26 * (number - (len(recipes) - 1) / 2)
        axis.errorbar(
            means, places, xerr=[means - low, high - means], fmt=marker_of(recipe), color=colour_of(recipe),
            markersize=6.5, label=LABELS.get(recipe, recipe), linewidth=1,
        )  # fmt: skip
    names = [LABELS.get(model, model) + (f", {space}" if space else "") for model, space in rows]
    axis.set(yticks=range(len(rows)), yticklabels=names, xlabel="Hits@1 over all labels, %")
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.legend(loc="best", fontsize=8)
    return figure


def effects(frame: pd.DataFrame) -> Figure:
    """Single gains, the gain of both and their interaction with intervals, a panel a space, a block a method.

    Columns method, space, effect, mean, low, high (points of accuracy; low and high may be NaN).
    """
    methods, spaces, kinds = (list(dict.fromkeys(frame[column])) for column in ("method", "space", "effect"))
    colours = dict(zip(kinds, ("#e07b39", "#4f9d97", "#6c5b9e", "#222222"), strict=False))
    figure, axes = plt.subplots(
        1, len(spaces), figsize=(4.4 * len(spaces) + 0.8, 1.3 + 0.75 * len(methods)), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis, space in zip(axes[0], spaces, strict=True):
        for number, kind in enumerate(kinds):
            part = frame[(frame["space"] == space) & (frame["effect"] == kind)].set_index("method").reindex(methods)
            places = np.arange(len(methods)) + 0.2 * (number - (len(kinds) - 1) / 2)
            reach = [part["mean"] - part["low"], part["high"] - part["mean"]]
            axis.errorbar(
                part["mean"], places, xerr=reach if part["low"].notna().all() else None, fmt="os^D"[number % 4],
                color=colours.get(kind, QUIET), label=kind, markersize=5.5, linewidth=1.2,
            )  # fmt: skip
        axis.axvline(0, color=QUIET, linewidth=0.8)
        axis.set(title=f"space: {space}", xlabel="points of mean test accuracy")
        axis.set(yticks=range(len(methods)), yticklabels=[LABELS.get(method, method) for method in methods])
    axes[0][0].set_ylim(len(methods) - 0.5, -0.5)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9)
    return figure


def knots_ablations(panels: Mapping[str, pd.Series], behind: Mapping[str, pd.Series] | None = None) -> Figure:
    """Gains in points, a panel a question: a mark for the mean of the seeds, a bar for its 95 % interval.

    Args:
        panels: title -> gains, index (case, "seed"). With one seed there is no bar.
        behind: title -> further gains, a light dot for each, index (case, anything).
    """
    behind = behind or {}
    widths = [len(gains.groupby(level=0)) + 1 for gains in panels.values()]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.6 + 0.62 * sum(widths), 3.6), sharey=True, width_ratios=widths, squeeze=False
    )
    (_, colour, marker), jitter = SPACES["knots"], np.random.default_rng(0)
    for axis, (title, gains) in zip(axes[0], panels.items(), strict=True):
        cases = list(dict.fromkeys(gains.index.get_level_values(0)))
        axis.axhline(0, color=QUIET, linewidth=1)
        if title in behind:
            places = [cases.index(case) for case in behind[title].index.get_level_values(0)]
            places = np.array(places) + jitter.uniform(-0.2, 0.2, len(places))
            axis.plot(places, behind[title], "o", color=colour, alpha=0.25, markersize=4, markeredgewidth=0)
        for place, case in enumerate(cases):
            mean, low, high = seed_interval(gains.loc[case])
            reach = [[mean - low], [high - mean]] if np.isfinite(low) else None
            axis.errorbar(place, mean, yerr=reach, fmt=marker, color=colour, markersize=6, linewidth=1.6, capsize=3)
        axis.set(xticks=range(len(cases)), xticklabels=cases, xlim=(-0.6, len(cases) - 0.4))
        axis.set_title(title, fontsize=9)
        axis.grid(visible=False, axis="x")
    axes[0][0].set_ylabel("difference, points of accuracy")
    return figure
