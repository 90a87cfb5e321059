"""What a machine has, and what it still needs: `doctor` looks, `fetch` brings."""

import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from saftnb.backbones.openai import FILES, OPENAI_BACKBONES, has_weights, weights_folder
from saftnb.backbones.sequence import minilm_folder
from saftnb.disk import lock_fault
from saftnb.formats import hub, open_checkpoint, read_adapter
from saftnb.formats.adapter import is_adapter
from saftnb.paths import data_root, project_root, store_root
from saftnb.suites import nli6, sources, vision8

# Published models: suite, source, backbone (of language models none: KnOTS's are of Llama-3-8B)
MODELS = (
    ("vision8", "fusionbench", "ViT-B-32"), ("vision8", "knots", "ViT-B-32"), ("vision8", "fusionbench", "ViT-B-16"),
    ("vision8", "fusionbench", "ViT-L-14"), ("vision8", "knots", "ViT-L-14"), ("nli6", "knots", ""),
)  # fmt: skip
PICTURE = 224  # pixels a side of all of OpenAI's backbones here

SHARED_MEMORY = 2  # GiB that are enough for eight workers with batches of 128 pictures of 224 pixels


class Unreachable(RuntimeError):
    """The hub does not answer."""


def doctor() -> pd.DataFrame:
    """One row a thing: what, state ("ready", "downloadable", "missing", or what is there), size, the command that mends
    it, and why it is not ready. Asks the hub for sizes where something is missing, and downloads nothing."""
    rows = [
        *_machine(),
        _pocket(),
        _minilm(),
        *map(_backbone, OPENAI_BACKBONES),
        *map(_task, vision8.SOURCES),
        *_decoded(),
    ]
    rows += map(_pairs, nli6.PAIR_SOURCES)
    rows += [_models(*group) for group in MODELS]
    columns = ["what", "state", "size", "command", "why"]
    return pd.DataFrame([row + ("",) * (len(columns) - len(row)) for row in rows], columns=columns).set_index("what")


def _machine() -> list[tuple[str, ...]]:
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        kind, size = f"{torch.cuda.device_count()} × {card.name}", f"{card.total_memory / 2**30:.0f} GiB"
    else:
        kind, size = "CPU only", f"{os.cpu_count()} cores"
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    memory = f"{pages * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB" if pages else "unknown"
    place = data_root()
    while not place.exists():
        place = place.parent
    return [
        ("device", kind, size),
        ("memory", "", memory),
        *_shared_memory(),
        ("disk for data", "free", f"{shutil.disk_usage(place).free / 2**30:.0f} GiB"),
        _locks("the store", store_root()),
        _locks("runs", project_root() / "runs"),
    ]


def _locks(what: str, folder: Path) -> tuple[str, ...]:
    """Whether processes that share a folder can keep out of each other's way."""
    why = lock_fault(folder)
    return f"locks in {what}", "ready" if why is None else "missing", "", "", why or ""


def _shared_memory() -> list[tuple[str, ...]]:
    """A row where it is too small for the processes that prepare training pictures, as containers often have it."""
    place = Path("/dev/shm")
    if not place.is_dir() or (there := shutil.disk_usage(place).total / 2**30) >= SHARED_MEMORY:
        return []
    command = f"docker run --shm-size={SHARED_MEMORY}g …"
    return [
        ("shared memory", "small", f"{there:.2f} GiB", command, "the workers that prepare pictures pass them in it")
    ]


def _pocket() -> tuple[str, ...]:
    try:
        sources.animals()
    except (FileNotFoundError, ValueError) as error:
        return "pocket data", "missing", "", "saftnb fetch pocket", str(error)
    return ("pocket data", "ready")


def _minilm() -> tuple[str, ...]:
    try:
        minilm_folder()
    except FileNotFoundError as error:
        return "pocket-nli's MiniLM", "missing", "", "saftnb fetch pocket-nli", str(error)
    return ("pocket-nli's MiniLM", "ready")


def _backbone(name: str) -> tuple[str, ...]:
    repository, gigabytes = OPENAI_BACKBONES[name]
    if has_weights(name):
        return name, "ready", f"{gigabytes} GB"
    return name, *_on_the_hub(repository, "model", FILES, f"saftnb fetch vision8 --backbone {name}", "no weights")


def _task(name: str) -> tuple[str, ...]:
    why = vision8.fault(name)
    if why is None:
        return name, "ready", "{train:,} + {test:,} pictures".format(**vision8.sizes(name))
    return name, *_on_the_hub(vision8.SOURCES[name].hub, "dataset", _patterns(name), "saftnb fetch vision8", why)


