"""The work of a training, counted and timed."""

import pytest

from saftnb.batch import load_grid
from saftnb.batch.plan import measured_hours
from saftnb.finetune import measure, recipe
from saftnb.finetune.measure import flops_per_second, gradient_flops


def by_hand(width, layers, patches, side, patch, embed):
    """Forward operations of one picture: two for each multiplication of a weight matrix or of the attention."""
    tokens = patches + 1
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    return 2 * (layers * block + patches * 3 * patch**2 * width + width * embed)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("ViT-B-32", (768, 12, 49, 224, 32, 512)),
        ("ViT-B-16", (768, 12, 196, 224, 16, 512)),
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
    assert measured_hours(grid, {grid.runs[-1].id}, said.append) == ""
    assert len(said) == 1
