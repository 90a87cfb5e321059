"""Models of others as task vectors: `task_vector(source, base=…)`, whatever form the source has."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from saftnb.formats.adapter import is_adapter, read_adapter
from saftnb.formats.checkpoint import Checkpoint, find, open_checkpoint
from saftnb.formats.names import HEADS, fitted, fuse_state, is_of_text, open_clip_name, tower_state
from saftnb.task_vector import KEY, TaskVector

_UNTRAINED = ("logit_scale", "logit_bias", "visual_projection.", "text_projection", "position_ids")
Base = str | os.PathLike[str] | nn.Module | Mapping[str, Tensor]


class Renamed(Mapping[str, Tensor]):
    """A checkpoint's tensors under other names, read when they are asked for."""

    def __init__(self, found: Mapping[str, Tensor], names: Mapping[str, str]):
        self.found, self._stored = found, {new: old for old, new in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.found[self._stored[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> torch.Size:
        return shape_of(self.found, self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        return dtype_of(self.found, self._stored[name])


def shape_of(state: Mapping[str, Tensor], name: str) -> torch.Size:
    """A tensor's shape, without reading it where the state dict lies on the disk."""
    return state.shape(name) if isinstance(state, Checkpoint | Renamed) else state[name].shape


def dtype_of(state: Mapping[str, Tensor], name: str) -> torch.dtype:
    """A tensor's dtype, likewise."""
    return state.dtype(name) if isinstance(state, Checkpoint | Renamed) else state[name].dtype


def task_vector(source: str | os.PathLike[str], base: Base | None = None, *, trust_pickle: bool = False) -> TaskVector:
    """What a model of someone learned, as a task vector: its adapter's deltas, or its weights minus the base's.

    Args:
        source: a PEFT adapter's folder; a model's file or folder (see `open_checkpoint`); a file that
            `TaskVector.save` wrote; or the id on the Hugging Face hub of what the local cache has.
        base: the model before fine-tuning: a module, a state dict, or a file, folder or id as above. A full model needs
            it. The names of the result are the base's; those of an adapter without a base are its own.
        trust_pickle: also read a pickled module, which can run any code.

    Raises:
        FileNotFoundError: nothing there. ValueError: a file that cannot be read, a model of another architecture, a
            full model without its base, weights that are not finite. One line each, before anything is computed.
    """
    path = find(source)
    if is_task_vector(path):
        return TaskVector.load(path)
    if is_adapter(path):
        return read_adapter(path, None if base is None else _shapes(base, trust_pickle)).vector
    if base is None:
        raise ValueError(f"{path}: a full model needs the model it was fine-tuned from: task_vector(source, base=…)")
    before = _state(base, trust_pickle)
    found = open_checkpoint(path, trust_pickle=trust_pickle)
    require_same_activation(before, found)
    tuned = in_names_of(before, found)
    return TaskVector.between({name: before[name] for name in tuned}, tuned)


def is_task_vector(path: Path) -> bool:
    """Whether a file is one that `TaskVector.save` wrote."""
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except SafetensorError:
        return False


def in_names_of(base: Mapping[str, Tensor], found: Checkpoint) -> Mapping[str, Tensor]:
    """A checkpoint's weights by the names of its base, without what the base has no part of.

    What a file may lack stays as it is in the base, and has no entry here: a text tower, a projection, a temperature.
    A classification head that the base lacks is left out, in one warning.

    Raises:
        ValueError: weights of another model.
    """
    named = _converted(base, found)
    extra = [name for name in named if name not in base]
    heads = [name for name in extra if name.split(".")[0] in HEADS]
    if heads:
        warnings.warn(f"{found.path}: the head {heads[0]!r} is left out, the base has none", stacklevel=3)
    extra = [name for name in extra if name not in heads and "position_ids" not in name]
    if extra:
        raise ValueError(
            f"{found.path}: weights of another model: its base has no {extra[0]!r}"
            + (f" ({len(extra)} such)" if extra[1:] else "")
        )
    lacking = [name for name in base if name not in named and not _may_lack(name, base)]
    if lacking:
        more = f" ({len(lacking)} such)" if lacking[1:] else ""
        raise ValueError(f"{found.path}: weights of another model: the file lacks {lacking[0]!r}{more}")
    for name in named:
        if name in base and shape_of(named, name) != shape_of(base, name):
            theirs, ours = tuple(shape_of(named, name)), tuple(shape_of(base, name))
            raise ValueError(
                f"{found.path}: weights of another model: {name!r} is {theirs} there and {ours} in the base"
            )
    kept = {name: name for name in named if name in base}
    return named if len(kept) == len(named) else Renamed(named, kept)


def _converted(base: Mapping[str, Tensor], found: Checkpoint) -> Mapping[str, Tensor]:
    """By the base's names: renamed alone where that is enough, else between open_clip's forms and Hugging Face's."""
    names, _ = fitted(found, base)
    if all(new in base for new in names.values() if "position_ids" not in new) and _covers(base, names.values()):
        return Renamed(found, names)
    prefix = "visual." if any(name.startswith("visual.") for name in base) else ""
    if f"{prefix}class_embedding" not in base:
        return Renamed(found, names)
    state = tower_state(found)
    if any("in_proj_weight" in name for name in base):
        state = fuse_state(state)
    return {prefix + name: value for name, value in state.items()}


def _covers(base: Mapping[str, Tensor], names: Iterable[str]) -> bool:
    there = set(names)
    return all(name in there or _may_lack(name, base) for name in base)


def _may_lack(name: str, base: Mapping[str, Tensor]) -> bool:
    """Whether a fine-tuned model's file may leave this out: it stays the base's."""
    visual = any(other.startswith("visual.") for other in base)
    projection = open_clip_name(name) == "proj" or name == "visual.proj"
    text = is_of_text(name) or (visual and not name.startswith("visual."))
    head = name.split(".")[0] in HEADS or name.split(".")[0] == "lm_head"
    return text or projection or head or any(part in name for part in _UNTRAINED)


def require_same_activation(base: Mapping[str, Tensor], found: Checkpoint) -> None:
    """Refuses a fine-tuned model whose config names another activation than its base's.

    With QuickGELU's weights, GELU is silently less accurate.
    """
    one, other = (activation(part.config) if isinstance(part, Checkpoint) else "" for part in (base, found))
    if one and other and one != other:
        raise ValueError(f"{found.path}: its activation is {other}, its base's is {one}")


def activation(config: Mapping[str, Any]) -> str:
    """The activation that a config of transformers or open_clip names, by transformers' name; "" where it does not."""
    inner, vision = config.get("model_cfg"), config.get("vision_config")
    if isinstance(inner, Mapping):
        return "quick_gelu" if inner.get("quick_gelu") else "gelu"
    return (vision.get("hidden_act") if isinstance(vision, Mapping) else "") or config.get("hidden_act") or ""


def _state(base: Base, trust_pickle: bool) -> Mapping[str, Tensor]:
    if isinstance(base, nn.Module):
        return {name: p.detach() for name, p in base.named_parameters()}
    return base if isinstance(base, Mapping) else open_checkpoint(base, trust_pickle=trust_pickle)


def _shapes(base: Base, trust_pickle: bool) -> dict[str, torch.Size]:
    state = _state(base, trust_pickle)
    return {name: shape_of(state, name) for name in state}
