"""How it looks: one function a figure, tidy DataFrame in, matplotlib Figure out.

The same colour means the same recipe in every figure: the baseline is grey-blue, SAFT orange.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

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
LABELS = {
    "sgd": "AdamW (sgd)",
    "saft": "SAFT (saft)",
    "sam": "SAM (sam)",
    "asam-kwon": "Kwon's ASAM (asam-kwon)",
    "sgd-matched": "AdamW stopped at SAFT's accuracy",
    "sgd-2x": "AdamW, as many gradients as SAFT",
    "sgd-wd0": "AdamW, weight decay 0",
    "ftts": "tangent (ftts)",
    "ftts+saft": "tangent with SAFT (ftts+saft)",
    "ftlo": "attention only (ftlo)",
    "ftlo+saft": "attention only with SAFT (ftlo+saft)",
    "lora": "LoRA (lora)",
    "lora+saft": "LoRA with SAFT (lora+saft)",
    "average": "average",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare_task_arithmetic": "DARE, task arithmetic",
    "dare_ties": "DARE-TIES",
    "fisher": "Fisher",
    "regmean": "RegMean",
    "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS",
    "tsv_m": "TSV-M",
}
_INK, _QUIET = "#222222", "#8a8a8a"


def _colour(recipe: str) -> str:
    """A recipe's colour; one with changes in its name ("saft@rho=0.1") has that of the recipe it changes."""
    return COLOURS.get(recipe.partition("@")[0], _QUIET)


def _marker(recipe: str) -> str:
    return MARKERS.get(recipe.partition("@")[0], "o")


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


