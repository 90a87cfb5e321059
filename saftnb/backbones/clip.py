"""`Backbone`: a frozen CLIP, its trainable image tower with unfused attention, and its zero-shot heads."""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file
from torch import Tensor, nn

from saftnb.backbones.attention import unfuse_attention

POCKET_FOLDER = Path(__file__).parent / "pocket_clip"
POCKET_BACKBONES = ("pocket-0", "pocket-1", "pocket-2")  # one a pre-training seed, each in a folder of that name


class Vocabulary:
    """open_clip's tokenizer, cut down to the tokens that a small text tower has rows for.

    `tokens` are the kept ids of the full vocabulary in rising order, so that id 0 stays the padding and the
    end-of-text token stays the largest, which is how the text tower finds it.
    """

    def __init__(self, tokens: Sequence[int], context_length: int):
        self.tokens, self.context_length = list(tokens), context_length
        self._full = SimpleTokenizer(context_length=context_length)
        self._rows = {token: row for row, token in enumerate(self.tokens)}

    @classmethod
    def of(cls, texts: Sequence[str], context_length: int) -> "Vocabulary":
        """The vocabulary that the given texts use."""
        full = SimpleTokenizer(context_length=context_length)
        return cls(sorted({0, *full(list(texts)).unique().tolist()}), context_length)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token rows int64 (n, context_length).

        Raises:
            ValueError: a text has a token that the text tower never saw.
        """
        full = self._full(list(texts))
        for text, row in zip(texts, full.tolist(), strict=True):
            unknown = [token for token in row if token not in self._rows]
            if unknown:
                words = self._full.decode(unknown).strip()
                raise ValueError(f"{text!r}: the pocket backbone's vocabulary does not hold {words!r}")
        return torch.tensor([[self._rows[token] for token in row] for row in full.tolist()])


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen CLIP. `sha256` identifies its weights; `mean` and `std` normalise pixels in [0, 1]."""

    name: str
    clip: CLIP
    tokenize: Callable[[list[str]], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str

    @property
    def image_size(self) -> int:
        """Pixels a side that the image tower takes."""
        return cast("tuple[int, int]", self.clip.visual.image_size)[0]

    def image_tower(self) -> nn.Module:
        """A fresh copy of the pre-trained image tower θ0 in evaluation mode, ready to be fine-tuned."""
        return copy.deepcopy(self.clip.visual).eval()

    @torch.no_grad()
    def zero_shot_head(self, class_names: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """Frozen classifier weights (classes, embedding), times exp(logit_scale).

        Per class: normalise every template's embedding, average them, normalise again (CLIP; `SAFT` keeps it frozen).
        """
        rows = []
        for name in class_names:
            text = self.clip.encode_text(self.tokenize([prompt.format(name) for prompt in prompts]))
            rows.append(F.normalize(F.normalize(text, dim=-1).mean(dim=0), dim=0))
        return torch.stack(rows) * self.clip.logit_scale.exp()


class ImageClassifier(nn.Module):
    """An image tower with a frozen head: uint8 images (n, 3, h, w) or pixels in [0, 1] → logits (n, classes).

    logits = head · normalise(tower(x)); only the tower trains, so its parameter names are the task vector's. While
    `bf16` is set, the tower runs under autocast to bfloat16.
    """

    bf16 = False
    head: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, head: Tensor, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.tower = tower
        self.register_buffer("head", head)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    @property
    def trunk(self) -> nn.Module:
        """The module whose parameters' names are a task vector's: the tower."""
        return self.tower

    def pixels(self, images: Tensor) -> Tensor:
        """What the tower takes: normalised pixels."""
        return ((images.float() / 255 if images.dtype == torch.uint8 else images) - self.mean) / self.std

    def classify(self, embeddings: Tensor) -> Tensor:
        """Logits (n, classes) of the tower's embeddings (n, embedding), in float32 at least."""
        return F.normalize(embeddings.to(self.head.dtype), dim=-1) @ self.head.T

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            embeddings = self.tower(self.pixels(images))
        return self.classify(embeddings)


def build_clip(config: dict[str, Any]) -> CLIP:
    """An open_clip CLIP from a config in open_clip's own format, with its fused attention."""
    quick = config.get("quick_gelu", False)
    return CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=quick)


def load_pocket_backbone(which: str | Path = POCKET_BACKBONES[0]) -> Backbone:
    """One of the small CLIPs that this project pre-trained (see their MODEL_CARD.md).

    Args:
        which: a name from `POCKET_BACKBONES`; or the folder of one that `save_backbone` wrote.

    Raises:
        FileNotFoundError: the folder lacks the weights or their config.
        ValueError: no such backbone, or the weights are not those that the config names by hash.
    """
    if isinstance(which, Path):
        return _load(which)
    if which not in POCKET_BACKBONES:
        raise ValueError(f"unknown backbone {which!r}; the pocket backbones: {', '.join(POCKET_BACKBONES)}")
    return _load(POCKET_FOLDER / which)


@cache
def _load(folder: Path) -> Backbone:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"the pocket backbone has no {name}; reinstall saftnb")
    config = json.loads((folder / "config.json").read_text())
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != config["sha256"]:
        raise ValueError(f"the pocket backbone's weights have hash {found[:12]}…, its config says another")
    clip = build_clip(config)
    clip.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    unfuse_attention(clip.visual)
    clip.requires_grad_(False).eval()
    vocabulary = Vocabulary(config["tokens"], config["text_cfg"]["context_length"])
    return Backbone(config["name"], clip, vocabulary, tuple(config["mean"]), tuple(config["std"]), found)
