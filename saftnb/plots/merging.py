"""Merged models: by coefficient, method and recipe, and entry by entry."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from saftnb.plots.style import INK, LABELS, QUIET, colour_of, marker_of


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
                color=colour_of(recipe),
                marker=marker_of(recipe),
                label=LABELS.get(recipe, recipe) + keep,
            )
            axis.plot(best["scale"], best["mean"], "o", markersize=14, markerfacecolor="none", color=INK)
        axis.set(title=LABELS.get(method, method), xlabel="merging coefficient λ")
        axis.legend(loc="best", fontsize=8)
    axes[0][0].set_ylabel("mean validation accuracy")
    return figure


def merging_comparison(scores: pd.DataFrame, base: str = "sgd", sharp: str | None = "saft") -> Figure:
    """The headline: mean accuracy of every model, base and SAFT, from worst to best, and where they differ by task.

    Args:
        scores: accuracy in %, index (model, recipe, seed); a column a task, and "mean".
        base, sharp: the two recipes; models that one of them lacks are left out. Bars span the seeds. Without `sharp`
            the base alone, its accuracies by task on the right.
    """
    import seaborn as sns  # takes seconds

    scores = scores.sort_index()
    if sharp is None:
        return _one_recipe(scores.xs(base, level="recipe"), base)
    means = scores.groupby(["model", "recipe"]).mean().unstack("recipe").swaplevel(axis=1)
    order = means[base]["mean"].where(means[sharp]["mean"].notna()).dropna().sort_values().index
    ends = [model for model in ("zero-shot",) if model in order], [m for m in ("ensemble", "individual") if m in order]
    models = [*ends[0], *(model for model in order if model not in ends[0] + ends[1]), *ends[1]]
    difference = (means[sharp] - means[base]).loc[[model for model in models if model != "zero-shot"], scores.columns]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.4 + 0.44 * len(models)), width_ratios=(1, 1.15))
    for row, model in enumerate(models):
        if model not in difference.index:
            left.plot(means.loc[model, (base, "mean")], row, "s", color=QUIET, markersize=8)
            continue
        for recipe, place in ((base, row - 0.14), (sharp, row + 0.14)):
            seeds = scores.loc[(model, recipe), "mean"]
            error = [[seeds.mean() - seeds.min()], [seeds.max() - seeds.mean()]] if len(seeds) > 1 else None
            left.errorbar(seeds.mean(), place, xerr=error, fmt=marker_of(recipe), color=colour_of(recipe), markersize=7)
        gap = f"{difference.loc[model, 'mean']:+.1f}".replace("-", "−")
        reach = max(means.loc[model, (recipe, "mean")] for recipe in (base, sharp))
        left.annotate(gap, (reach, row), (10, 0), textcoords="offset points", va="center", color=INK)
    names = [LABELS.get(model, model) for model in models]
    left.set(yticks=range(len(models)), yticklabels=names, xlabel="mean test accuracy over tasks, %")
    left.set_ylim(len(models) - 0.4, -0.6)
    left.margins(x=0.12)
    left.set_title("accuracy, and the difference in points")
    handles = [
        plt.Line2D([], [], marker=marker_of(r), color=colour_of(r), linestyle="", label=LABELS.get(r, r))
        for r in (base, sharp)
    ]
    left.legend(handles=handles, loc="upper right", fontsize=8)
    limit = max(1.0, float(np.abs(difference.to_numpy()).max()))
    texts = difference.map(lambda value: f"{value:+.1f}".replace("-", "−"))
    sns.heatmap(
        difference.rename(index=LABELS), annot=texts, fmt="", cmap="PuOr_r", center=0, vmin=-limit, vmax=limit,
        ax=right, cbar=False, linewidths=1, annot_kws={"fontsize": 9},
    )  # fmt: skip
    right.set(title=f"{LABELS.get(sharp, sharp)} minus {LABELS.get(base, base)}, points, by task", xlabel="", ylabel="")
    right.tick_params(length=0, labelrotation=0)
    right.grid(False)
    return figure


def _one_recipe(scores: pd.DataFrame, recipe: str) -> Figure:
    import seaborn as sns

    means = scores.groupby("model").mean()
    ends = [model for model in ("ensemble", "individual") if model in means.index]
    merged = means.drop(index=["zero-shot", *ends], errors="ignore").sort_values("mean")
    table = pd.concat([means.loc[[m for m in ("zero-shot",) if m in means.index]], merged, means.loc[ends]])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.4 + 0.44 * len(table)), width_ratios=(1, 1.15))
    left.plot(table["mean"], range(len(table)), marker_of(recipe), color=colour_of(recipe), markersize=8)
    left.set(yticks=range(len(table)), yticklabels=[LABELS.get(model, model) for model in table.index])
    left.set(xlabel="mean test accuracy over tasks, %", title=LABELS.get(recipe, recipe))
    left.set_ylim(len(table) - 0.4, -0.6)
    shown = table.rename(index=LABELS)
    sns.heatmap(shown, annot=True, fmt=".1f", cmap="viridis", vmin=0, vmax=100, ax=right, cbar=False, linewidths=1)
    right.set(title="by task, %", xlabel="", ylabel="")
    right.tick_params(length=0, labelrotation=0)
    right.grid(False)
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
            axis.plot(*place, "o", color="white", markeredgecolor=INK, markersize=7)
            right = place[0] > 0  # there the label goes to the left
            axis.annotate(
                name, place, (-6 if right else 6, 7), textcoords="offset points", ha="right" if right else "left",
                color="white", fontsize=9, fontweight="bold",
            )  # fmt: skip
        axis.set(title=title, xlabel=f"a, share of τ of {tasks[0]}")
        axis.grid(False)
    best = tables[-1].stack().idxmax()
    axes[-1].plot(best[1], best[0], "*", color="white", markeredgecolor=INK, markersize=16)
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
            axis.imshow(matrix.numpy(), cmap="PuOr_r", vmin=-limit, vmax=limit)
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
        colour = colour_of(recipe)
        for _, line in frame[frame["recipe"] == recipe].iterrows():
            bold = line["group"] == overall
            place = row - 0.2 if bold else row + offsets[groups.index(line["group"])]
            marker, size = ("D", 8) if bold else ("os^vP*"[groups.index(line["group"]) % 6], 4.5)
            left.plot([line["low"], line["high"]], [place, place], color=colour, linewidth=2.4 if bold else 1)
            left.plot(line["mean"], place, marker, color=colour, markersize=size, alpha=1 if bold else 0.75)
            if bold:
                text = f"{line['mean']:+.1f}"
                left.annotate(text, (line["high"], place), (6, 0), textcoords="offset points", va="center", color=INK)
    left.axvline(0, color=QUIET, linewidth=1)
    left.set(yticks=range(len(recipes)), yticklabels=[LABELS.get(recipe, recipe) for recipe in recipes])
    left.set_ylim(len(recipes) - 0.45, -0.55)
    left.set_xlabel(f"difference from {LABELS.get(base, base)}, points of accuracy")
    left.grid(axis="y", visible=False)
    shapes = [(overall, "D", 8)] if overall in set(frame["group"]) else []
    shapes += [(LABELS.get(group, group), "os^vP*"[i % 6], 4.5) for i, group in enumerate(groups)]
    handles = [plt.Line2D([], [], marker=m, color=QUIET, linestyle="", markersize=z, label=n) for n, m, z in shapes]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8)
    if cost is not None:
        right = axes[0][1]
        for row, recipe in enumerate(recipes):
            colour = colour_of(recipe)
            right.barh(row, cost[recipe], height=0.45, color=colour)
            right.annotate(f"{cost[recipe]:.1f}×", (cost[recipe], row), (4, 0), textcoords="offset points", va="center")
        right.axvline(1, color=QUIET, linewidth=1)
        right.set_xlabel("training time, × baseline")
        right.margins(x=0.2)
        right.grid(axis="y", visible=False)
    return figure


def recovered_shares(frame: pd.DataFrame) -> Figure:
    """The share of the gap between zero-shot and individual that each method recovers, published beside ours.

    Columns: method, published (NaN where there is none), mean, low, high, all in %; drawn from top to bottom.
    """
    figure, axis = plt.subplots(figsize=(7, 1.3 + 0.42 * len(frame)))
    for row, line in enumerate(frame.itertuples()):
        if np.isfinite(line.published):
            axis.plot([line.mean, line.published], [row, row], color=QUIET, linewidth=1, zorder=1)
            axis.plot(line.published, row, "D", color="white", markeredgecolor=INK, markersize=8, zorder=3)
        axis.plot([line.low, line.high], [row, row], color=colour_of("sgd"), linewidth=3, zorder=2)
        axis.plot(line.mean, row, "o", color=colour_of("sgd"), markersize=8, zorder=3)
    axis.set(yticks=range(len(frame)), yticklabels=[LABELS.get(name, name) for name in frame["method"]])
    axis.set(xlim=(min(0, frame["low"].min() - 3), 100), xlabel="share of the gap recovered, %")
    axis.set_ylim(len(frame) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    handles = [
        plt.Line2D([], [], marker="o", color=colour_of("sgd"), linewidth=3, label="pocket, with 95 % interval"),
        plt.Line2D([], [], marker="D", color="white", markeredgecolor=INK, label="published, ViT-B/32, eight tasks"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=9)
    return figure
