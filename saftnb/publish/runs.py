"""The runs of a grid, read from their folders. A run is done only when its manifest says so."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saftnb.run_folder import CURRENT, read_json

STATUSES = frozenset(["done", "failed", "killed", "interrupted", "running"])


@dataclass(frozen=True)
class RunFolder:
    """One execution of one notebook, as its folder tells it."""

    path: Path
    manifest: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def notebook(self) -> str:
        """The notebook's name without its ending."""
        named = str(self.manifest.get("notebook") or self.name.rpartition("-")[0] or self.name)
        return Path(named).name.removesuffix(".ipynb")

    @property
    def status(self) -> str:
        """What the manifest says; a run whose files cannot be read or believed is not done."""
        said = self.manifest.get("status")
        return said if said in STATUSES and not (said == "done" and self.problem) else "not done"

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def reason(self) -> str:
        """Why the run is not done, in one line."""
        if self.problem:
            return self.problem
        said = " ".join(str(self.manifest.get("reason") or "").split())
        return "" if self.done else said[:400] or "no reason was recorded"

    @property
    def overrides(self) -> dict[str, Any]:
        return _mapping(self.manifest.get("overrides"))

    @property
    def parameters(self) -> dict[str, Any]:
        return _mapping(self.manifest.get("parameters"))

    def table(self, name: str) -> Mapping[str, Any] | None:
        """A recorded table, if `name` is one."""
        value = _mapping(self.results.get(name))
        columns, data = value.get("columns"), value.get("data")
        if not (isinstance(columns, list) and columns and isinstance(data, list)):
            return None
        return value if all(isinstance(row, list) for row in data) else None

    @property
    def scalars(self) -> dict[str, Any]:
        """The recorded single values, of a run that is done: part of a run is no result. The verdict is no number."""
        if not self.done:
            return {}
        single = {k: v for k, v in self.results.items() if isinstance(v, (int, float, str, bool))}
        return {k: v for k, v in single.items() if k != "verdict"}

    @property
    def verdict(self) -> str:
        """What came out, in the notebook's own words; "" where it says nothing or is not done."""
        said = self.results.get("verdict") if self.done else None
        return said if isinstance(said, str) else ""


def read_runs(folder: Path) -> list[RunFolder]:
    """The runs in a grid's folder, in the order of the grid's file, else by notebook and overridden parameters.

    The runs of one notebook stand together, where the first of them is.
    Raises ValueError, in one line, where there is no such folder or no run in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of a grid's runs, such as runs/pocket")
    current = read_json(folder / CURRENT)  # runs of an older version of the grid file stay on disk, unreported
    paths = [path for path in sorted(folder.iterdir()) if _is_run(path) and (not current or path.name in current)]
    found = [_read_run(path) for path in paths]
    if not found:
        raise ValueError(f"{folder} holds no runs{_hint(folder)}")
    found.sort(key=lambda run: (run.notebook, list(map(_order, run.overrides.values())), run.name))
    if not current:
        return found
    places = {run_id: place for place, run_id in enumerate(current)}
    first: dict[str, int] = {}
    for run in found:
        first[run.notebook] = min(places[run.name], first.get(run.notebook, len(places)))
    return sorted(found, key=lambda run: (first[run.notebook], places[run.name]))


def _is_run(path: Path) -> bool:
    return path.is_dir() and ((path / "manifest.json").exists() or (path / "run.ipynb").exists())


def _hint(folder: Path) -> str:
    if _is_run(folder):
        return f": it is itself a run; give {folder.parent}"
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    grids = [str(path) for path in folders if any(map(_is_run, path.iterdir()))]
    return f"; did you mean {' or '.join(grids[:3])}?" if grids else " (folders with a manifest.json)"


def _read_run(path: Path) -> RunFolder:
    manifest, problem = _read_json(path / "manifest.json")
    results, unread = _read_json(path / "results.json") if (path / "results.json").exists() else ({}, "")
    return RunFolder(path, manifest, results, problem or unread or _altered(path, manifest))


def _altered(path: Path, manifest: dict[str, Any]) -> str:
    """What is wrong where a file is no longer the one that the run wrote; "" where all is well."""
    for name, key in (("results.json", "results_sha256"), ("run.ipynb", "run_sha256")):
        said = manifest.get(key)
        if said is not None:
            content = (path / name).read_bytes() if (path / name).is_file() else b""
            if hashlib.sha256(content).hexdigest() != said:
                return f"{name} was altered after the run, or is gone"
    return ""


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    """A JSON object, or {} and what is wrong with the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{path.name} is missing: the run was cut off, or is still starting"
    except (OSError, ValueError):
        return {}, f"{path.name} cannot be read"
    return (content, "") if isinstance(content, dict) else ({}, f"{path.name} is not a JSON object")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (0, float(value), "") if number else (1, 0.0, str(value))


def provenance(runs: list[RunFolder]) -> list[tuple[str, str]]:
    """Commit, date and versions of the runs: each value once, several where the runs differ."""
    commits, versions = dict[str, None](), dict[str, dict[str, None]]()
    for run in runs:
        git = _mapping(run.manifest.get("git"))
        if git.get("commit"):
            dirty = " with uncommitted changes" if git.get("dirty") else ""
            commits[f"{str(git['commit'])[:12]}{dirty}"] = None
        for package, version in _mapping(run.manifest.get("versions")).items():
            versions.setdefault(str(package), {})[str(version)] = None
    dates = sorted(filter(None, (moment(run.manifest.get("finished")) for run in runs)))
    span = dates[:1] if dates and dates[0] == dates[-1] else dates[:1] + dates[-1:]
    listed = ", ".join(f"{package} {' and '.join(found)}" for package, found in versions.items())
    unknown = "not recorded"
    facts = [("commit", "; ".join(commits) or unknown), ("finished", " to ".join(span) or unknown)]
    return [*facts, ("versions", listed)] if listed else facts


def moment(value: Any) -> str:
    """A time of a manifest (ISO text, or seconds since 1970) as `2026-01-31 14:05`."""
    try:
        if isinstance(value, (int, float)):
            return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M UTC")
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M %Z").strip() if value else ""
    except (ValueError, OverflowError, OSError):
        return ""
