"""OpenAI's CLIP weights through open_clip, in the QuickGELU variants that they were trained as."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any, cast

import open_clip
from huggingface_hub import try_to_load_from_cache
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file
from torch import nn

from saftnb.backbones.attention import unfuse_attention
from saftnb.backbones.clip import Backbone, build_clip
from saftnb.paths import data_root

# name -> where the hub has the weights, and their size in GB
OPENAI_BACKBONES = {
    "ViT-B-32": ("timm/vit_base_patch32_clip_224.openai", 0.6),
    "ViT-B-16": ("timm/vit_base_patch16_clip_224.openai", 0.6),
    "ViT-L-14": ("timm/vit_large_patch14_clip_224.openai", 1.7),
}
FILES = ("open_clip_config.json", "open_clip_model.safetensors")


def weights_folder(name: str) -> Path:
    """Where `saftnb fetch` puts a backbone's weights: open_clip's own files, as the hub has them."""
    return data_root() / "backbones" / name


def has_weights(name: str) -> bool:
    """Whether a backbone's weights are here, in `weights_folder` or among open_clip's own downloads."""
    own = all((weights_folder(name) / file).is_file() for file in FILES)
    return own or isinstance(try_to_load_from_cache(OPENAI_BACKBONES[name][0], FILES[1]), str)


def load_openai_backbone(name: str = "ViT-B-32") -> Backbone:
    """A CLIP with OpenAI's weights, from `weights_folder` or, where that is empty, from open_clip's own downloads.

    Raises:
        ValueError: unknown name, or weights of a variant without QuickGELU.
        FileNotFoundError: the weights are not here.
    """
    if name not in OPENAI_BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; those with OpenAI's weights: {', '.join(OPENAI_BACKBONES)}")
    if not has_weights(name):
        command = f"saftnb fetch vision8 --backbone {name}"
        raise FileNotFoundError(f"the weights of {name} are not here; `{command}` brings them")
    return _load(name, weights_folder(name))


@cache
def _load(name: str, folder: Path) -> Backbone:
    if all((folder / file).is_file() for file in FILES):
        config = json.loads((folder / FILES[0]).read_text())
        clip = build_clip(config["model_cfg"])
        clip.load_state_dict(load_file(folder / FILES[1]))
        pixels = config["preprocess_cfg"]
    else:
        pixels = cast("dict[str, Any]", open_clip.get_pretrained_cfg(f"{name}-quickgelu", "openai"))
        clip = cast(open_clip.CLIP, open_clip.create_model(f"{name}-quickgelu", pretrained="openai"))
    require_quick_gelu(clip, name)
    digest = hashlib.sha256()
    for key, value in clip.state_dict().items():
        digest.update(key.encode())
        digest.update(value.contiguous().numpy().data)
    unfuse_attention(clip.visual)
    clip.requires_grad_(False).eval()
    tokenize = open_clip.SimpleTokenizer(context_length=clip.context_length)
    return Backbone(name, clip, tokenize, tuple(pixels["mean"]), tuple(pixels["std"]), digest.hexdigest())


def require_quick_gelu(clip: nn.Module, name: str) -> None:
    """Raises ValueError where a model has GELU: with OpenAI's weights it would be silently less accurate."""
    kinds = {type(module) for module in clip.modules() if isinstance(module, nn.GELU | QuickGELU)}
    if kinds != {QuickGELU}:
        raise ValueError(f"{name}: OpenAI's weights need QuickGELU; this is a variant without it")
