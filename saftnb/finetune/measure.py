"""How much work training is, and how fast this machine does it: real shapes, random weights, random pictures."""

import dataclasses
import time
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import open_clip
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from saftnb.backbones import (
    OPENAI_BACKBONES,
    ImageClassifier,
    TangentTower,
    attention_weights,
    build_clip,
    load_pocket_backbone,
    resolve_device,
    set_checkpointing,
    threads,
    unfuse_attention,
)
from saftnb.finetune.recipes import Recipe
from saftnb.finetune.train import Training, prepare_scope
from saftnb.suites import Split, Task
from saftnb.suites.nli6 import NLI6_BACKBONE
from saftnb.suites.stored import SHORTER, cropped

CPU_PICTURES = 8  # on a CPU a full batch takes minutes


@cache
def gradient_flops(backbone: str, scope: str = "full") -> int:
    """Floating-point operations of one picture's gradient, forward and backward, of matrix products and convolutions.

    Args:
        backbone: one of `OPENAI_BACKBONES` or `POCKET_BACKBONES`. scope: as in a `Recipe`.
    """
    tower = _tower(backbone, "meta")
    size = _shape(tower)
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
    head = torch.randn(10, cast(int, tower.output_dim))
    images = torch.randint(256, (count, 3, *_shape(tower)))
    model = ImageClassifier(TangentTower(tower) if plan.tangent else tower, head, (0.5,) * 3, (0.5,) * 3)
    images = images.to(torch.uint8)
    pictures = Split(images, torch.arange(count) % 10)
    one, two = (Split(some, torch.zeros(1, dtype=torch.int64)) for some in (255 - images[:1], images[:1] // 2))
    names = tuple(str(number) for number in range(10))
    training = Training(model, Task("measure", "rendered", names, ("{}",), pictures, one, two), small, 0, where)
    times: list[float] = []
    for _ in range(4 if where.type == "cuda" else 2):  # the first is warm-up
        start = time.perf_counter()
        training.step()
        times.append(time.perf_counter() - start)
    return gradient_flops(backbone, plan.scope) * count * plan.gradients / min(times[1:])


def pictures_per_second(crop: float) -> float:
    """Training pictures of 224 pixels that one process draws here, once they are decoded: random crops of pictures of
    288 × 384, or, at `crop` 0, copies of those for evaluation."""
    count, generator = 40, torch.Generator().manual_seed(0)
    if crop:
        picture = torch.randint(256, (SHORTER, SHORTER * 4 // 3, 3), generator=generator).to(torch.uint8).numpy()

        def draw() -> None:
            for _ in range(count):
                cropped(picture, 224, crop, generator)
    else:
        pictures = torch.zeros(count, 3, 224, 224, dtype=torch.uint8)

        def draw() -> None:
            pictures[torch.arange(count)]

    times: list[float] = []
    with threads(1):
        for _ in range(3):
            start = time.perf_counter()
            draw()
            times.append(time.perf_counter() - start)
    return count / min(times)


@cache
def merged_entries(backbone: str, scope: str = "full") -> int:
    """Entries of one task vector, those of adapters multiplied out."""
    if backbone == NLI6_BACKBONE:
        width, kept = _LLAMA["hidden_size"], _LLAMA["hidden_size"] // 4  # of k and v, for their fewer heads
        return _LLAMA_LAYERS * 2 * (width * width + width * kept)
    tower = _tower(backbone, "meta")
    if scope == "lora":
        return sum(tower.get_parameter(name).numel() for name in attention_weights(tower))
    return sum(p.numel() for p in tower.parameters())


PAIR_TOKENS = 64  # of a sentence pair of `nli6`, on average with its padding: our guess, SNLI's are shorter
# The shapes of the language model whose work can be foretold: a layer's, and how many layers
_LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
_LLAMA_LAYERS = 32


@cache
def pair_gradient_flops(backbone: str) -> int:
    """As `gradient_flops`, of one sentence pair of `PAIR_TOKENS` and a language model with LoRA on q, k, v and out.

    The layers are computed twice, as with checkpointing.

    Raises:
        ValueError: a model whose shapes are not known here.
    """
    if backbone != NLI6_BACKBONE:
        raise ValueError(f"the work of {backbone!r} is not known, only that of {NLI6_BACKBONE}: give budgets instead")
    with FlopCounterMode(display=False) as counter:
        _layer_step("cpu", 1)()
    return counter.get_total_flops() * _LLAMA_LAYERS


def pair_flops_per_second(backbone: str, *, device: str = "auto") -> float:
    """What a measured gradient of one layer of the language model achieves here, random weights, 4 pairs on a CPU and
    32 in bfloat16 on a GPU."""
    where = resolve_device(device)
    count = 32 if where.type == "cuda" else 4
    times: list[float] = []
    step = _layer_step(str(where), count)
    for _ in range(4 if where.type == "cuda" else 2):  # the first is warm-up
        start = time.perf_counter()
        step()
        if where.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return pair_gradient_flops(backbone) / _LLAMA_LAYERS * count / min(times[1:])


def _layer_step(device: str, count: int) -> Callable[[], None]:
    from transformers import LlamaConfig, LlamaModel  # takes seconds

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        model = LlamaModel(LlamaConfig(**_LLAMA, num_hidden_layers=1, vocab_size=8)).to(dtype)
    prepare_scope(model, Recipe("counted", "adamw", "lora"), targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    model.to(device).train()
    set_checkpointing(model, True)
    states = torch.randn(count, PAIR_TOKENS, _LLAMA["hidden_size"], device=device, dtype=dtype, requires_grad=True)
    return lambda: model(inputs_embeds=states, use_cache=False).last_hidden_state.float().sum().backward()


def _tower(backbone: str, device: str) -> nn.Module:
    """An image tower of the backbone's shapes."""
    if backbone not in OPENAI_BACKBONES:
        return load_pocket_backbone(backbone).image_tower().to(device)
    with torch.device(device):
        config = cast("dict[str, Any]", open_clip.get_model_config(f"{backbone}-quickgelu"))  # it is one of its own
        return unfuse_attention(build_clip(config).visual)


def _shape(tower: nn.Module) -> tuple[int, int]:
    """Height and width of the pictures that an open_clip image tower takes."""
    return cast("tuple[int, int]", tower.image_size)