def training_curves(frame: pd.DataFrame) -> Figure:
    """Validation accuracy against steps and gradients taken; columns recipe, step, gradients, validation_accuracy."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axis, x, label in ((axes[0], "step", "optimizer steps"), (axes[1], "gradients", "gradients taken")):
        for recipe, part in frame.groupby("recipe", sort=False):
            axis.plot(
                part[x],
                part["validation_accuracy"],
                color=_colour(recipe),
                marker=_marker(recipe),
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
        axis.axhline(0, color=_QUIET, linewidth=0.8)
        axis.set(title=kind, xlabel="distance from the solution, ‖Δθ‖₂", ylabel="rise of the test loss, nats")
    legend = axes[0][0].get_legend()
    legend.set_title(None)
    for text in legend.get_texts():
        text.set_text(LABELS.get(text.get_text(), text.get_text()))
    return figure


def coefficient_curves(frame: pd.DataFrame) -> Figure:
    """Mean validation accuracy against the merging coefficient.

    Columns recipe, method, scale, keep (may be missing), mean, chosen; of TIES only the chosen `keep` is drawn.
    A ring marks the chosen coefficient.
    """
    methods = list(dict.fromkeys(frame["method"]))
    figure, axes = plt.subplots(1, len(methods), figsize=(4 * len(methods), 3.2), sharey=True, squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        for recipe, part in frame[frame["method"] == method].groupby("recipe", sort=False):
            best = part[part["chosen"]].iloc[0]
            if part["keep"].notna().all():
                part = part[part["keep"] == best["keep"]]
            keep = f", keep {best['keep']:.0%}" if pd.notna(best["keep"]) else ""
            axis.plot(
                part["scale"],
                part["mean"],
                color=_colour(recipe),
                marker=_marker(recipe),
                label=LABELS.get(recipe, recipe) + keep,
            )
            axis.plot(best["scale"], best["mean"], "o", markersize=14, markerfacecolor="none", color=_INK)
        axis.set(title=LABELS.get(method, method), xlabel="merging coefficient λ")
        axis.legend(loc="best", fontsize=8)
    axes[0][0].set_ylabel("mean validation accuracy")
    return figure


def merging_comparison(
    absolute: pd.DataFrame, difference: pd.DataFrame, base: str = "sgd", sharp: str = "saft"
) -> Figure:
    """The headline: mean accuracy of every model, base and SAFT, and where they differ task by task.

    Args:
        absolute: columns model, recipe, seed, accuracy (mean over tasks, %); "zero-shot" is there for both recipes.
        difference: sharp − base in points of accuracy, rows models, columns tasks and "mean"; a model without a row has
            no recipe, such as the pre-trained one, or was not made.
        base, sharp: the two recipes.
    """
    absolute = absolute[absolute["recipe"].isin([base, sharp])]
    models = [m for m in dict.fromkeys(absolute["model"]) if m in difference.index or m == "zero-shot"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.4 + 0.44 * len(models)), width_ratios=(1, 1.15))
    for row, model in enumerate(models):
        part = absolute[absolute["model"] == model]
        means = part.groupby("recipe")["accuracy"].mean()
        if model not in difference.index:
            left.plot(means[base], row, "s", color=_QUIET, markersize=8)
            continue
        for recipe, place in ((base, row - 0.14), (sharp, row + 0.14)):
            seeds = part.loc[part["recipe"] == recipe, "accuracy"]
            error = [[seeds.mean() - seeds.min()], [seeds.max() - seeds.mean()]] if len(seeds) > 1 else None
            left.errorbar(seeds.mean(), place, xerr=error, fmt=_marker(recipe), color=_colour(recipe), markersize=7)
        gap = f"{difference.loc[model, 'mean']:+.1f}"
        left.annotate(gap, (max(means), row), (10, 0), textcoords="offset points", va="center", color=_INK)
    left.set(
        yticks=range(len(models)),
        yticklabels=[LABELS.get(m, m) for m in models],
        xlabel="mean test accuracy over tasks, %",
    )
    left.set_ylim(len(models) - 0.4, -0.6)
    left.margins(x=0.12)
    left.set_title("accuracy, and the difference in points")
    handles = [
        plt.Line2D([], [], marker=_marker(r), color=_colour(r), linestyle="", label=LABELS.get(r, r))
        for r in (base, sharp)
    ]
    left.legend(handles=handles, loc="upper right", fontsize=8)
    reach = max(1.0, float(np.abs(difference.to_numpy()).max()))
    sns.heatmap(
        difference.rename(index=LABELS), annot=True, fmt="+.1f", cmap="PuOr_r", center=0, vmin=-reach, vmax=reach,
        ax=right, cbar=False, linewidths=1, annot_kws={"fontsize": 9},
    )  # fmt: skip
    right.set(title=f"{sharp} − {base} by task, points of accuracy", xlabel="", ylabel="")
    right.tick_params(length=0, labelrotation=0)
    right.grid(False)
    return figure


def forest(frame: pd.DataFrame, *, base: str = "sgd", overall: str = "all", cost: pd.Series | None = None) -> Figure:
    """Differences from the recipe `base` with their intervals, a block of rows for each recipe.

    Args:
        frame: columns recipe, group, mean, low, high, in points of accuracy; the group called `overall` is drawn as a
            bold diamond, the others as small markers of their own, named in the legend.
        cost: recipe -> training time as a multiple of the base's; drawn in a panel of its own.
    """
    recipes = list(dict.fromkeys(frame["recipe"]))
    groups = [group for group in dict.fromkeys(frame["group"]) if group != overall]
    panels = 1 if cost is None else 2
    figure, axes = plt.subplots(
        1, panels, figsize=(7.5 + 2.2 * (panels - 1), 1.3 + 0.62 * len(recipes)), sharey=True, squeeze=False,
        width_ratios=(1, 0.3)[:panels],
    )  # fmt: skip
    left = axes[0][0]
    offsets = np.linspace(0.02, 0.36, len(groups)) if len(groups) > 1 else np.array([0.2])
    for row, recipe in enumerate(recipes):
        colour = _colour(recipe)
        for _, line in frame[frame["recipe"] == recipe].iterrows():
            bold = line["group"] == overall
            place = row - 0.2 if bold else row + offsets[groups.index(line["group"])]
            marker, size = ("D", 8) if bold else ("os^vP*"[groups.index(line["group"]) % 6], 4.5)
            left.plot([line["low"], line["high"]], [place, place], color=colour, linewidth=2.4 if bold else 1)
            left.plot(line["mean"], place, marker, color=colour, markersize=size, alpha=1 if bold else 0.75)
            if bold:
                text = f"{line['mean']:+.1f}"
                left.annotate(text, (line["high"], place), (6, 0), textcoords="offset points", va="center", color=_INK)
    left.axvline(0, color=_QUIET, linewidth=1)
    left.set(yticks=range(len(recipes)), yticklabels=[LABELS.get(recipe, recipe) for recipe in recipes])
    left.set_ylim(len(recipes) - 0.45, -0.55)
    left.set_xlabel(f"difference from {LABELS.get(base, base)}, points of accuracy")
    left.grid(axis="y", visible=False)
    shapes = [(overall, "D", 8)] if overall in set(frame["group"]) else []
    shapes += [(LABELS.get(group, group), "os^vP*"[i % 6], 4.5) for i, group in enumerate(groups)]
    handles = [plt.Line2D([], [], marker=m, color=_QUIET, linestyle="", markersize=z, label=n) for n, m, z in shapes]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8)
    if cost is not None:
        right = axes[0][1]
        for row, recipe in enumerate(recipes):
            colour = _colour(recipe)
            right.barh(row, cost[recipe], height=0.45, color=colour)
            right.annotate(f"{cost[recipe]:.1f}×", (cost[recipe], row), (4, 0), textcoords="offset points", va="center")
        right.axvline(1, color=_QUIET, linewidth=1)
        right.set_xlabel("training time, × baseline")
        right.margins(x=0.2)
        right.grid(axis="y", visible=False)
    return figure


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
            axis.plot(mean.index, mean, color=_colour(recipe), marker=_marker(recipe), label=LABELS.get(recipe, recipe))
            axis.fill_between(mean.index, mean - spread, mean + spread, color=_colour(recipe), alpha=0.15, linewidth=0)
        axis.set(xlabel="transformer block", ylabel=label, xticks=sorted(frame["block"].unique()))
    axes[1].axhline(1, color=_QUIET, linewidth=0.8)
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
                    mean.index, mean, color=_colour(recipe), marker=_marker(recipe), label=LABELS.get(recipe, recipe)
                )
                axis.fill_between(
                    mean.index, grouped.min(), grouped.max(), color=_colour(recipe), alpha=0.15, linewidth=0
                )
        axes[0][column].set_title(pair, fontsize=10)
        axes[1][column].axhline(0, color=_QUIET, linewidth=0.8)
        axes[1][column].set_xlabel(f"weight α of {pair.split(', ')[0]}")
    axes[0][0].set_ylabel("joint loss L, nats")
    axes[1][0].set_ylabel("gap δ(α), nats")
    axes[0][0].legend(loc="best", fontsize=8)
    return figure


def sharpness_by_task(frame: pd.DataFrame, value: str, label: str) -> Figure:
    """One number a task and recipe on a logarithmic axis; columns recipe, task and `value`; dots are seeds."""
    tasks = list(dict.fromkeys(frame["task"]))
    recipes = list(dict.fromkeys(frame["recipe"]))
    figure, axis = plt.subplots(figsize=(6.5, 1.1 + 0.42 * len(tasks)))
    for number, recipe in enumerate(recipes):
        part = frame[frame["recipe"] == recipe]
        places = part["task"].map(tasks.index) + 0.24 * (number - (len(recipes) - 1) / 2)
        marker = _marker(recipe)
        axis.plot(part[value], places, marker, color=_colour(recipe), label=LABELS.get(recipe, recipe), alpha=0.85)
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
            axis.plot(mark["x"], mark["y"], "*" if merged else "o", color=_colour(recipe) if merged else "white",
                      markersize=14 if merged else 7, markeredgecolor=_INK)  # fmt: skip
            paper = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
            spot = (mark["x"], mark["y"])
            axis.annotate(mark["name"], spot, (6, 6), textcoords="offset points", color=_INK, fontsize=9, bbox=paper)
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


def task_plane(frame: pd.DataFrame) -> Figure:
    """Accuracy of θ0 + a τ1 + b τ2 over a and b: a heat map a task, and one of their mean with a star at its best.

    Columns a, b, task, accuracy (0 to 1). The first task's vector lies along a, the second's along b.
    """
    tasks = list(dict.fromkeys(frame["task"]))
    tables = [part.pivot(index="b", columns="a", values="accuracy") for _, part in frame.groupby("task", sort=False)]
    tables.append(sum(tables) / len(tables))
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.5), sharey=True)
    for axis, table, title in zip(axes, tables, [*tasks, "mean of both"], strict=True):
        step_a, step_b = table.columns[1] - table.columns[0], table.index[1] - table.index[0]
        extent = (
            table.columns[0] - step_a / 2, table.columns[-1] + step_a / 2,
            table.index[0] - step_b / 2, table.index[-1] + step_b / 2,
        )  # fmt: skip
        shown = axis.imshow(100 * table, origin="lower", extent=extent, cmap="viridis", vmin=0, vmax=100)
        for place, name in (((0, 0), "θ0"), ((1, 0), f"{tasks[0]} expert"), ((0, 1), f"{tasks[1]} expert")):
            axis.plot(*place, "o", color="white", markeredgecolor=_INK, markersize=7)
            right = place[0] > 0  # there the label goes to the left
            axis.annotate(
                name, place, (-6 if right else 6, 7), textcoords="offset points", ha="right" if right else "left",
                color="white", fontsize=9, fontweight="bold",
            )  # fmt: skip
        axis.set(title=title, xlabel=f"a, share of τ of {tasks[0]}")
        axis.grid(False)
    best = tables[-1].stack().idxmax()
    axes[-1].plot(best[1], best[0], "*", color="white", markeredgecolor=_INK, markersize=16)
    axes[0].set_ylabel(f"b, share of τ of {tasks[1]}")
    figure.colorbar(shown, ax=axes[-1], label="test accuracy, %", shrink=0.9)
    return figure


def interference(deltas: Sequence[Tensor], kept: Sequence[Tensor], names: Sequence[str]) -> Figure:
    """One patch of a weight matrix in every task vector: all entries above, below those that trimming keeps; and last
    how many tasks share the majority's sign, grey where fewer than two tasks have an entry.

    Args:
        deltas, kept: matrices of one shape, one a task. names: the tasks.
    """
    figure, axes = plt.subplots(2, len(names) + 1, figsize=(1.55 * (len(names) + 1), 3.6))
    limit = max(float(delta.abs().max()) for delta in deltas)
    for row, matrices, label in zip(axes, (deltas, kept), ("all entries", "the largest"), strict=True):
        for axis, matrix in zip(row, matrices, strict=False):
            axis.imshow(matrix.numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
        signs = sum(matrix.sign() for matrix in matrices).abs()
        some = sum(matrix.sign().abs() for matrix in matrices)
        shares = (0.5 + 0.5 * signs / some.clamp(min=1)).where(some > 1, torch.nan)
        row[-1].set_facecolor("#d9d9d9")
        shown = row[-1].imshow(shares.numpy(), cmap="Greens", vmin=0.5, vmax=1)
        row[0].set_ylabel(label, fontsize=10)
    for axis, name in zip(axes[0], [*names, "agreement"], strict=True):
        axis.set_title(name, fontsize=10, fontweight="normal", loc="center")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    figure.colorbar(shown, ax=axes[:, -1], ticks=[0.5, 1], shrink=0.8, format=lambda x, _: f"{x:.0%}")
    return figure


EVERY_SPACE = "the same in all"


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
            filled = {"markerfacecolor": _colour(recipe) if space != "weights" else "none"}
            axis.errorbar(
                means, places, xerr=[means - low, high - means], fmt="os^D"[number % 4], color=_colour(recipe),
                label=space, markersize=6.5, linewidth=1, **filled,
            )  # fmt: skip
        axis.axvline(individual[recipe], color=_QUIET, linestyle="--", linewidth=1)
        axis.annotate("own models", (individual[recipe], -0.45), (-4, 0), textcoords="offset points", fontsize=8,
                      ha="right", va="center", color=_QUIET)  # fmt: skip
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
            means, places, xerr=[means - low, high - means], fmt=_marker(recipe), color=_colour(recipe), markersize=6.5,
            label=LABELS.get(recipe, recipe), linewidth=1,
        )  # fmt: skip
    names = [LABELS.get(model, model) + (f", {space}" if space else "") for model, space in rows]
    axis.set(yticks=range(len(rows)), yticklabels=names, xlabel="Hits@1 over all labels, %")
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.legend(loc="best", fontsize=8)
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
            colour = _UPDATES.get(updates, _QUIET)
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
        axis.axvline(chance, color=_QUIET, linestyle="--", linewidth=1)
        axis.annotate(
            "chance", (chance, -0.45), (4, 0), textcoords="offset points", fontsize=8, color=_QUIET, va="center"
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
            axis.plot(mean.index, mean, style, color=_colour(recipe), label=label)
        axis.set(title=LABELS.get(recipe, recipe), xlabel="index of the singular value", yscale="log")
    axes[0][0].set_ylabel("singular value, mean of matrices")
    axes[0][0].legend(loc="best", fontsize=8)
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
                color=colours.get(kind, _QUIET), label=kind, markersize=5.5, linewidth=1.2,
            )  # fmt: skip
        axis.axvline(0, color=_QUIET, linewidth=0.8)
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
    right.axhline(0, color=_QUIET, linewidth=0.8)
    right.set(xticks=sorted(means["tasks"].unique()), xlabel="number of tasks merged")
    right.set_ylabel("KnOTS minus weights, points")
    return figure
