"""Merges of LoRA adapters in several spaces."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from saftnb.merging.spaces import EVERY_SPACE
from saftnb.plots.style import LABELS, QUIET, colour_of, marker_of


def spaces_and_methods(frame: pd.DataFrame, individual: pd.Series) -> Figure:
    """Mean accuracy of every method in every space, a panel a recipe; bars span the seeds.

    Args:
        frame: columns model, space, recipe, seed, accuracy (mean over tasks, %); the space is `EVERY_SPACE` for a
            method that gives the same in all of them.
        individual: recipe -> mean accuracy of the tasks' own models, a dashed line.
    """
    recipes, models, spaces = (list(dict.fromkeys(frame[column])) for column in ("recipe", "model", "space"))
    spaces = [space for space in spaces if space != EVERY_SPACE] + [EVERY_SPACE] * (EVERY_SPACE in spaces)
    apart = sum(space != EVERY_SPACE for space in spaces)
    figure, axes = plt.subplots(
        1,
        len(recipes),
        figsize=(4.6 * len(recipes) + 1, 1.4 + 0.5 * len(models)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis, recipe in zip(axes[0], recipes, strict=True):
        for number, space in enumerate(spaces):
            part = frame[(frame["recipe"] == recipe) & (frame["space"] == space)].groupby("model")["accuracy"]
            means, low, high = (value.reindex(models) for value in (part.mean(), part.min(), part.max()))
            places = np.arange(len(models)) + (0.22 * (number - (apart - 1) / 2) if number < apart else 0)
            filled = {"markerfacecolor": colour_of(recipe) if space != "weights" else "none"}
            axis.errorbar(
                means, places, xerr=[means - low, high - means], fmt="os^D"[number % 4], color=colour_of(recipe),
                label=space, markersize=6.5, linewidth=1, **filled,
            )  # fmt: skip
        axis.axvline(individual[recipe], color=QUIET, linestyle="--", linewidth=1)
        axis.annotate("own models", (individual[recipe], -0.45), (-4, 0), textcoords="offset points", fontsize=8,
                      ha="right", va="center", color=QUIET)  # fmt: skip
        axis.set(title=LABELS.get(recipe, recipe), xlabel="mean test accuracy over tasks, %")
        axis.set(yticks=range(len(models)), yticklabels=[LABELS.get(model, model) for model in models])
    axes[0][0].set_ylim(len(models) - 0.5, -0.6)
    axes[0][0].legend(loc="best", fontsize=8, title="space")
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


def knots_ablations(by_rank: pd.DataFrame, gaps: pd.DataFrame) -> Figure:
    """Accuracy by rank in every space, and the gain of one space over another by the number of tasks.

    Args:
        by_rank: columns rank, space, seed, accuracy (%).
        gaps: columns tasks (how many), subset, seed, gain (points).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4))
    colours = ("#5b7796", "#b3446c", "#c49a2c", "#4f9d97", "#8a8a8a")
    ranks = sorted(by_rank["rank"].unique())
    for number, (space, part) in enumerate(by_rank.groupby("space", sort=False)):
        grouped = part.groupby("rank")["accuracy"]
        mean, low, high = grouped.mean(), grouped.min(), grouped.max()
        places = np.arange(len(ranks)) + 0.06 * (number - 2)
        left.errorbar(
            places, mean.reindex(ranks), yerr=[(mean - low).reindex(ranks), (high - mean).reindex(ranks)],
            fmt="os^Dv"[number % 5] + ("--" if space == "own models" else "-"), color=colours[number % 5], label=space,
            markersize=5, linewidth=1.2,
        )  # fmt: skip
    left.set(xticks=range(len(ranks)), xticklabels=ranks, xlabel="rank", ylabel="mean test accuracy, %")
    left.legend(loc="best", fontsize=8)
    means = gaps.groupby(["tasks", "subset"])["gain"].mean().reset_index()
    spread = np.random.default_rng(0).uniform(-0.12, 0.12, len(means))
    right.plot(means["tasks"] + spread, means["gain"], "o", color=colours[1], alpha=0.4, markersize=4)
    every = means.groupby("tasks")["gain"].mean()
    right.plot(every.index, every, "-", color=colours[1], linewidth=1.8)
    right.axhline(0, color=QUIET, linewidth=0.8)
    right.set(xticks=sorted(means["tasks"].unique()), xlabel="number of tasks merged")
    right.set_ylabel("KnOTS minus weights, points")
    return figure
