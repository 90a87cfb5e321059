"""LoRA through PEFT: adapters on a tower's attention, as task vectors and as files in PEFT's own format.

An adapter adds (α/r) B A to a layer's weight (Hu et al. 2022, arXiv 2106.09685). As a task vector it is `LowRank` with
α/r inside, under the weight's name in the plain tower, so that everything that takes task vectors takes adapters;
`TaskVector.to_adapter` writes one.
"""

import copy
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from saftnb.backbones.names import open_clip_name
from saftnb.task_vector import LowRank, TaskVector

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
FILES = ("adapter_config.json", "adapter_model.safetensors")
# PEFT's variants of LoRA that are no product (α/r) B A, or more than that: field -> its values that are none
_PLAIN = {
    "use_dora": (False, None), "bias": ("none", None), "modules_to_save": (None, []), "lora_bias": (False, None),
    "fan_in_fan_out": (False, None), "use_qalora": (False, None), "use_bdlora": (False, None),
    "trainable_token_indices": (None, {}), "target_parameters": (None, []), "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []), "arrow_config": (None,), "kasa_config": (None,), "velora_config": (None,),
    "monteclora_config": (None,), "corda_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva"),  # the others move the base model, too
}  # fmt: skip


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


def lora_vector(state: Mapping[str, Tensor], scaling: float | Callable[[str], float]) -> TaskVector:
    """The task vector of PEFT's factors: `<layer>.lora_A.weight` (r, I) and `<layer>.lora_B.weight` (O, r), in any of
    PEFT's layouts (with an adapter's name inside, or "base_model.model." before), as deltas of `<layer>.weight`.

    Args:
        scaling: α/r, or a function of the layer's name.

    Raises:
        ValueError: a key that is no such factor, or a factor without its other half.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", key)
        if found is None:
            raise ValueError(f"{key!r} is no factor of a LoRA adapter")
        halves.setdefault(found[1], {})[found[2]] = value
    for layer, pair in halves.items():
        if len(pair) == 1:
            raise ValueError(f"the layer {layer!r} has lora_{next(iter(pair))} alone")
    factor = scaling if callable(scaling) else lambda layer: scaling
    return TaskVector({f"{layer}.weight": LowRank(p["B"] * factor(layer), p["A"]) for layer, p in halves.items()})


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
    model.add_weighted_adapter(names, [weight] * len(names), "merged", combination_type=combination, **options)
    return lora_vector(get_peft_model_state_dict(model, adapter_name="merged"), 1.0)  # PEFT gives it α = r


def load_adapter(folder: str | os.PathLike, model: nn.Module | None = None) -> TaskVector:
    """An adapter in PEFT's format as a task vector. Hugging Face's names of CLIP's vision tower become open_clip's.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        model: where given, the adapter has to fit its parameters.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an adapter that is more than (α/r) B A (DoRA, biases, saved modules, …), or for another model.
    """
    folder = Path(folder)
    for file in FILES:
        if not (folder / file).is_file():
            other = (folder / "adapter_model.bin").is_file() and file == FILES[1]
            hint = "; adapter_model.bin is a pickle, which PEFT can save anew as safetensors" if other else ""
            raise FileNotFoundError(f"{folder}: no {file}{hint}")
    try:
        config = json.loads((folder / FILES[0]).read_text())
        state = load_file(folder / FILES[1])
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a whole adapter: {error}") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: the adapter is {config.get('peft_type')}, not LORA")
    for field, plain in _PLAIN.items():
        if config.get(field) not in plain:
            raise ValueError(f"{folder}: {field} is {config[field]!r}; only plain LoRA, (α/r) B A, is a task vector")
    vector = lora_vector(state, lambda layer: _scaling(config, layer))
    for name, delta in vector.items():
        rank = _pattern(config, "rank_pattern", config["r"], name.removesuffix(".weight"))
        if delta.B.shape[1] != rank:
            raise ValueError(
                f"{folder}: {name!r} is of rank {delta.B.shape[1]} in the weights and {rank} in the config"
            )
    vector = TaskVector({open_clip_name(name): delta for name, delta in vector.items()})
    if model is not None:
        shapes = {name: p.shape for name, p in model.named_parameters()}
        for name, delta in vector.items():
            if name not in shapes:
                raise ValueError(f"{folder}: an adapter for another model: there is no {name!r} in this one")
            if shapes[name] != delta.shape:
                raise ValueError(
                    f"{folder}: an adapter for another model: {name!r} is {tuple(delta.shape)} there and "
                    f"{tuple(shapes[name])} here"
                )
    return vector


def _scaling(config: Mapping, layer: str) -> float:
    """α/r of a layer, or α/√r with rsLoRA."""
    rank = _pattern(config, "rank_pattern", config["r"], layer)
    alpha = _pattern(config, "alpha_pattern", config["lora_alpha"], layer)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(config: Mapping, field: str, default: float, layer: str) -> float:
    """A layer's value: patterns are ends of layers' names, or whole ones after "^", as in PEFT."""
    for key, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return default
