"""What is trained: CLIP image towers with unfused attention, and their frozen zero-shot heads."""

from saftnb.backbones.attention import Attention, fuse_attention, fuse_state, unfuse_attention, unfuse_state
from saftnb.backbones.clip import POCKET_BACKBONES, Backbone, ImageClassifier, load_pocket_backbone
from saftnb.backbones.device import resolve_device, threads

__all__ = [
    "POCKET_BACKBONES", "Attention", "Backbone", "ImageClassifier", "fuse_attention", "fuse_state",
    "load_pocket_backbone", "resolve_device", "threads", "unfuse_attention", "unfuse_state",
]  # fmt: skip