def _pairs(name: str) -> tuple[str, ...]:
    why, source = nli6.nli_fault(name), nli6.PAIR_SOURCES[name]
    if why is None:
        return (f"nli6/{name}", "ready")
    patterns = tuple(f"{source.config}/{split}/*.parquet" for split in nli6.hub_splits(name))
    return f"nli6/{name}", *_on_the_hub(source.hub, "dataset", patterns, "saftnb fetch nli6", why, nli6.REVISION)


def _models(suite: str, source: str, backbone: str) -> tuple[str, ...]:
    ids = _model_ids(suite, source, backbone)
    here = sum(hub.is_here(hub.published_folder(source, repository)) for repository in ids)
    what = f"models of {source}, {backbone or 'Llama-3-8B'}"
    if here == len(ids):
        return (what, "ready", f"{here} models")
    command = f"saftnb fetch {suite} --models {source}" + (f" --backbone {backbone}" if backbone else "")
    return what, "missing", "", command, f"{here} of {len(ids)} are here; nothing needs them but published-*.yaml"


def _model_ids(suite: str, source: str, backbone: str) -> list[str]:
    tasks = vision8.SOURCES if suite == "vision8" else nli6.PAIR_SOURCES
    return [hub.hub_id(source, backbone, task) for task in tasks]


def _on_the_hub(
    repository: str, kind: str, patterns: Sequence[str], command: str, why: str, revision: str | None = None
) -> tuple[str, ...]:
    try:
        return "downloadable", f"{_hub_size(repository, kind, patterns, revision) / 1e9:.1f} GB", command, why
    except Unreachable:
        return "missing", "", command, f"{why}; the hub does not answer"


