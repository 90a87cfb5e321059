"""Image towers of others under our names: open_clip's and Hugging Face's CLIP, from files that run no code."""

import os
from collections.abc import Mapping
from typing import Any

from open_clip.transformer import QuickGELU
from torch import nn

from saftnb.formats import open_checkpoint, tower_state
from saftnb.formats.models import activation

_ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}  # by Hugging Face's names


def load_tower(path: str | os.PathLike[str], tower: nn.Module, *, trust_pickle: bool = False) -> nn.Module:
    """Load a fine-tuned image tower of others, in place: see `open_checkpoint` for the files.

    A file of transformers' CLIPVisionModel, which has no projection, leaves the tower's as it is.

    Args:
        tower: of the same architecture. trust_pickle: also read a pickled module, which can run any code.

    Raises:
        ValueError: what `open_checkpoint` refuses, weights of another model, or a config beside them that names another
            activation than the tower's (with QuickGELU's weights, GELU is silently less accurate).
    """
    found = open_checkpoint(path, trust_pickle=trust_pickle)
    path, shapes = found.path, {name: p.shape for name, p in tower.state_dict().items()}
    _require_activation(found.config, tower, f"{path}")
    state = tower_state(found)
    if "proj" in shapes and "proj" not in state and any("encoder.layers." in name for name in found):
        state["proj"] = tower.state_dict()["proj"]
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


def _require_activation(config: Mapping[str, Any], tower: nn.Module, path: str) -> None:
    """Refuses a file whose config names another activation than the tower's."""
    written = activation(config)
    here = {name for name, kind in _ACTIVATIONS.items() if any(type(m) is kind for m in tower.modules())}
    if written in _ACTIVATIONS and here and written not in here:
        raise ValueError(f"{path}: its activation is {written}, this model's is {here.pop()}")
