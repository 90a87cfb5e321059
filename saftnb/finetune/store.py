"""The checkpoint store: a folder of finished trainings, each found by the hash of everything that decides it.

    <store>/<suite>-<task>-<recipe>-s<seed>-<hash>/   task_vector.safetensors   history.csv   manifest.json
    (and head.safetensors, for sentence pairs)

`save` and `load` are of fine-tunings; `write` and `read` of anything that is a folder of files, such as learned
merging coefficients.

A checkpoint is written under a temporary name, synced and renamed, so that one which is there is whole.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from saftnb import disk
from saftnb.disk import remove_lock, sweep, whole_folder
from saftnb.paths import store_root
from saftnb.run_folder import used_checkpoint
from saftnb.task_vector import TaskVector, save_tensors

Found = TypeVar("Found")
Inputs = dict[str, Any]  # everything that decides a result, by name, as JSON
Manifest = dict[str, Any]  # of a folder of the store, as JSON: the inputs, their hash, the files' hashes, and more
_FILES = ("task_vector.safetensors", "history.csv")
_HEAD = "head.safetensors"
_OWN = "manifest_sha256"  # in a manifest, of all else in it


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
    inputs: Inputs
    weights_sha256: str = ""
    head: Tensor | None = None


def fingerprint(inputs: Inputs) -> str:
    """SHA-256 of the inputs as canonical JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def folder_name(inputs: Inputs) -> str:
    """The inputs' "name", or that of a fine-tuning, and the start of their hash."""
    name = inputs.get("name") or f"{inputs['suite']}-{inputs['task']}-{inputs['recipe']['name']}-s{inputs['seed']}"
    return f"{name}-{fingerprint(inputs)[:12]}"


def partial_file(inputs: Inputs, suffix: str = ".pt") -> Path:
    """Where the state of a training in progress is."""
    return store_root() / ".partial" / f"{folder_name(inputs)}{suffix}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(inputs: Inputs, fill: Callable[[Path], None], root: Path | None = None, **more: object) -> Manifest:
    """Have `fill` put files into a folder, which stands in the store whole or not at all; returns its manifest.

    Args:
        more: what the manifest says beside the inputs and the files' hashes.
    """
    root = root or store_root()
    final = root / folder_name(inputs)
    with whole_folder(final, root / ".partial") as part:  # a whole one would have been loaded
        fill(part)
        manifest: Manifest = {"fingerprint": fingerprint(inputs), "inputs": inputs, **more}
        manifest["sha256"] = {path.name: _sha256(path) for path in sorted(part.iterdir())}
        manifest[_OWN] = fingerprint(manifest)
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    used_checkpoint(final, manifest["fingerprint"])
    return manifest


def read(
    inputs: Inputs, take: Callable[[Path, Manifest], Found], files: Sequence[str], root: Path | None = None
) -> Found | None:
    """What `take` makes of the folder of these inputs and its manifest; None where there is none, or (with a warning
    that names the file) where it is damaged: it lacks one of `files`, or a file does not have its hash."""
    folder = (root or store_root()) / folder_name(inputs)
    if not (folder / "manifest.json").is_file():
        return None
    try:
        manifest = _manifest(folder, inputs, files)
        for name, wanted in manifest["sha256"].items():
            if _sha256(folder / name) != wanted:
                raise ValueError(f"{name} does not have its hash")
        found = take(folder, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error)
        if isinstance(error, FileNotFoundError) and error.filename is not None:
            why = f"{Path(error.filename).name} is missing"
        warnings.warn(f"checkpoint {folder.name} is damaged and is trained again: {why}", stacklevel=4)
        return None
    _tidy(folder)
    used_checkpoint(folder, fingerprint(inputs))
    return found


def _manifest(folder: Path, inputs: Inputs, files: Sequence[str]) -> Manifest:
    """The manifest of a folder. Raises ValueError where it is not whole, or not of these inputs and files."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        own = manifest.pop(_OWN, None)  # which the first manifests did not have
        if own is not None and own != fingerprint(manifest):
            raise ValueError("it does not have its hash")
        if manifest["fingerprint"] != fingerprint(inputs) or manifest["inputs"] != json.loads(json.dumps(inputs)):
            raise ValueError("it is another's")
        if not set(files) <= manifest["sha256"].keys():
            raise ValueError("it lacks a file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"manifest.json cannot be believed ({error})") from None
    return manifest


def _tidy(folder: Path) -> None:
    """Remove what is left in `.partial` where a process was killed after its checkpoint was whole."""
    beside = folder.parent / ".partial" / folder.name
    remove_lock(beside.with_name(f"{folder.name}.lock"))
    with suppress(OSError):  # the store may be read-only here
        beside.with_name(f"{folder.name}.pt").unlink(missing_ok=True)
    sweep(beside)


def save(result: FineTuned, root: Path | None = None) -> FineTuned:
    """Write a checkpoint whole or not at all; returns the result with its weights' hash."""

    def fill(folder: Path) -> None:
        result.task_vector.save(folder / "task_vector.safetensors")
        result.history.to_csv(folder / "history.csv", index=False)
        if result.head is not None:
            save_tensors({"head": result.head.contiguous()}, folder / _HEAD)

    more = {"seconds": result.seconds, "validation_accuracy": result.validation_accuracy}
    manifest = write(result.inputs, fill, root, **more)
    return replace(result, weights_sha256=manifest["sha256"]["task_vector.safetensors"])


def load(inputs: Inputs, root: Path | None = None) -> FineTuned | None:
    """The checkpoint of these inputs; None where there is none, or (with a warning) where it is damaged."""

    def take(folder: Path, manifest: Manifest) -> FineTuned:
        return FineTuned(
            TaskVector.load(folder / "task_vector.safetensors"), pd.read_csv(folder / "history.csv"),
            manifest["validation_accuracy"], manifest["seconds"], manifest["fingerprint"], manifest["inputs"],
            manifest["sha256"]["task_vector.safetensors"],
            load_file(folder / _HEAD)["head"] if _HEAD in manifest["sha256"] else None,
        )  # fmt: skip

    return read(inputs, take, _FILES, root)


@contextmanager
def locked(inputs: Inputs, root: Path | None = None) -> Iterator[None]:
    """Hold the checkpoint's lock: of two processes that need it, one trains and the other waits and loads."""
    name = folder_name(inputs)
    with disk.locked((root or store_root()) / ".partial" / f"{name}.lock", f"trains {name}"):
        yield
