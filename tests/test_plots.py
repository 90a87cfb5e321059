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


def test_loss_slices_have_a_panel_a_direction_and_a_thin_line_a_draw():
    rows = [
        {"recipe": r, "direction": d, "line": draw, "distance": t, "rise": t * (draw + 1)}
        for r in ("sgd", "saft") for d, n in (("random", 2), ("SAM ascent", 1)) for draw in range(n) for t in (0, 1)
    ]  # fmt: skip
    figure = plots.loss_slices(pd.DataFrame(rows))
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["random", "SAM ascent"]
    assert [len(axis.lines) for axis in figure.axes] == [1 + 2 * (2 + 1), 1 + 2 * (1 + 1)]  # zero, and the means
    assert list(figure.axes[0].lines[3].get_ydata()) == [0, 1.5]


def test_the_plane_of_losses_marks_the_merged_model_and_the_lowest_point():
    grid = pd.DataFrame(
        {"recipe": "saft", "x": x, "y": y, "loss": 1 + (x - 2) ** 2 + (y - 1) ** 2} for x in range(4) for y in range(4)
    )
    spots = [("θ0", 0, 0), ("one", 3, 0), ("two", 0, 3), ("merged", 0.9, 0.9)]
    marks = pd.DataFrame([("saft", *spot) for spot in spots], columns=["recipe", "name", "x", "y"])
    axis = plots.loss_planes(grid, marks, scale=0.3).axes[0]
    assert [text.get_text() for text in axis.texts] == ["θ0", "one", "two", "λ = 0.3", "lowest"]
    places = {line.get_marker(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines}
    assert places["x"] == (2, 1)
    assert places["*"] == (0.9, 0.9)
    merges = next(line for line in axis.lines if line.get_linestyle() == "--")
    assert list(zip(*merges.get_data(), strict=True)) == [(0, 0), (3, 3)]  # λ from 0 to 1


@pytest.mark.parametrize("seeds", [1, 3])
def test_block_linearity_shows_the_difference_of_the_recipes_and_its_interval_over_several_seeds(seeds):
    rows = [
        {"recipe": r, "seed": s, "pair": p, "block": b, "distance": b + 2 * (r == "saft") + s / 10, "coefficient": 1}
        for r in ("sgd", "saft") for s in range(seeds) for p in ("a, b", "a, c") for b in (1, 2)
    ]  # fmt: skip
    axis = plots.block_linearity(pd.DataFrame(rows)).axes[1]
    dots = [line.get_ydata() for line in axis.lines if line.get_marker() == "."]
    assert [list(dot) for dot in dots] == [pytest.approx([2, 2])] * 2
    assert len(axis.collections) == (2 if seeds > 1 else 0)  # the bars


def test_alignment_shows_two_curves_that_coincide_and_says_so():
    values = {"full": 0.9, "LoRA": 0.2, "LoRA, KnOTS's basis": 0.2}
    rows = [
        {"view": "on rows", "updates": kind, "layer": f"0.attn.{layer}_proj.weight", "cka": value + 0.1 * pair}
        for kind, value in values.items() for layer in "qk" for pair in (0, 1)
    ]  # fmt: skip
    (axis,) = plots.alignment(pd.DataFrame(rows)).axes
    assert [line.get_linestyle() for line in axis.lines] == ["-", "-", "--"]
    assert [text.get_text() for text in axis.texts] == ["LoRA, KnOTS's basis lies on LoRA: linear CKA sees no rotation"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["q", "k"]


def test_alignment_heatmaps_are_symmetric():
    rows = [{"updates": kind, "task_1": "x", "task_2": "y", "cka": 0.5} for kind in ("full", "LoRA")]
    figure = plots.alignment_heatmaps(pd.DataFrame(rows), ["x", "y"])
    for axis, kind in zip(figure.axes[:2], ("full", "LoRA"), strict=True):
        shown = axis.images[0].get_array()
        assert axis.get_title(loc="left") == kind
        assert shown[0, 1] == shown[1, 0] == 0.5


def test_coefficient_curves_draw_the_chosen_keep_only():
    rows = [
        {"recipe": r, "method": "ties", "scale": s, "keep": k, "mean": s * k, "chosen": (s, k) == (2, 0.4)}
        for r in ("sgd", "saft") for s in (1, 2) for k in (0.2, 0.4)
    ]  # fmt: skip
    figure = plots.coefficient_curves(pd.DataFrame(rows))
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.4, 0.8]
    assert "keep 40%" in figure.axes[0].get_legend().get_texts()[0].get_text()


def test_merging_comparison_of_one_recipe_shows_its_accuracies_by_task():
    rows = [
        {"model": model, "recipe": "published:fusionbench", "seed": 0, "a": value, "b": value, "mean": value}
        for model, value in (("individual", 90.0), ("ties", 60.0), ("average", 50.0), ("zero-shot", 40.0))
    ]
    scores = pd.DataFrame(rows).set_index(["model", "recipe", "seed"])
    figure = plots.merging_comparison(scores, "published:fusionbench", None)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["zero-shot", "average", "TIES", "individual"]
    assert left.get_title(loc="left") == "FusionBench's models"
    assert "60.0" in [text.get_text() for text in right.texts]


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


def test_gains_by_case_have_an_interval_where_there_are_seeds():
    index = pd.MultiIndex.from_product([[4, 16], [0, 1, 2]], names=["rank", "seed"])
    gains = pd.Series([1.0, 2.0, 3.0, -1.0, -1.0, -1.0], index=index)
    dots = pd.Series([0.0, 5.0], index=pd.MultiIndex.from_tuples([(4, "x"), (16, "y")], names=["rank", "subset"]))
    left, right = plots.knots_ablations({"all": gains, "one seed": gains.loc[:, :0]}, {"all": dots}).axes
    means = [container.lines[0].get_xydata()[0].tolist() for container in left.containers]
    assert means == [[0, 2.0], [1, -1.0]]
    reach = 4.302653 / 3**0.5  # Student's t of two degrees of freedom, deviation 1
    low, high = (cap.get_ydata()[0] for cap in left.containers[0].lines[1])
    assert (low, high) == pytest.approx((2 - reach, 2 + reach))
    assert all(not container.lines[1] for container in right.containers)
    assert [label.get_text() for label in right.get_xticklabels()] == ["4", "16"]
    assert left.lines[1].get_ydata().tolist() == [0.0, 5.0]


def test_the_joint_task_goes_from_best_to_worst_and_names_the_own_adapters_at_the_edge():
    means = {("own adapter", ""): 70.0, ("ties", "weights"): 40.0, ("ensemble", ""): 45.0, ("ties", "knots"): 42.0,
             ("task_arithmetic", plots.EVERY_SPACE): 44.0}  # fmt: skip
    rows = [(*key, "lora", seed, mean + seed - 0.5) for key, mean in means.items() for seed in (0, 1)]
    hits = pd.DataFrame(rows, columns=["model", "space", "recipe", "seed", "hits"])
    (axis,) = plots.joint_task(hits.set_index(["model", "space", "recipe", "seed"])["hits"]).axes
    names = ["ensemble (no merge)", "task arithmetic, any space", "TIES, KnOTS's basis", "TIES, weights"]
    assert [label.get_text() for label in axis.get_yticklabels()] == names
    assert [text.get_text() for text in axis.texts[:4]] == ["45.0", "44.0", "42.0", "40.0"]
    assert axis.texts[4].get_text() == "own adapters, told the task: 70.0 % →"
    assert axis.get_xlim()[1] < 50
    assert axis.lines[4].get_xdata().tolist() == [41.5, 42.5]  # a bar, then its mark, for each


def test_effects_show_safts_gain_once_and_a_bar_only_where_there_is_an_interval():
    kinds = {"SAFT": 1.0, "space": 2.0, "both": 2.5, "interaction": -0.5}
    rows = [
        {"method": method, "space": space, "effect": kind, "mean": mean, "low": low, "high": high}
        for method, low, high in (("ties", -3.0, 4.0), ("dare_ties", np.nan, np.nan))
        for space in ("knots", "core") for kind, mean in kinds.items()
    ]  # fmt: skip
    left, right = plots.effects(pd.DataFrame(rows)).axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names[:3] == ["SAFT alone", "KnOTS's basis alone", "Core Space alone"]
    assert names[-1] == "interaction with Core Space"
    for axis in (left, right):
        assert [text.get_text() for text in axis.texts] == ["+1.0", "+2.0", "+2.0", "+2.5", "+2.5", "−0.5", "−0.5"]
    assert list(left.lines[1].get_xdata()) == [-3.0, 4.0]
    assert np.isnan(right.lines[1].get_xdata()).all()


def test_a_disentanglement_map_names_the_mean_of_the_box_and_of_its_quarter():
    rows = [
        {
            "pair": "digits, fonts",
            "recipe": r,
            "alpha_1": a,
            "alpha_2": b,
            "xi": 0.1 * (a > 0) * (b > 0) + 0.2 * (b > 1),
        }
        for r in ("sgd", "saft")
        for a in (-2, -1, 0, 1, 2)
        for b in (-2, -1, 0, 1, 2)
    ]
    left, right, _ = plots.disentanglement_maps(pd.DataFrame(rows)).axes
    assert left.get_title(loc="left") == "mean ξ 0.011 in the box, 0.100 in its quarter"  # one cell of nine
    assert [axis.texts[0].get_text() for axis in (left, right)] == ["AdamW (sgd)", "SAFT (saft)"]
    coarse = pd.DataFrame([row for row in rows if row["alpha_1"] != 1])
    assert plots.disentanglement_maps(coarse).axes[0].get_title(loc="left") == "mean ξ 0.000 in the box"


def test_joint_losses_name_the_expert_at_each_end():
    rows = [
        {"pair": pair, "recipe": r, "seed": 0, "alpha": a, "loss": 1 + a, "gap": -a * (1 - a)}
        for pair in ("digits, fonts", "mnist, patterns")
        for r in ("sgd", "saft")
        for a in (0.0, 0.5, 1.0)
    ]
    figure = plots.joint_losses(pd.DataFrame(rows))
    figure.canvas.draw()
    for axis, (first, second) in zip(figure.axes[2:], (("digits", "fonts"), ("mnist", "patterns")), strict=True):
        ticks = [label.get_text() for label in axis.get_xticklabels()]
        assert ticks == [f"0\n{second}", "0.5\nhalf way", f"1\n{first}"]
        assert axis.get_ylim()[1] > 0.02  # room for the words on barriers


def test_learned_merges_are_a_line_a_kind_over_the_pools_in_their_order():
    rows = [
        {"learned": kind, "pictures": pictures, "seed": seed, "accuracy": base + number + seed}
        for kind, base in (("channel", 60), ("weights", 50))
        for number, pictures in enumerate((4, 64, "all"))
        for seed in (0, 2)
    ]
    axis = plots.learned_by_pictures(
        pd.DataFrame(rows), {"individual": 90.0, "regmean": 56.4, "average": 40.0, "tsv_m": 56.5}
    ).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["4", "64", "all"]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert drawn["each task and channel"] == [61, 62, 63]
    assert drawn["each weight: the control"] == [51, 52, 53]
    assert [text.get_text() for text in axis.texts] == ["average 40.0", "RegMean 56.4, TSV-M 56.5", "individual 90.0"]
    bands = [collection.get_paths()[0].vertices[:, 1] for collection in axis.collections]
    assert [(band.min(), band.max()) for band in bands] == [(60, 64), (50, 54)]


def test_learning_curves_start_at_the_whole_loss():
    rows = [
        {"learning": name, "step": step, "loss": loss, "validation_accuracy": 0.5}
        for name in ("distillation", "entropy, another setting") for step, loss in ((0, 4.0), (10, 1.0))
    ]  # fmt: skip
    figure = plots.learning_curves(pd.DataFrame(rows))
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[1, 0.25]] * 2
    assert figure.axes[0].get_ylim()[0] == 0
    assert [list(line.get_ydata()) for line in figure.axes[1].lines] == [[50, 50]] * 2


