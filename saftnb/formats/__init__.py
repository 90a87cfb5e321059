"""Files of others: adapters in PEFT's format, state dicts in many, read without running their code."""

from saftnb.formats.adapter import Adapter, load_adapter, load_adapters, lora_vector, read_adapter
from saftnb.formats.checkpoint import Checkpoint, find, open_checkpoint
from saftnb.formats.models import task_vector
from saftnb.formats.names import fuse_state, open_clip_name, tower_state, unfuse_state

__all__ = [
    "Adapter",
    "Checkpoint",
    "find",
    "fuse_state",
    "load_adapter",
    "load_adapters",
    "lora_vector",
    "open_checkpoint",
    "open_clip_name",
    "read_adapter",
    "task_vector",
    "tower_state",
    "unfuse_state",
]
