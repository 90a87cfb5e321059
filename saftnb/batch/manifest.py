"""What decides a run's result, and whether that has changed since it was executed."""

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from saftnb.batch.grid import Run
from saftnb.paths import project_root, store_root
from saftnb.run_folder import MANIFEST, RunFolder, sha256_of

SCHEMA = 1  # of the manifest
PACKAGES = (
    "saftnb",
    "torch",
    "torchvision",
    "open_clip_torch",
    "peft",
    "numpy",
    "scikit-learn",
    "pandas",
    "papermill",
    "nbclient",
    "ipykernel",
)
# A run's numbers cannot depend on these parts of the package, so a change in them makes no run stale.
_OUTSIDE_RUNS = (
    "publish/*", "scrub.py", "cli.py", "__main__.py", "*.md",
    "batch/engine.py", "batch/local.py", "batch/cluster.py", "batch/plan.py", "batch/display.py",
)  # fmt: skip


def reason_to_run(run: Run, library: str | None = None, here: Mapping[str, RunFolder] | None = None) -> str | None:
    """Why ``run`` has to be executed, in a few words, or None when it is done and nothing has changed.

    For callers that ask about many runs: ``library`` is `library_sha256`, ``here`` the folders that were read, by id.
    """
    here = here or {}
    folder = here.get(run.id) or run.folder
    manifest = folder.manifest
    if not manifest:
        return "its manifest cannot be read" if folder.manifest_file.exists() else "new"
    if manifest["status"] != "done":
        return "cut off before" if manifest["status"] == "running" else f"{manifest['status']} before"
    if folder.altered:
        return f"{folder.altered} was altered or is gone"
    if manifest.get("schema") != SCHEMA or manifest.get("parameters") != run.parameters:
        return "its manifest is another run's"
    if folder.taken:  # its checkpoints are not here, and it outlives changes of the library: see `kept`
        return None if manifest.get("code_sha256") == run.notebook.code_sha256 else "notebook changed"
    if manifest.get("notebook_sha256") != run.notebook.sha256:
        return "notebook changed"
    if manifest.get("library_sha256") != (library or library_sha256()):
        return "library changed"
    if manifest.get("before") != results_before(run, here):
        return "a run before it has other results"
    for checkpoint in manifest.get("checkpoints", []):
        if not (store_root() / checkpoint["name"] / MANIFEST).is_file():
            return f"checkpoint {checkpoint['name']} is gone"
    return None


def results_before(run: Run, here: Mapping[str, RunFolder] | None = None) -> dict[str, str | None]:
    """The hash of the results of every run that this one comes after, which it may have read."""
    folders = {other: (here or {}).get(other) or run.folder.beside(other) for other in run.after}
    return {other: folder.manifest.get("results_sha256") for other, folder in folders.items()}


def library_sha256() -> str:
    """A hash of what runs can see of the package: its code and data, less what launches and publishes them."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        inside = path.relative_to(package)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
        outside = any(fnmatchcase(inside.as_posix(), pattern) for pattern in _OUTSIDE_RUNS)
        if path.is_file() and not hidden and not outside:
            digest.update(f"{inside.as_posix()}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """The commit and the versions that a run is made with, without importing any of them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"git": _git(), "versions": versions}


def _git() -> dict[str, Any] | None:
    def ask(*words: str) -> str:
        command = ["git", "-C", str(project_root()), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
