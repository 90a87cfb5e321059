"""How much work training is, and how fast this machine does it: real shapes, random weights, random pictures."""

import dataclasses
import time
from functools import cache

import open_clip
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from saftnb.backbones import (
    OPENAI_BACKBONES,
    ImageClassifier,
    TangentTower,
    build_clip,
    load_pocket_backbone,
    resolve_device,
    unfuse_attention,
)
from saftnb.finetune.recipe import Recipe
from saftnb.finetune.train import Training, prepare_scope
from saftnb.suites import Split, Task

CPU_PICTURES = 8  # on a CPU a full batch takes minutes


@cache
def gradient_flops(backbone: str, scope: str = "full") -> int:
    """Floating-point operations of one picture's gradient, forward and backward, of matrix products and convolutions.

    Args:
        backbone: one of `OPENAI_BACKBONES` or `POCKET_BACKBONES`. scope: as in a `Recipe`.
    """
    tower = _tower(backbone, "meta")
    size = tower.image_size
    prepare_scope(tower, Recipe("counted", "adamw", scope))
    tower = TangentTower(tower) if scope == "tangent" else tower.to("meta")
    with FlopCounterMode(display=False) as counter:
        tower(torch.empty(1, 3, *size, device="meta")).sum().backward()
    return counter.get_total_flops()


def flops_per_second(backbone: str, plan: Recipe, *, device: str = "auto") -> float:
    """What a measured training step of the recipe achieves on this machine, on random pictures and weights.

    Reading pictures from disk is not in it, since other processes do that beside. On a CPU the step is one of
    `CPU_PICTURES`.
    """
    where = resolve_device(device)
    count = plan.batch_size if where.type == "cuda" else min(CPU_PICTURES, plan.batch_size)
    small = dataclasses.replace(plan, batch_size=count, accumulate=min(plan.accumulate, count))
    tower = _tower(backbone, "cpu")
    head, images = torch.randn(10, tower.output_dim), torch.randint(256, (count, 3, *tower.image_size))
    model = ImageClassifier(TangentTower(tower) if plan.tangent else tower, head, (0.5,) * 3, (0.5,) * 3)
    images = images.to(torch.uint8)
    pictures = Split(images, torch.arange(count) % 10)
    one, two = (Split(some, torch.zeros(1, dtype=torch.int64)) for some in (255 - images[:1], images[:1] // 2))
    names = tuple(str(number) for number in range(10))
    training = Training(model, Task("measure", "rendered", names, ("{}",), pictures, one, two), small, 0, where)
    times = []
    for _ in range(4 if where.type == "cuda" else 2):  # the first is warm-up
        start = time.perf_counter()
        training.step()
        times.append(time.perf_counter() - start)
    return gradient_flops(backbone, plan.scope) * count * plan.gradients / min(times[1:])


def _tower(backbone: str, device: str) -> nn.Module:
    """An image tower of the backbone's shapes."""
    if backbone not in OPENAI_BACKBONES:
        return load_pocket_backbone(backbone).image_tower().to(device)
    with torch.device(device):
        return unfuse_attention(build_clip(open_clip.get_model_config(f"{backbone}-quickgelu")).visual)
