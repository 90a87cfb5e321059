"""Local stand-ins for what the full suites download: the hub's columns and features, a few pictures, random weights.

python tests/tools/standins.py FOLDER    (then SAFTNB_DATA=FOLDER saftnb grid tests/tools/standins.yaml)
"""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from open_clip import CLIP
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from saftnb.formats import open_clip_name, tower_state
from saftnb.suites.nli6 import PAIR_SOURCES, hub_splits
from saftnb.suites.vision8 import SOURCES, prompts

TRAIN, TEST, SIDE = 60, 25, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
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


def write_pairs(root: Path, task: str, *, split: str, count: int, label=None, columns=None) -> None:
    """Some sentence pairs as one parquet file, with the hub's columns and labels."""
    source = PAIR_SOURCES[task]
    folder = root / "nli6" / task / source.config / split
    folder.mkdir(parents=True, exist_ok=True)
    known = [key for key in source.labels if isinstance(key, str) == (task == "scitail")]
    rows = {
        (columns or source.columns)[0]: [f"{split} number {i} of {task} is a long story" for i in range(count)],
        (columns or source.columns)[1]: [f"it is a {'long ' * (i % 4)}story" for i in range(count)],
        "label": [label if label is not None and i == 3 else known[i % len(known)] for i in range(count)],
        "idx": list(range(count)),
    }
    datasets.Dataset.from_dict(rows).to_parquet(folder / "0000.parquet")
    state_pairs(root, task, split, count)


def state_pairs(root: Path, task: str, split: str, count: int) -> None:
    """Say in `sizes.json` how many pairs a split has."""
    file = root / "nli6" / "sizes.json"
    stated = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(stated | {task: stated.get(task, {}) | {split: count}}))


def write_language_model(
    root: Path, name: str = "tiny-llama", *, pad: bool = False, end: bool = True, template: bool = True
) -> Path:
    """A tiny Llama with random weights and a tokenizer of words, as `transformers` saves them; no padding token, as
    Llama-3 has none."""
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    texts = (
        f"train number {i} of snli is a long story it validation test {task}"
        for i in range(60)
        for task in PAIR_SOURCES
    )
    words.train_from_iterator(texts, WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>", "<pad>"]))
    if template:
        words.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", words.token_to_id("<s>"))]
        )
    marks = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if end else {}) | ({"pad_token": "<pad>"} if pad else {})
    folder = root / "models" / name
    PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=words.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaModel(config).save_pretrained(folder)
    return folder


def write_nli(root: Path) -> None:
    """Everything that `load_suite("nli6", backbone="tiny-llama")` needs."""
    for task in PAIR_SOURCES:
        for split, count in (("train", 60), ("validation", 30), ("test", 24)):
            if split in hub_splits(task):
                write_pairs(root, task, split=split, count=count)
    write_language_model(root)


def write_published(root: Path) -> None:
    """Models in the forms in which FusionBench and KnOTS published theirs, saved by transformers and peft themselves:
    the stand-in backbone, moved a little; adapters as pickles of plain tensors, the language models' without a head."""
    vision = MODEL["vision_cfg"]
    config = CLIPVisionConfig(
        hidden_size=vision["width"], intermediate_size=4 * vision["width"], num_hidden_layers=vision["layers"],
        num_attention_heads=vision["width"] // vision["head_width"], image_size=SIDE, patch_size=vision["patch_size"],
        projection_dim=MODEL["embed_dim"], hidden_act="quick_gelu",
    )  # fmt: skip
    base = tower_state(load_file(root / "backbones" / "ViT-B-32" / "open_clip_model.safetensors"))
    for number, task in enumerate(SOURCES):
        hub = task.replace("cars", "stanford-cars")
        generator = torch.Generator().manual_seed(number)
        model = CLIPVisionModel(config)
        state = model.state_dict()
        for name in [name for name in state if "position_ids" not in name]:
            state[name] = base[open_clip_name(name)]
        model.load_state_dict(state)
        write_adapter(model, root, f"KnOTS-ViT-B-32_lora_R16_{hub.replace('-', '_')}", generator, TARGETS)
        model = CLIPVisionModel(config)
        model.load_state_dict({n: v + 0.02 * torch.randn(v.shape, generator=generator) for n, v in state.items()})
        model.save_pretrained(root / "published" / "fusionbench" / f"clip-vit-base-patch32_{hub}")
    for number, task in enumerate(PAIR_SOURCES):
        generator = torch.Generator().manual_seed(number)
        model = LlamaForSequenceClassification.from_pretrained(root / "models" / "tiny-llama", num_labels=3)
        write_adapter(model, root, f"KnOTS-Llama3_8B_lora_R16_{task}", generator, (*TARGETS[:3], "o_proj"))


def write_adapter(model, root: Path, name: str, generator: torch.Generator, targets) -> None:
    """PEFT's LoRA on a model, with random factors, as adapter_config.json and adapter_model.bin alone."""
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=list(targets)))
    for key, p in adapted.named_parameters():
        if "lora_" in key:
            p.data = 0.05 * torch.randn(p.shape, generator=generator)
    folder = root / "published" / "knots" / name
    adapted.save_pretrained(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def write_all(root: Path) -> None:
    """Everything that `load_suite("vision8")` needs, with a `sizes.json` that states its sizes, and `write_nli`."""
    write_nli(root)
    datasets.disable_progress_bars()
    for task in SOURCES:
        write_part(root, task, "train", TRAIN)
        write_part(root, task, "test", TEST, shards=1)
    sizes = {task: {"train": TRAIN, "test": TEST} for task in SOURCES}
    (root / "vision8" / "sizes.json").write_text(json.dumps(sizes))
    write_backbone(root)
    write_published(root)


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
