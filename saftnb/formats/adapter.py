"""LoRA adapters in PEFT's format, as task vectors: (α/r) B A becomes `LowRank`, with α/r inside."""

import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saftnb.delta import is_finite
from saftnb.formats.checkpoint import Checkpoint, find, open_checkpoint, read_json
from saftnb.formats.names import HEADS, fitted
from saftnb.task_vector import LowRank, TaskVector

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# PEFT's variants of LoRA that are no product (α/r) B A, or more than that: field -> its values that are none
_PLAIN = {
    "use_dora": (False, None), "bias": ("none", None), "lora_bias": (False, None),
    "use_qalora": (False, None), "use_bdlora": (False, None), "trainable_token_indices": (None, {}),
    "target_parameters": (None, []), "layer_replication": (None, []), "alora_invocation_tokens": (None, []),
    "arrow_config": (None,), "kasa_config": (None,), "velora_config": (None,), "monteclora_config": (None,),
    "corda_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others move the base model, too
}  # fmt: skip
_KIND = ("task_type", "auto_mapping", "fan_in_fan_out")  # what a merged adapter has of the given ones' configs
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_SAVED = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.modules_to_save(?:\.[^.]+)?)?\.(weight|bias)")


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter of someone, read.

    Attributes:
        vector: its deltas. head: the classification head that was saved with it, by name; {} where there is none.
        base, revision: of the model that it was trained on, as its config says; "" where it does not.
        folder: where it was read. sha256: of its weights' file.
        more: what else of its config a merged adapter has, too: the kind of model that it is of.
    """

    vector: TaskVector
    folder: Path
    sha256: str
    base: str = ""
    revision: str = ""
    head: Mapping[str, Tensor] = field(default_factory=dict)
    more: Mapping[str, object] = field(default_factory=dict)


def is_adapter(folder: Path) -> bool:
    """Whether a folder looks like a PEFT adapter."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: str | os.PathLike[str], model: nn.Module | Mapping[str, torch.Size] | None = None) -> Adapter:
    """An adapter in PEFT's format, with its classification head.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors, or adapter_model.bin, which is read without
            running code; or a model's id on the hub, of what the local cache has.
        model: where given (or the shapes of its parameters), the names become its own, and the adapter has to fit it:
            Hugging Face's names of CLIP become open_clip's, a tower under `model.` is found, and of an adapter that
            also covers the text tower an image tower gets its part. Without it, names stay as they are in the file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an adapter that is more than (α/r) B A (DoRA, biases, saved modules other than a head, …), of a
            convolution or an embedding, for another model, or a file that `open_checkpoint` refuses.
    """
    folder = find(folder)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if not is_adapter(folder) or weights is None:
        raise FileNotFoundError(f"{folder}: no {WEIGHTS[0] if is_adapter(folder) else CONFIG}")
    config, state = read_json(folder / CONFIG), open_checkpoint(weights)
    _require_plain(folder, config)
    _require_numbers(folder, config)
    factors, head = _sorted(folder, state)
    try:
        vector = lora_vector({name: state[name] for name in factors}, lambda layer: _scaling(config, layer))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    for name, delta in vector.items():
        if not is_finite(delta):
            raise ValueError(f"{folder}: {name!r} has NaN or infinite values")
        rank = _pattern(config, "rank_pattern", config["r"], name.removesuffix(".weight"))
        if isinstance(delta, LowRank) and delta.B.shape[1] != rank:
            raise ValueError(
                f"{folder}: {name!r} is of rank {delta.B.shape[1]} in the weights and {rank} in the config"
            )
    if model is not None:
        if config.get("fan_in_fan_out"):
            raise ValueError(
                f"{folder}: fan_in_fan_out is True, its layers hold Wᵀ (GPT-2's Conv1D): `saftnb merge` without --base "
                "merges it with others of its kind, and PEFT loads the result"
            )
        shapes = {name: p.shape for name, p in model.named_parameters()} if isinstance(model, nn.Module) else model
        vector = _fitting(folder, vector, shapes)
    base, revision = (config.get(key) or "" for key in ("base_model_name_or_path", "revision"))
    return Adapter(vector, folder, state.sha256, base, revision, head, {key: config.get(key) for key in _KIND})


