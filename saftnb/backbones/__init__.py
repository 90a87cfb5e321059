"""What is trained: CLIP image towers with unfused attention and their frozen zero-shot heads; language models."""

from saftnb.backbones.attention import (
    Attention,
    attention_weights,
    fuse_attention,
    unfuse_attention,
)
from saftnb.backbones.clip import POCKET_BACKBONES, Backbone, ImageClassifier, build_clip, load_pocket_backbone
from saftnb.backbones.device import require_bf16, resolve_device, tensor_cores, threads
from saftnb.backbones.lora import add_lora, peft_weighted, remove_lora
from saftnb.backbones.names import load_tower
from saftnb.backbones.openai import OPENAI_BACKBONES, load_openai_backbone
from saftnb.backbones.sequence import (
    SequenceBackbone,
    SequenceClassifier,
    SequenceTower,
    Tokens,
    initial_head,
    load_sequence_backbone,
    set_checkpointing,
)
from saftnb.backbones.tangent import TangentTower, tangent_embeddings
from saftnb.formats import fuse_state, load_adapter, lora_vector, unfuse_state

__all__ = [
    "OPENAI_BACKBONES",
    "POCKET_BACKBONES",
    "Attention",
    "Backbone",
    "ImageClassifier",
    "SequenceBackbone",
    "SequenceClassifier",
    "SequenceTower",
    "TangentTower",
    "Tokens",
    "add_lora",
    "attention_weights",
    "build_clip",
    "fuse_attention",
    "fuse_state",
    "initial_head",
    "load_adapter",
    "load_openai_backbone",
    "load_pocket_backbone",
    "load_sequence_backbone",
    "load_tower",
    "lora_vector",
    "peft_weighted",
    "remove_lora",
    "require_bf16",
    "resolve_device",
    "set_checkpointing",
    "tangent_embeddings",
    "tensor_cores",
    "threads",
    "unfuse_attention",
    "unfuse_state",
]