def decoded_bytes() -> dict[str, int]:
    """What `StoredSplit` keeps of "vision8" on the disk, for one size of pictures: for evaluation, for training with
    random crops (about) and for training without, as LoRA does."""
    counts = {name: vision8.sizes(name) for name in vision8.SOURCES}
    held = {name: min(max(count["train"] // 10, 1), 5000) for name, count in counts.items()}
    trained, each = {name: counts[name]["train"] - held[name] for name in counts}, 3 * PICTURE**2
    return {
        "evaluation": sum(counts[name]["test"] + held[name] for name in counts) * each,
        "training": sum(count * 3 * vision8.SOURCES[name].pixels for name, count in trained.items()),
        "LoRA": sum(trained.values()) * each,
    }


def _decoded() -> list[tuple[str, ...]]:
    there = sum(file.stat().st_size for file in (vision8.folder() / ".decoded").glob("*.u8"))
    state = f"{there / 2**30:.1f} GiB of all are here" if there else "made at first use"
    return [
        (f"decoded pictures: {what}", state, f"about {size / 2**30:.0f} GiB") for what, size in decoded_bytes().items()
    ]


def fetch(suite: str, backbones: Sequence[str] = ("ViT-B-32",), models: str = "") -> None:
    """Bring what a suite needs and is not here yet, and check it. What is here and whole is not asked for again.

    Args:
        models: "fusionbench" or "knots": bring their models for this suite and these backbones, and nothing else.

    Raises:
        ValueError: unknown suite or backbone, too little disk, or files that do not add up after the download.
        RuntimeError: a download failed; run again, it goes on where it stopped.
    """
    if models:
        return _fetch_models(suite, models, backbones)
    if suite == "nli6":
        return _fetch_nli(() if backbones == ("ViT-B-32",) else backbones)
    if suite != "vision8":
        return sources.fetch(suite)
    unknown = [name for name in backbones if name not in OPENAI_BACKBONES]
    if unknown:
        raise ValueError(f"unknown backbone {unknown[0]!r}; those with OpenAI's weights: {', '.join(OPENAI_BACKBONES)}")
    for name in backbones:
        if not has_weights(name):
            _download(OPENAI_BACKBONES[name][0], "model", weights_folder(name), FILES)
        print(f"backbone {name}: ready", flush=True)
    for name in vision8.SOURCES:
        why = vision8.fault(name)
        if why is not None:
            print(f"{name}: {why}", flush=True)
            _bring(name)
        count = vision8.sizes(name)
        print(f"{name}: ready, {count['train']:,} train and {count['test']:,} test pictures", flush=True)


def _fetch_models(suite: str, source: str, backbones: Sequence[str]) -> None:
    known = [group for group in MODELS if group[:2] == (suite, source)]
    if not known:
        pairs = ", ".join(sorted({f"{one} --models {other}" for one, other, _ in MODELS}))
        raise ValueError(f"no published models {source!r} for {suite!r}; there are: {pairs}")
    wanted = [backbone for _, _, backbone in known if not backbone or backbone in backbones]
    if not wanted:
        raise ValueError(f"{source} has no models of {', '.join(backbones)}; of {', '.join(b for _, _, b in known)}")
    for backbone in wanted:
        for repository in _model_ids(suite, source, backbone):
            folder = hub.published_folder(source, repository)
            why = _model_fault(folder)
            if why is not None:
                print(f"{repository}: {why}", flush=True)
                _hub_size(repository, "model", hub.FILES)  # it answers: what is broken here can go,
                for file in folder.glob("*.*"):  # or the hub's client would take it for whole
                    if file.is_file():
                        file.unlink()
                _download(repository, "model", folder, hub.FILES)
                why = _model_fault(folder)
                if why is not None:
                    raise ValueError(f"{repository}: the download is complete, but {why}")
            print(f"{repository}: ready", flush=True)


def _model_fault(folder: Path) -> str | None:
    """Why a published model's folder cannot be used; None where it can."""
    if not hub.is_here(folder):
        return "not here yet" if not folder.exists() else "there are no weights that we read"
    try:
        read_adapter(folder) if is_adapter(folder) else open_checkpoint(folder)
    except ValueError as error:
        return str(error)


def _fetch_nli(models: Sequence[str]) -> None:
    for name in models:
        if not (data_root() / "models" / name / "config.json").is_file():
            _download(name, "model", data_root() / "models" / name, ("*.json", "*.safetensors", "tokenizer*"))
        print(f"{name}: ready", flush=True)
    for name, source in nli6.PAIR_SOURCES.items():
        why = nli6.nli_fault(name)
        if why is not None:
            print(f"{name}: {why}", flush=True)
            patterns = tuple(f"{source.config}/{split}/*.parquet" for split in nli6.hub_splits(name))
            try:
                _download(source.hub, "dataset", nli6.nli_folder() / name, patterns, nli6.REVISION)
            except RuntimeError:
                if not source.older:
                    raise
                _download(source.older, "dataset", nli6.nli_folder() / name, patterns, nli6.REVISION)
            why = nli6.nli_fault(name)
            if why is not None:
                raise ValueError(f"{name}: the download from {source.hub} is complete, but {why}")
        print(f"{name}: ready", flush=True)


def _bring(name: str) -> None:
    """Download a task's files; broken ones first go, or the hub's client would take them for whole."""
    import pyarrow.lib
    import pyarrow.parquet

    for part in vision8.PARTS:
        for file in vision8.files(name, part):
            try:
                pyarrow.parquet.read_metadata(file)
            except (pyarrow.lib.ArrowInvalid, OSError):
                file.unlink()
    hub = vision8.SOURCES[name].hub
    _download(hub, "dataset", vision8.folder() / name, _patterns(name))
    why = vision8.fault(name)
    if why is not None:
        raise ValueError(
            f"{name}: the download from {hub} is complete, but {why}: the hub's split is not the published one, or a "
            "file here is not the hub's"
        )


def _patterns(name: str) -> tuple[str, ...]:
    return tuple(f"{vision8.SOURCES[name].folder}/{part}-*.parquet" for part in vision8.PARTS)


def _download(repository: str, kind: str, folder: Path, patterns: Sequence[str], revision: str | None = None) -> None:
    """The hub's files of these patterns into a folder, with progress; each is renamed into place when whole."""
    from huggingface_hub import snapshot_download

    folder.mkdir(parents=True, exist_ok=True)
    here = sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))
    need = _hub_size(repository, kind, patterns, revision) - here
    if kind == "dataset":
        need += _hub_size(repository, kind, patterns, revision)  # what `datasets` makes of it when it is first read
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ValueError(f"{repository} takes {need / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free on disk")
    there: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        snapshot_download(repository, repo_type=kind, local_dir=folder, allow_patterns=list(patterns), **there)
    except Exception as error:  # whatever the hub's client raises
        raise RuntimeError(
            f"{repository}: the download failed ({type(error).__name__}); run this again, it goes on from there"
        ) from error


@cache
def _hub_size(repository: str, kind: str, patterns: Sequence[str], revision: str | None = None) -> int:
    """Bytes of the files of these patterns; raises Unreachable."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    there: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        _answers()
        about = HfApi().repo_info(repository, repo_type=kind, files_metadata=True, timeout=10, **there)
    except Exception as error:  # whatever the hub's client raises
        raise Unreachable(f"{repository}: the hub does not answer ({type(error).__name__})") from error
    files = getattr(about, "siblings", None) or ()
    sizes = [file.size or 0 for file in files if any(fnmatch(file.rfilename, p) for p in patterns)]
    return sum(sizes)


@cache
def _answered() -> list[Exception]:
    """The hub's first failure to answer, or nothing: it is asked once a process."""
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(vision8.SOURCES["mnist"].hub, repo_type="dataset", timeout=5)
    except Exception as error:
        return [error]
    return []


def _answers() -> None:
    for error in _answered():
        raise error