def load_adapter(folder: str | os.PathLike[str], model: nn.Module | None = None) -> TaskVector:
    """The deltas of an adapter in PEFT's format; see `read_adapter`, which also has its classification head."""
    return read_adapter(folder, model).vector


def load_adapters(folders: Iterable[str | os.PathLike[str]], model: nn.Module | None = None) -> dict[str, TaskVector]:
    """Several adapters, by the names of their folders, ready to be merged: what one of them does not adapt is 0 there.

    Warns, in one line, where their configs name different base models, and where one lacks layers of another.
    """
    adapters = {Path(folder).name: read_adapter(folder, model) for folder in folders}
    if different := different_bases(list(adapters.values())):
        warnings.warn(different, stacklevel=2)
    vectors, lacking = fill_missing({name: adapter.vector for name, adapter in adapters.items()})
    if lacking:
        warnings.warn(lacking, stacklevel=2)
    return vectors


def different_bases(adapters: Iterable[Adapter]) -> str:
    """One line on the first two adapters whose configs name different bases or revisions; "" where all agree."""
    named = [adapter for adapter in adapters if adapter.base]
    for other in named[1:]:
        one = named[0]
        if (_normal(one.base), one.revision) != (_normal(other.base), other.revision):
            bases = [f"{a.base}{f' at {a.revision}' if a.revision else ''}" for a in (one, other)]
            return f"adapters of different base models: {one.folder} of {bases[0]}, {other.folder} of {bases[1]}"
    return ""


def _normal(base: str) -> str:
    """A base's name; a folder that is here as its one path."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def fill_missing(vectors: Mapping[str, TaskVector]) -> tuple[dict[str, TaskVector], str]:
    """The vectors with equal names, 0 where one lacks what another has; and one line that says so, or ""."""
    shapes = {name: delta for vector in vectors.values() for name, delta in vector.items()}
    filled, lacking = {}, []
    for task, vector in vectors.items():
        missing = [name for name in shapes if name not in vector]
        if missing:
            lacking.append(f"{task} has no {missing[0]!r}{f' and {len(missing) - 1} more' if missing[1:] else ''}")
        filled[task] = TaskVector({name: vector.get(name, _zero(like)) for name, like in shapes.items()})
    return filled, f"layers that others adapt, taken as 0: {'; '.join(lacking)}" if lacking else ""


def _zero(like: LowRank | Tensor) -> LowRank | Tensor:
    if isinstance(like, LowRank):
        return LowRank(like.B.new_zeros(like.shape[0], 1), like.A.new_zeros(1, like.shape[1]))
    return torch.zeros_like(like)


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
        found = _FACTOR.fullmatch(key)
        if found is None:
            raise ValueError(f"{key!r} is no factor of a LoRA adapter")
        pair = halves.setdefault(found[1], {})
        if found[2] in pair:
            raise ValueError(f"the layer {found[1]!r} has lora_{found[2]} twice, as where a file holds two adapters")
        pair[found[2]] = value
    for layer, pair in halves.items():
        if len(pair) == 1:
            raise ValueError(f"the layer {layer!r} has lora_{next(iter(pair))} alone")
    factor = scaling if callable(scaling) else lambda layer: scaling
    deltas = {}
    for layer, pair in halves.items():
        try:
            deltas[f"{layer}.weight"] = LowRank(pair["B"] * factor(layer), pair["A"])
        except ValueError as error:
            raise ValueError(f"the layer {layer!r}: {error}") from None
    return TaskVector(deltas)


def _require_plain(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: the adapter is {config.get('peft_type')}, not LORA")
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise ValueError(f"{folder}: {name} is {config[name]!r}; only plain LoRA, (α/r) B A, is a task vector")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
        raise ValueError(f"{folder}: modules_to_save is {saved!r}, not a list of names")
    others = [module for module in saved if module.rpartition(".")[2] not in HEADS]
    if others:
        raise ValueError(
            f"{folder}: modules_to_save is {others!r}; only plain LoRA, (α/r) B A, is a task vector, "
            f"and of saved modules only a classification head ({', '.join(HEADS)})"
        )


def _require_numbers(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError unless ranks and scales are numbers, and patterns go from names to such."""
    for field_, pattern, rule in (
        ("r", "rank_pattern", "a whole number of at least 1"),
        ("lora_alpha", "alpha_pattern", "a finite number"),
    ):
        if field_ not in config:
            raise ValueError(f"{folder}: {CONFIG} has no {field_!r}, which is {rule}")
        others = config.get(pattern) or {}
        if not isinstance(others, dict):
            raise ValueError(f"{folder}: {pattern} is {others!r}, not an object of layers and numbers")
        for name, value in [(field_, config[field_]), *((f"{pattern} of {key!r}", v) for key, v in others.items())]:
            kind = int if field_ == "r" else int | float
            good = isinstance(value, kind) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
            if not good or (field_ == "r" and value < 1):
                raise ValueError(f"{folder}: {name} is {value!r}, not {rule}")
        for key in others:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{folder}: {pattern} has {key!r}, which is no pattern of names: {error}") from None
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise ValueError(
            f"{folder}: base_model_name_or_path is {config['base_model_name_or_path']!r}, which is no name"
        )


