"""Training curves, and how sharp the loss is around a model."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from saftnb.plots.style import INK, LABELS, QUIET, colour_of, mako, marker_of


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
    """Rise of the loss along lines, a panel a direction with its own scale; thin lines, and a thick one for their mean.

    Columns recipe, direction, line (what tells two lines of one direction apart), distance, rise.
    """
    kinds = list(dict.fromkeys(frame["direction"]))
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.7 * len(kinds), 3.2), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        axis.axhline(0, color=QUIET, linewidth=0.8)
        for recipe, part in frame[frame["direction"] == kind].groupby("recipe", sort=False):
            lines, colour = part.pivot(index="distance", columns="line", values="rise"), colour_of(recipe)
            axis.plot(lines, color=colour, alpha=0.4, linewidth=0.9)
            axis.plot(lines.mean(axis="columns"), color=colour, linewidth=2.8, label=LABELS.get(recipe, recipe))
        axis.set(title=kind, xlabel="distance from the solution, ‖Δθ‖₂")
    axes[0][0].set_ylabel("rise of the test loss, nats")
    axes[0][0].legend(loc="upper left")
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
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set_ylim(len(tasks) - 0.5, -0.5)
    axis.legend(loc="best", fontsize=8)
    return figure


def loss_planes(grid: pd.DataFrame, marks: pd.DataFrame, scale: float | None = None) -> Figure:
    """The joint loss in the plane of θ0, θ1, θ2, a panel a recipe on one colour scale.

    The star is the merged model, the dashed line every θ0 + λ(τ1 + τ2), the cross the lowest point of the grid.

    Args:
        grid: columns recipe, x, y, loss. marks: columns recipe, name, x, y. scale: the merged model's λ, to name it.
    """
    recipes = list(dict.fromkeys(grid["recipe"]))
    figure, axes = plt.subplots(1, len(recipes), figsize=(4.4 * len(recipes) + 0.8, 3.9), squeeze=False)
    levels = np.geomspace(grid["loss"].min(), grid["loss"].max(), 15)
    for axis, recipe in zip(axes[0], recipes, strict=True):
        part = grid[grid["recipe"] == recipe]
        table = part.pivot(index="y", columns="x", values="loss")
        drawn = axis.contourf(table.columns, table.index, table, levels=levels, cmap=mako(), norm="log", extend="both")
        spots = marks[marks["recipe"] == recipe].set_index("name")[["x", "y"]]
        end = spots.drop(index=["θ0", "merged"]).sum()  # λ = 1
        axis.plot([0, end["x"]], [0, end["y"]], "--", color=INK, linewidth=1, scalex=False, scaley=False)
        lowest = part.loc[part["loss"].idxmin()]
        axis.plot(lowest["x"], lowest["y"], "x", color=INK, markersize=9, markeredgewidth=2.2)
        for name, (x, y) in spots.iterrows():
            merged = name == "merged"
            axis.plot(x, y, "*" if merged else "o", color=colour_of(recipe) if merged else "white",
                      markersize=15 if merged else 7, markeredgecolor=INK)  # fmt: skip
        named = {name: tuple(spot) for name, spot in spots.iterrows()} | {"lowest": (lowest["x"], lowest["y"])}
        for name, spot in named.items():
            text = f"λ = {scale:g}" if name == "merged" and scale is not None else name
            offset = (9, -9) if name in ("merged", "lowest") else (-16, -12) if name == "θ0" else (6, 7)
            axis.annotate(text, spot, offset, textcoords="offset points", color=INK, fontsize=9,
                          bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1})  # fmt: skip
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
