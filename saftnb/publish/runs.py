"""The runs of a grid, in the order in which a report shows them, and what they were made with."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saftnb.publish.tables import is_number
from saftnb.run_folder import CURRENT, RunFolder, read_json


def read_runs(folder: Path) -> list[RunFolder]:
    """The runs in a grid's folder, in the order of the grid's file, else by notebook and overridden parameters.

    The runs of one notebook stand together, where the first of them is.
    Raises ValueError, in one line, where there is no such folder or no run in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of a grid's runs, such as runs/pocket")
    current = _current(folder / CURRENT)  # runs of an older version of the grid file stay on disk, unreported
    there = [run for run in map(RunFolder, sorted(folder.iterdir())) if _is_run(run)]
    found = [run for run in there if not current or run.name in current]
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


def _current(file: Path) -> list[str]:
    """The ids of the runs that the grid file names; [] where that is not known: every run is then reported."""
    try:
        said = read_json(file)
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in said if isinstance(name, str)] if isinstance(said, list) else []


def _is_run(folder: RunFolder) -> bool:
    return folder.manifest_file.exists() or folder.notebook_file.exists()


def _hint(folder: Path) -> str:
    if _is_run(RunFolder(folder)):
        return f": it is itself a run; give {folder.parent}"
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    grids = [str(path) for path in folders if any(map(_is_run, map(RunFolder, path.iterdir())))]
    return f"; did you mean {' or '.join(grids[:3])}?" if grids else " (folders with a manifest.json)"


def _order(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if is_number(value) else (1, 0.0, str(value))


def provenance(runs: list[RunFolder]) -> list[tuple[str, str]]:
    """Commit, date and versions of the runs: each value once, several where the runs differ."""
    commits, versions = dict[str, None](), dict[str, dict[str, None]]()
    for run in runs:
        git, found = (said if isinstance(said := run.manifest.get(key), dict) else {} for key in ("git", "versions"))
        if git.get("commit"):
            dirty = " with uncommitted changes" if git.get("dirty") else ""
            commits[f"{str(git['commit'])[:12]}{dirty}"] = None
        for package, version in found.items():
            versions.setdefault(str(package), {})[str(version)] = None
    dates = sorted(filter(None, (_moment(run.manifest.get("finished")) for run in runs)))
    span = dates[:1] if dates and dates[0] == dates[-1] else dates[:1] + dates[-1:]
    listed = ", ".join(f"{package} {' and '.join(found)}" for package, found in versions.items())
    unknown = "not recorded"
    facts = [("commit", "; ".join(commits) or unknown), ("finished", " to ".join(span) or unknown)]
    return [*facts, ("versions", listed)] if listed else facts


def _moment(said: Any) -> str:
    """A manifest's time as `2026-01-31 14:05 UTC`."""
    try:
        return datetime.fromisoformat(said).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""
