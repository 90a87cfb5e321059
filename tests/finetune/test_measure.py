"""The work of a training, counted and timed."""

import dataclasses
import re
from pathlib import Path

import pytest

from saftnb.backbones import load_pocket_backbone
from saftnb.batch import load_grid
from saftnb.batch.plan import Work, measured_hours, merged_per_second
from saftnb.finetune import measure, recipe
from saftnb.finetune.measure import flops_per_second, gradient_flops, merged_entries, pictures_per_second
from saftnb.suites.nli6 import NLI6_BACKBONE

ROOT = Path(__file__).parents[2]


def by_hand(width, layers, patches, side, patch, embed):
    """Forward operations of one picture: two for each multiplication of a weight matrix or of the attention."""
    tokens = patches + 1
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    return 2 * (layers * block + patches * 3 * patch**2 * width + width * embed)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("ViT-B-32", (768, 12, 49, 224, 32, 512)),
        ("ViT-L-14", (1024, 24, 256, 224, 14, 768)),
    ],
)
def test_a_gradient_takes_three_times_the_forward_pass(name, shape):
    full, forward = gradient_flops(name), by_hand(*shape)
    assert full / forward == pytest.approx(3, rel=0.02)
    assert gradient_flops(name, "attention") < full < gradient_flops(name, "tangent") < 2 * full


def test_a_measured_step_gives_a_speed(monkeypatch):
    """Half the clock's seconds, twice the speed: only the time of one step counts."""
    for plan in (recipe("sgd", "pocket"), recipe("ftts+saft", "pocket")):
        assert 1e8 < flops_per_second("pocket-0", plan, device="cpu") < 1e13
    ticks = iter([0.0, 9.0, 10.0, 12.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(measure.Training, "step", lambda self: 0.0)
    speed = flops_per_second("pocket-0", recipe("saft", "pocket"), device="cpu")
    assert speed == gradient_flops("pocket-0") * measure.CPU_PICTURES * 2 / 2.0


def test_a_grid_says_its_hours(tmp_path, monkeypatch):
    (tmp_path / "g.yaml").write_text(
        """
defaults: {suite: pocket}
runs:
  - {notebook: appendix/finetune_task, gradients: 100, sweep: {recipe: [sgd, ftts]}}
  - {notebook: 05_cross_task_linearity, gradients: 50, parameters: {backbone: pocket-1}}
  - {notebook: 03_evidence, budget: 1800}
"""
    )
    grid = load_grid(tmp_path / "g.yaml", tmp_path / "runs")
    work = 64 * (
        100 * (gradient_flops("pocket-0") + gradient_flops("pocket-0", "tangent")) + 50 * gradient_flops("pocket-1")
    )
    monkeypatch.setattr(measure, "flops_per_second", lambda backbone, plan: work / (1.5 * 3600))
    said = []
    todo = {run.id for run in grid.runs}
    assert measured_hours(grid, todo, said.append) in (
        ", about 2 CPU hours at that speed",
        ", about 2 GPU hours at that speed",
    )
    assert "a step of pocket-0 with sgd does" in said[0]
    assert said[1:] == ["bound by search: 1 × 05_cross_task_linearity", "bound by step: 2 × finetune_task"]
    assert measured_hours(grid, {grid.runs[-1].id}, said.append) == ""
    assert len(said) == 3


def test_what_bounds_a_run():
    """Steps, pictures or merges, whichever takes longest; pictures are drawn beside the steps."""
    work = Work(training=True, flops=1e12, pictures=1000, crop=0.9, entries=0, cpus=4)
    rate = {0.9: 10.0, 0.0: 1000.0}
    assert work.seconds(1e11, rate.get, None) == {"feed": 25.0}  # 1000 pictures, 4 processes of 10 a second
    assert work.seconds(1e10, rate.get, None) == {"step": 100.0}
    assert dataclasses.replace(work, crop=0.0).seconds(1e11, rate.get, None) == {"step": 10.0}
    later = dataclasses.replace(work, training=False, pictures=0, entries=8e9)
    assert later.seconds(1e11, rate.get, lambda cpus: 1e8 * cpus) == {"search": 10.0, "merging": 20.0}


def test_the_entries_of_a_merge_are_those_of_the_models():
    tower = load_pocket_backbone("pocket-0").image_tower()
    assert merged_entries("pocket-0") == sum(p.numel() for p in tower.parameters())
    assert merged_entries("ViT-B-32", "lora") == 12 * 4 * 768**2
    assert merged_entries(NLI6_BACKBONE) == 32 * 2 * 4096 * (4096 + 1024)  # the 5.4 GB of a dense update in float32
    assert pictures_per_second(0.9) > 1
    assert pictures_per_second(0.0) > 1
    assert merged_per_second() > 1e4


def test_full_grids_say_what_bounds_them(monkeypatch):
    """Every grid at full size has gradients, and merges where it merges."""
    monkeypatch.setattr(measure, "flops_per_second", lambda backbone, plan: 4e13)
    monkeypatch.setattr(measure, "pair_flops_per_second", lambda backbone: 4e13)
    for name in ("pair_gradient_flops", "gradient_flops", "merged_entries"):  # counted in tests of their own
        monkeypatch.setattr(measure, name, lambda *_: 10**12)
    for name in ("vision8", "knots-vision", "nli6", "published-vision8", "published-knots", "published-nli6"):
        grid, said = load_grid(ROOT / "notebooks" / "grids" / f"{name}.yaml", ROOT / "runs"), []
        assert "hours at that speed" in measured_hours(grid, {run.id for run in grid.runs}, said.append)
        assert said[1].startswith("bound by "), name
        assert any("decoded once, take about" in line for line in said) == ("nli" not in name), name
        merging = [run for run in grid.runs if re.match("02|08|09|11|12|13|14", run.notebook.name)]
        assert all(run.merges for run in merging), name
