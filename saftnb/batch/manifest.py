"""The record of a run: what its manifest says, and whether to believe it.

A run is done only when its manifest says so, and its files still have the hashes that it names.
"""

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saftnb.batch.grid import Run
from saftnb.batch.record import RESULTS
from saftnb.paths import project_root, store_root
from saftnb.run_folder import CURRENT, read_json

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
MANIFEST, NOTEBOOK, LOG = "manifest.json", "run.ipynb", "log.txt"
OUTCOME, PROGRESS = ".outcome.json", ".progress.json"  # while a run goes on
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


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the run in ``folder``; None where there is none that can be read."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (ValueError, OSError):
        return None
    return manifest if isinstance(manifest, dict) and {"notebook", "status"} <= manifest.keys() else None


def is_done(folder: Path) -> bool:
    """Whether ``folder`` holds a finished run whose files are the ones that it finished with."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest["status"] == "done" and _altered(folder, manifest) is None


def reason_to_run(run: Run, library: str | None = None) -> str | None:
    """Why ``run`` has to be executed, in a few words, or None when it is done and nothing has changed.

    ``library`` is `library_sha256`, for callers that ask about many runs.
    """
    if not (run.folder / MANIFEST).exists():
        return "new"
    manifest = read_manifest(run.folder)
    if manifest is None:
        return "its manifest cannot be read"
    if manifest["status"] != "done":
        return "cut off before" if manifest["status"] == "running" else f"{manifest['status']} before"
    altered = _altered(run.folder, manifest)
    if altered:
        return f"{altered} was altered or is gone"
    if manifest.get("schema") != SCHEMA or manifest.get("parameters") != run.parameters:
        return "its manifest is another run's"
    if "taken" in manifest:  # its checkpoints are not here, and it outlives changes of the library: see `kept`
        return None if manifest.get("code_sha256") == run.notebook.code_sha256 else "notebook changed"
    if manifest.get("notebook_sha256") != run.notebook.sha256:
        return "notebook changed"
    if manifest.get("library_sha256") != (library or library_sha256()):
        return "library changed"
    if manifest.get("before") != results_before(run):
        return "a run before it has other results"
    for checkpoint in manifest.get("checkpoints", []):
        if not (store_root() / checkpoint["name"] / MANIFEST).is_file():
            return f"checkpoint {checkpoint['name']} is gone"
    return None


def results_before(run: Run) -> dict[str, str | None]:
    """The hash of the results of every run that this one comes after, which it may have read."""
    folders = {other: run.folder.parent / other for other in run.after}
    return {other: (read_manifest(folder) or {}).get("results_sha256") for other, folder in folders.items()}


def find_runs(path: Path | str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every run folder with its manifest under ``path``: a run's, a grid's or the folder of all grids."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder of runs")
    for pattern in ("", "*/", "*/*/"):
        for file in sorted(path.glob(pattern + MANIFEST)):
            manifest = read_manifest(file.parent)
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if manifest is not None and not hidden:
                yield file.parent, manifest


def results(path: Path | str = "runs") -> "pandas.DataFrame":
    """One row per run under ``path``: its grid, run, notebook, status, seconds, parameters and recorded scalars.

    A run that is not done, or whose files were altered since, has missing values for what it recorded: part of a run
    is no result. A recorded name that is also a column becomes ``results.<name>``. Lists, dicts and tables stay in the
    run's ``results.json``.
    """
    import pandas

    rows = []
    for folder, manifest in find_runs(path):
        done = is_done(folder)
        status = "altered" if manifest["status"] == "done" and not done else manifest["status"]
        row = {"grid": manifest["grid"], "run": folder.name, "notebook": manifest["notebook"], "status": status}
        row["seconds"] = manifest.get("seconds")
        recorded = read_json(folder / RESULTS) if done else {}
        scalars = {name: value for name, value in recorded.items() if not isinstance(value, (list, dict))}
        for prefix, values in (("parameters", manifest["parameters"]), ("results", scalars)):
            row |= {f"{prefix}.{name}" if name in row else name: value for name, value in values.items()}
        rows.append(row)
    return pandas.DataFrame(rows, columns=None if rows else ["grid", "run", "notebook", "status", "seconds"])


def tables(path: Path | str, name: str) -> "pandas.DataFrame":
    """The recorded table ``name`` of every run under ``path`` that has one, in one frame.

    ``path`` is a grid's folder of runs (of which those that its file names now are read) or a list that
    ``saftnb keep`` wrote. The columns are those of the tables, after
    ``run`` and the scalar parameters of each run; a column that is also a parameter keeps the table's value.
    Raises FileNotFoundError where there is nothing, ValueError where no run recorded such a table.
    """
    import pandas

    path = Path(path)
    if path.is_file():
        entries = [(e["id"], e["manifest"]["parameters"], e["results"]) for e in read_json(path)["runs"]]
    else:
        current = read_json(path / CURRENT)
        done = [(f, m) for f, m in find_runs(path) if is_done(f) and (not current or f.name in current)]
        entries = [(f.name, m["parameters"], read_json(f / RESULTS)) for f, m in done]
    frames = []
    for run, parameters, recorded in entries:
        table = recorded.get(name)
        if isinstance(table, dict) and table.get("type") == "table":
            frame = pandas.DataFrame(table["data"], columns=table["columns"])
            scalars = {k: v for k, v in parameters.items() if not isinstance(v, (list, dict)) and k not in frame}
            frames.append(pandas.DataFrame({"run": run, **scalars}, index=frame.index).join(frame))
    if not frames:
        raise ValueError(f"{path.name}: no done run recorded a table {name!r}")
    filled = [frame for frame in frames if len(frame)]  # an empty table would turn columns of numbers into objects
    return pandas.concat(filled or frames, ignore_index=True)


def sha256_of(path: Path) -> str | None:
    """The SHA-256 of a file's bytes, or None where there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


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


def _altered(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first of a done run's files that is not what its manifest says."""
    for name, key in ((RESULTS, "results_sha256"), (NOTEBOOK, "run_sha256")):
        if sha256_of(folder / name) is None or sha256_of(folder / name) != manifest.get(key):
            return name
    return None


def _git() -> dict[str, Any] | None:
    def ask(*words: str) -> str:
        command = ["git", "-C", str(project_root()), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
