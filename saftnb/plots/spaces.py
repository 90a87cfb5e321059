"""Merges of LoRA adapters in several spaces."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from saftnb.evaluate import seed_interval
from saftnb.merging.bases import EVERY_SPACE
from saftnb.plots.style import COLOURS, INK, LABELS, QUIET, SPACES


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


def joint_task(hits: pd.Series) -> Figure:
    """Hits@1 of every model on the joint task, the best on top, a panel a recipe; bars span the seeds.

    A merge has the colour and the mark of its space; what is no merge is black.

    Args:
        hits: in %, index (model, space, recipe, seed). "own adapter", which is told each picture's task, is named at
            the right edge, so that the axis ends where the others do.
    """
    groups = hits.drop("own adapter", level="model").groupby(["model", "space", "recipe"])
    own = hits.xs("own adapter", level="model").groupby("recipe").mean()
    middle, low, high = (value.unstack("recipe") for value in (groups.mean(), groups.min(), groups.max()))
    recipes, rows = list(own.index), list(middle.iloc[:, 0].sort_values(ascending=False).index)
    size = (4.2 * len(recipes) + 2.6, 1.2 + 0.36 * len(rows))
    figure, axes = plt.subplots(1, len(recipes), figsize=size, sharex=True, sharey=True, squeeze=False)
    looks = [SPACES.get(space, ("", INK, "P")) for _, space in rows]
    for axis, recipe in zip(axes[0], recipes, strict=True):
        for place, (row, (_, colour, marker)) in enumerate(zip(rows, looks, strict=True)):
            mean, ends = middle.loc[row, recipe], [low.loc[row, recipe], high.loc[row, recipe]]
            axis.plot(ends, [place, place], color=colour, linewidth=1.4)
            axis.plot(mean, place, marker, color=colour, markersize=8)
            axis.annotate(f"{mean:.1f}", (ends[1], place), (7, 0), textcoords="offset points", fontsize=9, va="center")
        words = f"own adapters, told the task: {own[recipe]:.1f} % →"
        axis.annotate(words, (1, 0), (-4, 5), "axes fraction", "offset points", fontsize=8, ha="right", color=QUIET)
        axis.set(title=LABELS.get(recipe, recipe), xlabel="Hits@1 among all labels, %")
        axis.margins(x=0.12)
    there = {space: f", {SPACES[space][0]}" for space in SPACES} | {EVERY_SPACE: ", any space"}
    names = [LABELS.get(model, model) + there.get(space, " (no merge)") for model, space in rows]
    axes[0][0].set(yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) + 0.2, -0.6))
    for label, (_, colour, _) in zip(axes[0][0].get_yticklabels(), looks, strict=True):
        label.set_color(colour)
    return figure


def effects(frame: pd.DataFrame) -> Figure:
    """The gain of SAFT, of each space, of both, and their interaction, a panel a method; bars are intervals.

    Columns method, space, effect (SAFT, space, both, interaction), mean, low, high (points of accuracy; low and high
    are NaN where there is no interval). SAFT's gain, in the weights, is the same for every space and is drawn once.
    """
    spaces, methods = list(dict.fromkeys(frame["space"])), list(dict.fromkeys(frame["method"]))
    kinds = {"space": "{} alone", "both": "SAFT and {}", "interaction": "interaction with {}"}
    rows = [(spaces[0], "SAFT", "SAFT alone", COLOURS["saft"], "D", 0.0)]
    for gap, (kind, words) in enumerate(kinds.items()):
        for space in spaces:
            name, colour, marker = SPACES[space]
            rows.append((space, kind, words.format(name), colour, marker, len(rows) + 0.6 * gap))
    table = frame.set_index(["method", "space", "effect"])
    figure, axes = plt.subplots(
        1, len(methods), figsize=(4.2 * len(methods) + 1.6, 1.2 + 0.36 * len(rows)), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis, method in zip(axes[0], methods, strict=True):
        axis.axvline(0, color=QUIET, linewidth=1)
        axis.axhspan(rows[-len(spaces)][-1] - 0.6, rows[-1][-1] + 0.6, color=QUIET, alpha=0.15, linewidth=0)
        for space, kind, _, colour, marker, place in rows:
            mean, low, high = table.loc[(method, space, kind), ["mean", "low", "high"]]
            axis.plot([low, high], [place, place], color=colour, linewidth=1.6)
            axis.plot(mean, place, marker, color=colour, markersize=8)
            words = f"{mean:+.1f}".replace("-", "−")
            axis.annotate(words, (np.nanmax([mean, high]), place), (6, 0), textcoords="offset points", fontsize=9,
                          va="center")  # fmt: skip
        axis.set(title=LABELS.get(method, method), xlabel="points of mean test accuracy")
        axis.margins(x=0.15)
    axes[0][0].set(yticks=[row[-1] for row in rows], yticklabels=[row[2] for row in rows])
    axes[0][0].set_ylim(rows[-1][-1] + 0.6, -0.6)
    return figure


def knots_ablations(panels: Mapping[str, pd.Series], behind: Mapping[str, pd.Series] | None = None) -> Figure:
    """Gains in points, a panel a question: a mark for the mean of the seeds, a bar for its 95 % interval.

    Args:
        panels: title -> gains, index (case, "seed"). With one seed there is no bar.
        behind: title -> further gains, a light dot for each, index (case, anything).
    """
    behind = behind or {}
    widths = [max(len(gains.groupby(level=0)) + 1, 3) for gains in panels.values()]
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
            axis.plot(places, behind[title], "o", color=colour, alpha=0.4, markersize=4, markeredgewidth=0)
        for place, case in enumerate(cases):
            mean, low, high = seed_interval(gains.loc[case])
            reach = [[mean - low], [high - mean]] if np.isfinite(low) else None
            axis.errorbar(place, mean, yerr=reach, fmt=marker, color=colour, markersize=6, linewidth=1.6, capsize=3)
        axis.set(xticks=range(len(cases)), xticklabels=cases, xlim=(-0.6, len(cases) - 0.4))
        axis.set_title(title, fontsize=9)
        axis.grid(visible=False, axis="x")
    axes[0][0].set_ylabel("points of accuracy (above 0: better)")
    return figure
