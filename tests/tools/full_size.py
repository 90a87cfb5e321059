"""The table of `notebooks/guide/full_size.md`: what the full grids' runs would take on one H100, from counted work.

    python tests/tools/full_size.py

Everything is counted on the real shapes without data: floating-point operations, the bytes that a training step keeps,
the entries that are merged. Only the speeds are assumed, and stand in the first lines below.
"""

import math
from functools import cache
from pathlib import Path

import torch

from saftnb.batch import load_grid
from saftnb.batch.plan import _kind, _work
from saftnb.finetune import measure
from saftnb.finetune.train import prepare_scope

GRIDS = Path(__file__).parents[2] / "notebooks" / "grids"
PEAK, SHARE = 989e12, 0.3  # bfloat16 of an H100 (dense, its data sheet), and the share of it that we assume
FEED, COPIES, MERGING = 2500.0, 9000.0, 4e7  # crops, copies, entries a second and core: measured here


@cache
def step_bytes(backbone: str, scope: str, batch: int) -> int:
    """What a training step keeps on the GPU, about: weights in float32, of those that train the gradient and AdamW's
    two moments, and activations in two bytes."""
    tower = measure._tower(backbone, "meta")
    prepare_scope(tower, measure.Recipe("counted", "adamw", scope))
    tower = measure.TangentTower(tower) if scope == "tangent" else tower.to("meta")
    own = {p.untyped_storage()._cdata for p in tower.parameters()}
    kept: dict[int, int] = {}  # by storage, since several operations may keep one tensor

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes() // 2
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tower(torch.empty(1, 3, *measure._tower(backbone, "meta").image_size, device="meta"))
    trained = sum(p.numel() for p in tower.parameters() if p.requires_grad)
    return 4 * sum(p.numel() for p in tower.parameters()) + 12 * trained + sum(kept.values()) * batch


def rows() -> list[tuple[str, ...]]:
    """Grid, notebook, backbone, recipe, runs, FLOP each, memory, bound, hours: a row for all runs that are alike."""
    found: dict[tuple, list] = {}
    for name in ("vision8", "knots-vision", "nli6"):
        for run in load_grid(GRIDS / f"{name}.yaml", Path("runs")).runs:
            backbone, plan = _kind(run)
            work = _work(run, backbone, plan)
            spent = work.seconds(PEAK * SHARE, lambda crop: FEED if crop else COPIES, lambda cpus: MERGING * cpus)
            recipe = run.parameters["recipe"] if work.training else ""
            key = (name, run.notebook.name, backbone.rpartition("/")[2], recipe)
            found.setdefault(key, [0, 0.0, work, spent, plan, backbone])
            found[key][0] += 1
            found[key][1] += sum(spent.values()) / 3600
    table = []
    for (grid, notebook, backbone, recipe), (count, hours, work, spent, plan, full) in found.items():
        parts = 4 if full == "ViT-L-14" and plan.scope != "lora" else plan.accumulate  # see `recipe`
        batch = math.ceil(plan.batch_size / parts)
        memory = f"{step_bytes(full, plan.scope, batch) / 1e9:.0f} GB" if work.training and grid != "nli6" else ""
        memory = memory or ("17 GB" if grid == "nli6" else "")
        bound, shown = max(spent, key=spent.get), f"{hours:.1f}" if hours < 10 else f"{hours:.0f}"
        table.append((grid, notebook, backbone, recipe, str(count), f"{work.flops:.1e}", memory, bound, shown))
    return table


def main() -> None:
    print("| grid | notebook | backbone | recipe | runs | FLOP each | GPU memory, about | bound | hours, all runs |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows():
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
