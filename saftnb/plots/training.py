"""Training curves, and how sharp the loss is around a model."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from saftnb.plots.style import COLOURS, INK, LABELS, QUIET, colour_of, marker_of


def training_curves(frame: pd.DataFrame) -> Figure:
    """Validation accuracy against steps and gradients taken; columns recipe, step, gradients, validation_accuracy."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axis, x, label in ((axes[0], "step", "optimizer steps"), (axes[1], "gradients", "gradients taken")):
        for recipe, part in frame.groupby("recipe", sort=False):
            axis.plot(
                part[x],
                part["validation_accuracy"],
                color=colour_of(recipe),
                marker=marker_of(recipe),
                label=LABELS.get(recipe, recipe),
            )
        axis.set_xlabel(label)
    axes[0].set_ylabel("validation accuracy")
    axes[0].legend(loc="lower right")
    axes[1].set_title("a SAFT step takes two gradients")
    return figure


def loss_slices(frame: pd.DataFrame) -> Figure:
    """Rise of the loss; columns recipe, direction, draw, distance, rise. A band (± 1 s.d.) spans several draws."""
    kinds = list(dict.fromkeys(frame["direction"]))
    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.2), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        part = frame[frame["direction"] == kind]
        many = part["draw"].nunique() > 1
        sns.lineplot(
            part, x="distance", y="rise", hue="recipe", palette=COLOURS, ax=axis, errorbar=("sd", 1) if many else None,
            legend=axis is axes[0][0],
        )  # fmt: skip
        axis.axhline(0, color=QUIET, linewidth=0.8)
        axis.set(title=kind, xlabel="distance from the solution, ‖Δθ‖₂", ylabel="rise of the test loss, nats")
    legend = axes[0][0].get_legend()
    legend.set_title(None)
    for text in legend.get_texts():
        text.set_text(LABELS.get(text.get_text(), text.get_text()))
    return figure


def sharpness_by_task(frame: pd.DataFrame, value: str, label: str) -> Figure:
    """One number a task and recipe on a logarithmic axis; columns recipe, task and `value`; dots are seeds."""
    tasks = list(dict.fromkeys(frame["task"]))
    recipes = list(dict.fromkeys(frame["recipe"]))
    figure, axis = plt.subplots(figsize=(6.5, 1.1 + 0.42 * len(tasks)))
    for number, recipe in enumerate(recipes):
        part = frame[frame["recipe"] == recipe]
        places = part["task"].map(tasks.index) + 0.24 * (number - (len(recipes) - 1) / 2)
        marker = marker_of(recipe)
        axis.plot(part[value], places, marker, color=colour_of(recipe), label=LABELS.get(recipe, recipe), alpha=0.85)
    axis.set(xscale="log", xlabel=label, yticks=range(len(tasks)), yticklabels=tasks)
    axis.set_ylim(len(tasks) - 0.5, -0.5)
    axis.legend(loc="best", fontsize=8)
    return figure


def loss_planes(grid: pd.DataFrame, marks: pd.DataFrame) -> Figure:
    """The joint loss in the plane of θ0, θ1, θ2, a panel a recipe on one colour scale; the merged model is a star.

    Columns of `grid`: recipe, x, y, loss; of `marks`: recipe, name, x, y.
    """
    recipes = list(dict.fromkeys(grid["recipe"]))
    figure, axes = plt.subplots(1, len(recipes), figsize=(4.4 * len(recipes) + 0.8, 3.8), squeeze=False)
    levels = np.geomspace(grid["loss"].min(), grid["loss"].max(), 15)
    for axis, recipe in zip(axes[0], recipes, strict=True):
        table = grid[grid["recipe"] == recipe].pivot(index="y", columns="x", values="loss")
        drawn = axis.contourf(
            table.columns, table.index, table, levels=levels, cmap="mako_r", norm="log", extend="both"
        )
        for _, mark in marks[marks["recipe"] == recipe].iterrows():
            merged = mark["name"] == "merged"
            axis.plot(mark["x"], mark["y"], "*" if merged else "o", color=colour_of(recipe) if merged else "white",
                      markersize=14 if merged else 7, markeredgecolor=INK)  # fmt: skip
            paper = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
            spot = (mark["x"], mark["y"])
            axis.annotate(mark["name"], spot, (6, 6), textcoords="offset points", color=INK, fontsize=9, bbox=paper)
        axis.set(
            title=LABELS.get(recipe, recipe),
            xlabel="along τ1, ‖Δθ‖₂",
            ylabel="across, towards τ2, ‖Δθ‖₂",
            aspect="equal",
        )
        axis.grid(False)
    bar = figure.colorbar(drawn, ax=axes, label="joint loss, nats", shrink=0.85)
    ticks = levels[::3]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    return figure
