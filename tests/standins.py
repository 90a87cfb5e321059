"""Local stand-ins for what the full suites download: the hub's columns and features, a few pictures, random weights.

python tests/standins.py FOLDER    (then SAFTNB_DATA=FOLDER saftnb grid tests/standins.yaml)
"""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from open_clip import CLIP
from PIL import Image
from safetensors.torch import save_file

from saftnb.suites.vision8 import SOURCES, prompts

TRAIN, TEST, SIDE = 60, 25, 32
MODEL = {
    "embed_dim": 24, "quick_gelu": True,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip


def write_part(
    root: Path, task: str, part: str, count: int, *, names: list[str] | None = None, shards: int = 2
) -> None:
    """Some pictures of different sizes and modes as parquet shards, in the hub's folder for the task."""
    folder = root / "vision8" / task / SOURCES[task].folder
    folder.mkdir(parents=True, exist_ok=True)
    names = list(prompts(task)[0]) if names is None else names
    generator = np.random.default_rng([len(task), len(part)])
    mode = "L" if task == "mnist" else "RGB"
    pictures = []
    for _ in range(count):
        high, wide = generator.integers(20, 60, size=2)
        pixels = generator.integers(0, 256, size=(high, wide, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(pixels).convert(mode))
    labels = [i % len(names) for i in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    for shard in range(shards):
        piece = table.shard(shards, shard, contiguous=True)
        piece.to_parquet(folder / f"{part}-{shard:05d}-of-{shards:05d}.parquet")


def write_backbone(root: Path, name: str = "ViT-B-32", **changes) -> None:
    """A tiny CLIP with random weights, in open_clip's own files."""
    config = MODEL | changes
    folder = root / "backbones" / name
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=config["quick_gelu"])
    state = {key: value.contiguous() for key, value in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    pixels = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))


def write_all(root: Path) -> None:
    """Everything that `load_suite("vision8")` needs, with a `sizes.json` that states its sizes."""
    datasets.disable_progress_bars()
    for task in SOURCES:
        write_part(root, task, "train", TRAIN)
        write_part(root, task, "test", TEST, shards=1)
    sizes = {task: {"train": TRAIN, "test": TEST} for task in SOURCES}
    (root / "vision8" / "sizes.json").write_text(json.dumps(sizes))
    write_backbone(root)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
