"""LoRA through PEFT: adapters on a tower's attention, as task vectors and as files in PEFT's own format.

An adapter adds (α/r) B A to a layer's weight (Hu et al. 2022, arXiv 2106.09685). As a task vector it is `LowRank` with
α/r inside, under the weight's name in the plain tower, so that everything that takes task vectors takes adapters;
`TaskVector.to_adapter` writes one, `saftnb.formats` reads those of others.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

from saftnb.formats import lora_vector
from saftnb.task_vector import TaskVector

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def add_lora(
    tower: nn.Module, *, rank: int = 16, alpha: float = 16, dropout: float = 0.1, seed: int = 0,
    targets: Sequence[str] = TARGETS,
) -> nn.Module:  # fmt: skip
    """Put PEFT's LoRA on q, k, v and out of every attention layer, in place; only its factors train afterwards.

    B starts at 0 and A as PEFT draws it, by a generator of its own for `seed`.

    Args:
        targets: the ends of these layers' names.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none")
    with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU
        torch.manual_seed(seed)
        inject_adapter_in_model(config, tower)
    for name, p in tower.named_parameters():
        p.requires_grad_(".lora_" in name)
        if p.requires_grad:  # PEFT gives them the base's dtype; in bfloat16 small steps would be lost
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    return tower


def remove_lora(tower: nn.Module) -> nn.Module:
    """Take PEFT's LoRA off again, in place: the layers that were there before are back, as they were."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(tower.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, last = name.rpartition(".")
            setattr(tower.get_submodule(parent), last, module.get_base_layer())
    if hasattr(tower, "peft_config"):
        del tower.peft_config
    return tower


def peft_weighted(
    tower: nn.Module, vectors: Sequence[TaskVector], combination: str, *, weight: float = 1.0, **options: object
) -> TaskVector:
    """What PEFT's own `add_weighted_adapter` makes of adapters, for comparison.

    "linear", "ties" and "dare_linear" combine the factors A and B on their own, which is not what the same method does
    to the products B A; "cat" is Σ B A; the "…_svd" types combine the products and cut them to the largest rank given.

    Args:
        tower: a plain tower; it is copied. vectors: low-rank ones, of one rank but for "cat" and "svd".
        combination: PEFT's `combination_type`. weight: of every adapter. options: PEFT's others, such as `density`.
    """
    from peft import PeftModel, get_peft_model_state_dict

    names, model = [f"task_{number}" for number in range(len(vectors))], copy.deepcopy(tower)
    with tempfile.TemporaryDirectory() as folder:
        for name, vector in zip(names, vectors, strict=True):
            vector.to_adapter(Path(folder, name))
            if isinstance(model, PeftModel):
                model.load_adapter(Path(folder, name), adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, Path(folder, name), adapter_name=name)
    # PeftModel hands on what it does not have itself.
    merge = cast(Callable[..., None], model.add_weighted_adapter)
    merge(names, [weight] * len(names), "merged", combination_type=combination, **options)
    return lora_vector(get_peft_model_state_dict(model, adapter_name="merged"), 1.0)  # PEFT gives it α = r
