"""The folder of a run: the names of its files, and what they say; and the run that this process belongs to.

Below every room, because the checkpoint store and progress bars note here what `batch` and `publish` read. Imports
nothing heavy.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from saftnb.disk import locked, whole_file
from saftnb.paths import store_root

MANIFEST, RESULTS, NOTEBOOK = "manifest.json", "results.json", "run.ipynb"
HASHES = {RESULTS: "results_sha256", NOTEBOOK: "run_sha256"}  # which key of the manifest has a file's hash
OWN = "manifest_sha256"  # and of all else in it
BAR = ".bar.json"  # in a run's folder: the progress bar that moves
OWNER = ".grid.json"  # in a grid's folder: where the grid file is, from there
CURRENT = ".current.json"  # in a grid's folder: the ids of the runs that the grid file names now
STATUSES = frozenset(["done", "failed", "killed", "interrupted", "running"])


def _file(name: str) -> Any:
    return property(lambda folder: folder.path / name)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one execution of one notebook: ``<runs>/<grid>/<notebook>-<hash>``.

    What its files say is read when it is first asked for, and stays: a folder that was read once is handed forward,
    and another ``RunFolder(path)`` looks again.
    """

    path: Path

    manifest_file, results_file = _file(MANIFEST), _file(RESULTS)
    notebook_file, log_file = _file(NOTEBOOK), _file("log.txt")
    # while the run goes on
    outcome_file, progress_file = _file(".outcome.json"), _file(".progress.json")
    bar_file, checkpoints_file = _file(BAR), _file(".checkpoints.json")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the manifest says; {} where there is none that can be read."""
        said = _object(self.manifest_file)
        return said if {"notebook", "status"} <= said.keys() else {}

    @cached_property
    def results(self) -> dict[str, Any]:
        """What the notebook recorded; {} where that cannot be read."""
        return _object(self.results_file)

    @cached_property
    def altered(self) -> str | None:
        """The name of the first file that is gone or not the one whose hash the manifest names, itself included."""
        if self.manifest.get(OWN) not in (None, _own_hash(self.manifest)):
            return MANIFEST
        named = ((name, self.manifest.get(key)) for name, key in HASHES.items())
        return next((name for name, said in named if said not in (None, sha256_of(self.path / name))), None)

    @property
    def begun(self) -> bool:
        """Whether a run has written anything that a reader wants."""
        return self.manifest_file.exists() or self.notebook_file.exists()

    @property
    def done(self) -> bool:
        """Whether the manifest says so, and the files are those that the run finished with."""
        return self.manifest.get("status") == "done" and self.altered is None

    @property
    def taken(self) -> bool:
        """Whether the run comes from a list of kept runs and was not executed here."""
        return "taken" in self.manifest

    @property
    def status(self) -> str:
        """The manifest's, where it can be believed, else "not done"."""
        said = self.manifest.get("status")
        return said if isinstance(said, str) and said in STATUSES and (said != "done" or self.done) else "not done"

    @property
    def reason(self) -> str:
        """Why the run is not done, in one line."""
        if not self.manifest:
            gone = "is missing: the run was cut off, or is still starting"
            return f"{MANIFEST} {'cannot be read' if self.manifest_file.exists() else gone}"
        if self.altered:
            return f"{self.altered} was altered after the run, or is gone"
        said = " ".join(str(self.manifest.get("reason") or "").split())
        return "" if self.done else said[:400] or "no reason was recorded"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def notebook(self) -> str:
        """The notebook's name without its ending."""
        named = str(self.manifest.get("notebook") or self.name.rpartition("-")[0] or self.name)
        return Path(named).name.removesuffix(".ipynb")

    @property
    def parameters(self) -> dict[str, Any]:
        return _mapping(self.manifest.get("parameters"))

    @property
    def overrides(self) -> dict[str, Any]:
        """The parameters that were given."""
        return _mapping(self.manifest.get("overrides"))

    @property
    def scalars(self) -> dict[str, Any]:
        """The recorded single values, of a run that is done: part of a run is no result. The verdict is no number."""
        single = {k: v for k, v in self.results.items() if isinstance(v, (int, float, str, bool))} if self.done else {}
        return {k: v for k, v in single.items() if k != "verdict"}

    @property
    def verdict(self) -> str:
        """What came out, in the notebook's own words; "" where it says nothing or is not done."""
        said = self.results.get("verdict") if self.done else None
        return said if isinstance(said, str) else ""

    def table(self, name: str) -> Mapping[str, Any] | None:
        """A recorded table, if ``name`` is one: columns, and data by rows."""
        value = _mapping(self.results.get(name))
        columns, data = value.get("columns"), value.get("data")
        if not (isinstance(columns, list) and columns and isinstance(data, list)):
            return None
        return value if all(isinstance(row, list) for row in data) else None

    @property
    def seconds(self) -> float | None:
        """What the run took when it was last done: here, or before it was set aside."""
        done = self.manifest.get("status") == "done"
        return (self.manifest if done else _object(self._previous / "manifest.previous.json")).get("seconds")

    @property
    def at(self) -> dict[str, Any]:
        """Where its notebook is at the moment (cell, of, heading, bar), for those who watch."""
        return _object(self.progress_file) | {"bar": _object(self.bar_file)}

    def beside(self, run_id: str) -> "RunFolder":
        """The folder of another run of the grid."""
        return RunFolder(self.path.with_name(run_id))

    @property
    def lock_file(self) -> Path:
        return self.path.parent / ".locks" / f"{self.name}.lock"

    @property
    def _previous(self) -> Path:
        return self.path.parent / ".previous" / self.name

    def set_aside(self) -> None:
        """Make the folder empty. A run that was executed to the end is moved away, one from a list is dropped."""
        if self.done and not self.taken:
            self.forget_previous()
            self._previous.parent.mkdir(exist_ok=True)
            self.path.rename(self._previous)
            (self._previous / MANIFEST).rename(self._previous / "manifest.previous.json")
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)

    def seal(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, with the hashes of the files that the run has ended with, as the last of them."""
        manifest = manifest | {key: sha256_of(self.path / name) for name, key in HASHES.items()}
        write_json(self.manifest_file, manifest | {OWN: _own_hash(manifest)})
        return manifest

    def forget_previous(self) -> None:
        """Remove what was set aside."""
        shutil.rmtree(self._previous, ignore_errors=True)


def grid_runs(folder: Path) -> list[RunFolder]:
    """The runs in a grid's folder that its file names now, in that order; where that is not known all, the oldest
    first. Runs of an older version of the grid file stay on disk."""
    try:
        said = read_json(folder / CURRENT)
    except (OSError, ValueError, RecursionError):
        said = None
    found = {run.name: run for run in map(RunFolder, sorted(_existing(folder).iterdir())) if run.begun}
    if isinstance(said, list) and said:
        named = dict.fromkeys(name for name in said if isinstance(name, str))  # each once
        return [found[name] for name in named if name in found]
    return sorted(found.values(), key=lambda run: str(run.manifest.get("started", "")))


def find_runs(path: Path | str) -> Iterator[RunFolder]:
    """Every run folder with a manifest under ``path``: a run's, a grid's or the folder of all grids."""
    path = _existing(Path(path))
    for pattern in ("", "*/", "*/*/"):
        for file in sorted(path.glob(pattern + MANIFEST)):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if not hidden and (folder := RunFolder(file.parent)).manifest:
                yield folder


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder of runs")
    return path


def run_folder() -> Path | None:
    """The folder of the run that this process belongs to, or None outside a grid."""
    named = os.environ.get("SAFTNB_RUN_DIR")
    return Path(named) if named else None


def used_checkpoint(folder: Path, fingerprint: str) -> None:
    """Note that this run rests on the checkpoint in ``folder``; nothing happens outside a run.

    The note holds the folder's name under the store, so that a rerun of the grid sees when it is gone.
    """
    run = run_folder()
    if run is None:
        return
    folder, store = Path(folder).resolve(), store_root().resolve()
    name = folder.relative_to(store).as_posix() if folder.is_relative_to(store) else folder.name
    entry = {"name": name, "fingerprint": str(fingerprint)}
    file = RunFolder(run).checkpoints_file
    with locked(file.with_name(".checkpoints.lock"), "notes a checkpoint"):  # threads and processes of the notebook
        known = read_json(file, [])
        if entry not in known:
            write_json(file, [*known, entry])


def sha256_of(path: Path) -> str | None:
    """The SHA-256 of a file's bytes, or None where there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def read_json(path: Path, default: Any = None) -> Any:
    """The JSON in ``path``, or ``default`` where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write strict JSON so that a reader sees the old file or the new one, never a part of it.

    ``durable`` waits until it is on the disk. On a disk that is full nothing is left of the attempt.
    """
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        with whole_file(path, durable=durable) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None


def _own_hash(manifest: Mapping[str, Any]) -> str:
    said = {name: value for name, value in manifest.items() if name != OWN}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; {} where there is none that can be read: a network's file system may fail once."""
    try:
        said = _mapping(read_json(path))
        return {} if _is_deep(said) else said
    except (OSError, ValueError, RecursionError):
        return {}


def _is_deep(value: Any, deepest: int = 100) -> bool:
    """Whether lists and objects stand inside one another so often that what walks through them may fail."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return deepest == 0 or any(_is_deep(one, deepest - 1) for one in inside)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
