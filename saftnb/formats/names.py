"""One model, several names: which of them another file or model uses, and the way between them."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

HEADS = ("score", "classifier", "classification_head")  # what transformers calls a sequence classifier's head
_ATTENTION = ("q_proj", "k_proj", "v_proj")

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
_TEXT = re.compile(r"(^|\.)(text_model|text_projection|transformer\.text|token_embedding)(\.|$)")


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


def is_of_text(name: str) -> bool:
    """Whether a parameter is of a CLIP's text tower, by Hugging Face's names."""
    return _TEXT.search(name) is not None


def _without(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def _with(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


# How else the same parameter may be called, the likeliest first
_WAYS: tuple[Callable[[str], str], ...] = (
    lambda name: name, open_clip_name,
    _without("model."), _with("model."),  # a causal model's or a classifier's tower lies under it
    _without("vision_model."), _with("vision_model."), _without("vision_model.vision_model."),
    lambda name: "vision_model." + name.rpartition("vision_model.")[2],
    _with("visual."), _without("visual."), _with("base_model."), _without("base_model."),
)  # fmt: skip


def fitted(names: Iterable[str], known: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Each name by that of the same parameter in a model that knows `known`, and those that are left out.

    One way of renaming is taken for all names: the one by which most of them are known, the plainest of equals. A name
    that is then still unknown is kept, under its new form, for the caller to refuse. Left out are names of a text
    tower where the model has none.
    """
    names, known = list(names), set(known)
    kept = names
    if any(name.startswith("visual.") for name in names) and not any(name.startswith("visual.") for name in known):
        kept = [name for name in names if name.startswith("visual.")]  # a whole CLIP of open_clip's
    elif not any(map(is_of_text, known)):
        kept = [name for name in names if not is_of_text(name)]
    way = max(_WAYS, key=lambda rename: sum(rename(name) in known for name in kept))
    return {name: way(name) for name in kept}, [name for name in names if name not in set(kept)]


def unfuse_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict's `in_proj_{weight,bias}` to `{q,k,v}_proj.{weight,bias}`; other keys are kept."""
    result = {}
    for name, value in state.items():
        head, _, last = name.rpartition(".")
        if last in ("in_proj_weight", "in_proj_bias"):
            prefix, kind = head + "." if head else "", last.removeprefix("in_proj_")
            for part, chunk in zip(_ATTENTION, value.chunk(3), strict=True):
                result[f"{prefix}{part}.{kind}"] = chunk.clone()
        else:
            result[name] = value
    return result


def fuse_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `unfuse_state`."""
    result = {}
    for name, value in state.items():
        head, _, kind = name.rpartition(".")
        prefix, _, part = head.rpartition(".")
        prefix = prefix + "." if prefix else ""
        if part == "q_proj":
            chunks = [state[f"{prefix}{other}.{kind}"] for other in _ATTENTION]
            result[f"{prefix}in_proj_{kind}"] = torch.cat(chunks)
        elif part not in _ATTENTION:
            result[name] = value
    return result


def tower_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of a CLIP's state dict, open_clip's (fused attention or not) or Hugging Face's, by our names.

    A whole CLIP's text tower and temperature are left out, and so are position ids, which are no weights.
    """
    if any("vision_model." in name or name.startswith("encoder.layers.") for name in state):
        kept = [n for n in state if "text_" not in n and "logit_scale" not in n and "position_ids" not in n]
        return {open_clip_name(n): state[n].T if n == "visual_projection.weight" else state[n] for n in kept}
    if any("visual." in name for name in state):
        state = {n.rpartition("visual.")[2]: state[n] for n in state if "visual." in n}
    return unfuse_state(state)
