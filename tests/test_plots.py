"""Every figure draws from a tidy frame, with the recipes' own colours and labelled axes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import same_color

from saftnb import plots


@pytest.fixture(autouse=True)
def style():
    with plt.style.context(plots.STYLE):
        yield
    plt.close("all")


def test_pictures_show_one_axis_each():
    figure = plots.pictures(torch.zeros(3, 3, 28, 28, dtype=torch.uint8), ["a", "b", "c"])
    assert [axis.get_title(loc="center") for axis in figure.axes] == ["a", "b", "c"]


def test_training_curves_use_the_recipes_colours():
    rows = [
        {"recipe": r, "step": s, "gradients": s, "validation_accuracy": 0.5} for r in ("sgd", "saft") for s in (1, 2)
    ]
    figure = plots.training_curves(pd.DataFrame(rows))
    assert [axis.get_xlabel() for axis in figure.axes] == ["optimizer steps", "gradients taken"]
    assert all(
        same_color(line.get_color(), plots.COLOURS[r])
        for line, r in zip(figure.axes[0].lines, ("sgd", "saft"), strict=True)
    )


def test_loss_slices_have_a_panel_a_direction_and_a_band_for_several_draws():
    rows = [
        {"recipe": r, "direction": d, "draw": draw, "distance": t, "rise": t * (draw + 1)}
        for r in ("sgd", "saft") for d, n in (("random", 2), ("SAM ascent", 1)) for draw in range(n) for t in (0, 1)
    ]  # fmt: skip
    figure = plots.loss_slices(pd.DataFrame(rows))
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["random", "SAM ascent"]
    assert len(figure.axes[0].collections) == 2
    assert len(figure.axes[1].collections) == 0


def test_coefficient_curves_draw_the_chosen_keep_only():
    rows = [
        {"recipe": r, "method": "ties", "scale": s, "keep": k, "mean": s * k, "chosen": (s, k) == (2, 0.4)}
        for r in ("sgd", "saft") for s in (1, 2) for k in (0.2, 0.4)
    ]  # fmt: skip
    figure = plots.coefficient_curves(pd.DataFrame(rows))
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.4, 0.8]
    assert "keep 40%" in figure.axes[0].get_legend().get_texts()[0].get_text()


def test_merging_comparison_shows_differences_in_points_from_worst_to_best():
    rows = [
        {"model": m, "recipe": r, "seed": seed, "digits": a, "mean": a - 1}
        for m, plain in (("individual", 90.0), ("ties", 60.0), ("average", 50.0), ("zero-shot", 40.0), ("fisher", 55.0))
        for r, a in (("sgd", plain), ("saft", plain + 2.5 * (m != "zero-shot")))
        for seed in (0, 1)
        if (m, r) != ("fisher", "saft")  # one recipe lacks it: it is left out
    ]
    figure = plots.merging_comparison(pd.DataFrame(rows).set_index(["model", "recipe", "seed"]))
    left, right = figure.axes
    names = ["zero-shot", "average", "TIES", "individual"]
    assert [label.get_text() for label in left.get_yticklabels()] == names
    assert [text.get_text() for text in left.texts] == ["+2.5"] * 3
    assert [text.get_text() for text in right.texts] == ["+2.5"] * 6


def test_the_forest_has_a_row_a_group_and_names_the_overall_difference():
    rows = [
        {"recipe": r, "group": g, "mean": m, "low": m - 1, "high": m + 1}
        for r, m in (("saft", 1.25), ("sgd-2x", -2.0), ("saft@rho=0.1", 0.5))
        for g in ("all", "pocket-0", "pocket-1")
    ]
    figure = plots.forest(pd.DataFrame(rows), cost=pd.Series({"saft": 2.0, "sgd-2x": 1.9, "saft@rho=0.1": 2.1}))
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["+1.2", "-2.0", "+0.5"]
    assert [text.get_text() for text in right.texts] == ["2.0×", "1.9×", "2.1×"]
    spans = [line for line in left.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] != line.get_xdata()[1]]
    assert [list(line.get_xdata()) for line in spans[:3]] == [[0.25, 2.25]] * 3
    assert all(same_color(line.get_color(), plots.COLOURS["saft"]) for line in [*spans[:3], *spans[6:]])
    assert [label.get_text() for label in left.get_yticklabels()][:2] == [plots.LABELS["saft"], plots.LABELS["sgd-2x"]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all", "pocket-0", "pocket-1"]
    assert len(plots.forest(pd.DataFrame(rows)).axes) == 1


def test_every_recipe_has_a_colour_of_its_own_and_a_name():
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)
    assert plots.COLOURS.keys() <= plots.LABELS.keys()


def test_the_plane_of_two_tasks_has_a_map_for_each_and_a_star_at_the_best_mean():
    grid = [0.0, 0.5, 1.0]
    frame = pd.DataFrame(
        {"a": a, "b": b, "task": task, "accuracy": 1 - (a - 0.5) ** 2 - (b - (task == "y")) ** 2}
        for a in grid
        for b in grid
        for task in ("x", "y")
    )
    axes = plots.task_plane(frame).axes
    assert [axis.get_title(loc="left") or axis.get_title() for axis in axes[:3]] == ["x", "y", "mean of both"]
    stars = [line for axis in axes[:3] for line in axis.lines if line.get_marker() == "*"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in stars] == [(0.5, 0.5)]


def test_interference_shows_how_many_tasks_share_a_sign():
    one, two = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[1.0, -2.0], [3.0, -1.0]])
    figure = plots.interference([one, two], [one, two], ["x", "y"])
    shares = figure.axes[2].images[0].get_array()
    assert shares[0, 0] == shares[1, 1] == 1.0
    assert shares[0, 1] == 0.5
    assert np.ma.is_masked(shares[1, 0]) or np.isnan(shares[1, 0])  # one task alone agrees with nobody
