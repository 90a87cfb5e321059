"""The checkpoint store: a folder of finished fine-tunings, each found by the hash of everything that decides it.

    <store>/<suite>-<task>-<recipe>-s<seed>-<hash>/   task_vector.safetensors   history.csv   manifest.json
    (and head.safetensors, for sentence pairs)

A checkpoint is written under a temporary name, synced and renamed, so that one which is there is whole.
"""

import hashlib
import json
import os
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

from saftnb.paths import store_root
from saftnb.run_folder import used_checkpoint
from saftnb.task_vector import TaskVector

_FILES = ("task_vector.safetensors", "history.csv")
_HEAD = "head.safetensors"


@dataclass(frozen=True, eq=False)
class FineTuned:
    """One fine-tuned model.

    Attributes:
        task_vector: τ = θt − θ0 over the parameters that trained; TIES' `keep`, say, is a share of those.
        history: steps, loss (of the last batch), validation_accuracy at every look.
        validation_accuracy: that of the kept weights, 0 to 1.
        seconds: training time, looks included, saves not.
        fingerprint: hash of everything that decides the result; `inputs` is what was hashed.
        weights_sha256: hash of the task vector's file, as the store holds it.
        head: for sentence pairs the trained head (3, width), which is no part of the task vector; None for pictures.
    """

    task_vector: TaskVector
    history: pd.DataFrame
    validation_accuracy: float
    seconds: float
    fingerprint: str
    inputs: dict
    weights_sha256: str = ""
    head: Tensor | None = None


def fingerprint(inputs: dict) -> str:
    """SHA-256 of the inputs as canonical JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def folder_name(inputs: dict) -> str:
    name = f"{inputs['suite']}-{inputs['task']}-{inputs['recipe']['name']}-s{inputs['seed']}"
    return f"{name}-{fingerprint(inputs)[:12]}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(result: FineTuned, root: Path | None = None) -> FineTuned:
    """Write a checkpoint whole or not at all; returns the result with its weights' hash."""
    root = root or store_root()
    final = root / folder_name(result.inputs)
    part = root / ".partial" / final.name
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    result.task_vector.save(part / "task_vector.safetensors")
    result.history.to_csv(part / "history.csv", index=False)
    if result.head is not None:
        save_file({"head": result.head.contiguous()}, part / _HEAD)
    manifest = {
        "fingerprint": result.fingerprint, "inputs": result.inputs, "seconds": result.seconds,
        "validation_accuracy": result.validation_accuracy,
        "sha256": {path.name: _sha256(path) for path in sorted(part.iterdir())},
    }  # fmt: skip
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (*part.iterdir(), part):
        _sync(path)
    if final.exists():  # only ever a damaged one: a whole one would have been loaded
        shutil.rmtree(final)
    os.replace(part, final)
    _sync(root)
    used_checkpoint(final, result.fingerprint)
    return replace(result, weights_sha256=manifest["sha256"]["task_vector.safetensors"])


def load(inputs: dict, root: Path | None = None) -> FineTuned | None:
    """The checkpoint of these inputs; None where there is none, or (with a warning) where it is damaged."""
    folder = (root or store_root()) / folder_name(inputs)
    if not (folder / "manifest.json").is_file():
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        whole = manifest["fingerprint"] == fingerprint(inputs)
        whole = whole and set(_FILES) <= manifest["sha256"].keys()
        whole = whole and all(_sha256(folder / name) == wanted for name, wanted in manifest["sha256"].items())
        vector = TaskVector.load(folder / "task_vector.safetensors") if whole else None
        head = load_file(folder / _HEAD)["head"] if whole and _HEAD in manifest["sha256"] else None
    except (OSError, ValueError, KeyError):
        vector = None
    if vector is None:
        warnings.warn(f"checkpoint {folder.name} is damaged and is trained again", stacklevel=3)
        return None
    used_checkpoint(folder, manifest["fingerprint"])
    return FineTuned(
        vector, pd.read_csv(folder / "history.csv"), manifest["validation_accuracy"], manifest["seconds"],
        manifest["fingerprint"], manifest["inputs"], manifest["sha256"]["task_vector.safetensors"], head,
    )  # fmt: skip


@contextmanager
def locked(inputs: dict, root: Path | None = None):
    """Hold the checkpoint's lock: of two processes that need it, one trains and the other waits and loads."""
    folder = (root or store_root()) / ".partial"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{folder_name(inputs)}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for another process that trains {folder_name(inputs)}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
