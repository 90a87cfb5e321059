"""Weights of others under our names: open_clip's and Hugging Face's CLIP towers, in files that run no code."""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from saftnb.backbones.attention import unfuse_state

# Hugging Face's names of CLIP's vision tower -> open_clip's with unfused attention
_PARTS = {
    "embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding", "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post", "visual_projection.weight": "proj",
}  # fmt: skip
_BLOCK = {
    "self_attn": "attn", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(self_attn|layer_norm1|layer_norm2|mlp\.fc1|mlp\.fc2)(\..+)")


def open_clip_name(name: str) -> str:
    """A parameter of Hugging Face's CLIP vision tower, by open_clip's name; any other name as it is."""
    bare = name.rpartition("vision_model.")[2]
    found = _LAYER.fullmatch(bare)
    if found:
        return f"transformer.resblocks.{found[1]}.{_BLOCK[found[2]]}{found[3]}"
    for theirs, ours in _PARTS.items():
        if bare == theirs or bare.startswith(theirs + "."):
            return ours + bare.removeprefix(theirs)
    return name


def tower_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of a CLIP's state dict, open_clip's (fused attention or not) or Hugging Face's, by our names.

    A whole CLIP's text tower and temperature are left out, and so are position ids, which are no weights.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if any("vision_model." in name or name.startswith("encoder.layers.") for name in state):
        kept = {
            n: v for n, v in state.items() if "text_" not in n and "logit_scale" not in n and "position_ids" not in n
        }
        return {open_clip_name(n): v.T if n == "visual_projection.weight" else v for n, v in kept.items()}
    if any("visual." in name for name in state):
        state = {n.rpartition("visual.")[2]: v for n, v in state.items() if "visual." in n}
    return unfuse_state(state)


def load_tower(path: str | os.PathLike, tower: nn.Module, *, trust_pickle: bool = False) -> nn.Module:
    """Load a fine-tuned image tower of others, in place: a state dict in safetensors, or in a .pt file of tensors.

    Args:
        tower: of the same architecture. trust_pickle: also read a pickled module, which can run any code.

    Raises:
        ValueError: a pickled module that is not trusted, a file that is none of these, or weights of another model.
    """
    path = Path(path)
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    except pickle.UnpicklingError:
        if not trust_pickle:
            raise ValueError(
                f"{path} is a pickled object, which can run code when it is read: write its state_dict() as "
                "safetensors with safetensors.torch.save_file, or pass trust_pickle=True"
            ) from None
        found = torch.load(path, "cpu", weights_only=False)
    if isinstance(found, nn.Module):
        found = found.state_dict()
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict")
    state, shapes = tower_state(found), {name: p.shape for name, p in tower.state_dict().items()}
    for have, lack, where in ((shapes, state, "the file lacks"), (state, shapes, "this tower has no")):
        missing = [name for name in have if name not in lack]
        if missing:
            raise ValueError(f"{path}: weights of another model: {where} {missing[0]!r} ({len(missing)} such)")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            theirs = tuple(state[name].shape)
            raise ValueError(f"{path}: weights of another model: {name!r} is {theirs} there and {tuple(shape)} here")
    tower.load_state_dict(state)
    return tower
