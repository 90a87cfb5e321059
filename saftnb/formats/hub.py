"""Where the models lie that others published: their ids on the hub, and their folders here."""

from pathlib import Path

from saftnb.paths import data_root

_FUSIONBENCH = {
    "ViT-B-32": "clip-vit-base-patch32", "ViT-B-16": "clip-vit-base-patch16", "ViT-L-14": "clip-vit-large-patch14",
}  # fmt: skip
SOURCES = ("fusionbench", "knots")
FILES = ("*.json", "model.safetensors", "adapter_model.*")  # what is brought of each


def hub_id(source: str, backbone: str, task: str) -> str:
    """The id of a task's published model: FusionBench's full CLIPs, KnOTS's adapters of CLIP or (a task of sentence
    pairs, whatever the backbone is called) of Llama-3-8B.

    Raises:
        ValueError: nobody published such models of this backbone.
    """
    vision = backbone in _FUSIONBENCH
    if source == "fusionbench" and vision:
        return f"tanganke/{_FUSIONBENCH[backbone]}_{'stanford-cars' if task == 'cars' else task}"
    if source == "knots" and vision and backbone != "ViT-B-16":
        return f"hoffman-lab/KnOTS-{backbone}_lora_R16_{'stanford_cars' if task == 'cars' else task}"
    if source == "knots" and not vision and task in ("snli", "mnli", "sick", "qnli", "rte", "scitail"):
        return f"hoffman-lab/KnOTS-Llama3_8B_lora_R16_{task}"
    raise ValueError(f"{source} has published no models of {backbone} for {task}")


def published_folder(source: str, repository: str) -> Path:
    """Where `saftnb fetch … --models` puts a published model."""
    return data_root() / "published" / source / repository.rpartition("/")[2]


def is_here(folder: Path) -> bool:
    """Whether a published model's folder has its weights."""
    return any(
        (folder / name).is_file() for name in ("model.safetensors", "adapter_model.bin", "adapter_model.safetensors")
    )