def _sorted(folder: Path, state: Checkpoint) -> tuple[list[str], dict[str, Tensor]]:
    """The keys of the factors, and the head. Refuses, with folder and layer, what is neither."""
    factors, head = [], {}
    for key in state:
        if "lora_embedding_" in key or ("embed" in key.split(".base_layer.")[0] and ".base_layer." in key):
            raise ValueError(f"{folder}: LoRA of an embedding, {key!r}: only those of linear layers are task vectors")
        found = _FACTOR.fullmatch(key)
        if found:
            if len(state.shape(key)) != 2:
                raise ValueError(
                    f"{folder}: LoRA of a convolution, {found[1]!r}: only those of linear layers are task vectors"
                )
            factors.append(key)
            continue
        saved = _SAVED.fullmatch(key)
        if saved is None or not any(part in HEADS for part in saved[1].split(".")):
            raise ValueError(f"{folder}: {key!r} is no factor of a LoRA adapter, nor a classification head")
        head[f"{saved[1]}.{saved[2]}"] = state[key]
    if not factors:
        raise ValueError(f"{folder}: there is no factor of a LoRA adapter in its weights")
    return factors, head


def _fitting(folder: Path, vector: TaskVector, shapes: Mapping[str, torch.Size]) -> TaskVector:
    """The same by the names of a model with these shapes, without what it has no part of."""
    names, _ = fitted(vector, shapes)
    found = {names[name]: delta for name, delta in vector.items() if name in names}
    for name, delta in found.items():
        if name not in shapes:
            raise ValueError(f"{folder}: an adapter for another model: there is no {name!r} in this one")
        if shapes[name] != delta.shape:
            raise ValueError(
                f"{folder}: an adapter for another model: {name!r} is {tuple(delta.shape)} there and "
                f"{tuple(shapes[name])} here"
            )
    return TaskVector(found)


def _scaling(config: Mapping[str, Any], layer: str) -> float:
    """α/r of a layer, or α/√r with rsLoRA."""
    rank = _pattern(config, "rank_pattern", config["r"], layer)
    alpha = _pattern(config, "alpha_pattern", config["lora_alpha"], layer)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(config: Mapping[str, Any], field: str, default: float, layer: str) -> float:
    """A layer's value: patterns are ends of layers' names, or whole ones after "^", as in PEFT."""
    for key, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return default