def test_the_map_of_coefficients_goes_from_input_to_output():
    names = ["proj", "class_embedding", "transformer.resblocks.1.attn.q_proj.weight",
             "transformer.resblocks.1.attn.q_proj.bias", "transformer.resblocks.1.ln_1.weight",
             "transformer.resblocks.1.mlp.c_fc.weight", "ln_post.weight"]  # fmt: skip
    table = pd.DataFrame({"mnist": [0.1, 0.2, 0.3, 0.5, 0.0, -0.1, 0.3]}, index=names)
    axis = plots.coefficient_map(table, 0.2).axes[0]
    rows = [label.get_text() for label in axis.get_yticklabels()]
    assert rows == ["input", "block 2, attention", "block 2, norms", "block 2, MLP", "output"]
    assert [text.get_text() for text in axis.texts] == ["0.20", "0.40", "0.00", "−0.10", "0.20"]
    low, high = axis.images[0].get_clim()
    assert (low + high) / 2 == pytest.approx(0.2)


def test_block_linearity_of_one_recipe_has_no_difference_to_show():
    rows = [
        {"recipe": "sgd", "seed": 0, "pair": pair, "block": block, "distance": 0.1 * block, "coefficient": 1.0}
        for pair in ("a, b", "a, c") for block in (1, 2)
    ]  # fmt: skip
    titles = [axis.get_title(loc="left") for axis in plots.block_linearity(pd.DataFrame(rows)).axes]
    assert titles == ["cosine distance", "coefficient"]
