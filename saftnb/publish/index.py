"""A folder of runs as a folder of pages: the headline first, then every run, failed ones too."""

import base64
import hashlib
import os
from datetime import UTC, datetime
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from saftnb.publish.folder import replaced
from saftnb.publish.page import Pages
from saftnb.run_folder import RunFolder, grid_runs
from saftnb.scrub import root_above


def publish_runs(runs: Path, out: Path, *, code: bool = True) -> Path:
    """Write the report of a grid's folder, such as runs/pocket, one page a run and an index; return the index.

    `out` is replaced as a whole when every page is written. A page hides its code until the reader ticks "Show code";
    `code=False` leaves it out. ValueError where there are no runs, or where `out` holds files that no report wrote.
    """
    runs, out = Path(runs), Path(out)
    found = read_runs(runs)
    pages, name = Pages(root_above(runs)), str(found[0].manifest.get("grid") or runs.resolve().name)
    with replaced(out) as folder:
        entries = [_run_page(run, folder, pages, grid=name, code=code) for run in found]
        _index_page(entries, folder, pages, grid=name)
    return out / "index.html"


def _run_page(run: RunFolder, folder: Path, pages: Pages, **values: Any) -> dict[str, Any]:
    """Write the page of a run, where there can be one; what the index shows of it."""
    file, found, problem = f"{'index-run' if run.name == 'index' else run.name}.html", dict[str, Any](), ""
    values |= {"run": run, "facts": provenance([run]), "changed": bool(run.overrides)}
    if taken := run.manifest.get("taken"):
        problem = f"Taken from {taken} and not executed here, so there is no page."
    else:
        try:
            html, found = pages.notebook(run.notebook_file, **values)
            (folder / file).write_text(html, encoding="utf-8")
        except ValueError:
            gone = "cannot be read" if run.notebook_file.exists() else "is missing"
            problem = f"run.ipynb {gone}, so there is no page."
    title = found.get("title") or run.notebook
    return {
        "run": run, "title": title, "title_html": found.get("title_html") or title, "claim": found.get("claim", ""),
        "figure": found.get("figure", ""), "reason": " ".join(filter(None, (run.reason, problem))),
        # for links: a folder's name need not be text
        "address": quote(os.fsencode(file)) if found else "", "anchor": quote(os.fsencode(run.name)),
    }  # fmt: skip


def _index_page(entries: list[dict[str, Any]], folder: Path, pages: Pages, **values: Any) -> None:
    script = Markup(files("saftnb.publish").joinpath("report/index.js").read_text(encoding="utf-8"))
    values |= {"script": script, "digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}
    sweeps = [_sweep(list(group)) for _, group in groupby(entries, key=lambda entry: entry["run"].notebook)]
    values |= {"entries": entries, "sweeps": sweeps, "facts": provenance([entry["run"] for entry in entries])}
    html = pages.page("runs.html.j2", **values)
    (folder / "index.html").write_text(html, encoding="utf-8")


def _sweep(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one notebook: which of the changed parameters differ, what they recorded."""
    runs = [entry["run"] for entry in entries]
    values = {name: [run.overrides.get(name) for run in runs] for run in runs for name in run.overrides}
    differ = [name for name, given in values.items() if len(set(map(repr, given))) > 1]
    return {
        "entries": entries, "differ": differ, "alike": {n: given[0] for n, given in values.items() if n not in differ},
        "scalars": list(dict.fromkeys(name for run in runs for name in run.scalars)),
        "headlines": [entry for entry in entries if entry["run"].done and entry["run"].table("headline")],
    }  # fmt: skip


def read_runs(folder: Path) -> list[RunFolder]:
    """The runs in a grid's folder in the order of the grid's file, those of one notebook together. ValueError, in one
    line, where there is no such folder or no run in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of a grid's runs, such as runs/pocket")
    runs = grid_runs(folder)
    if not runs:
        grids = [str(path) for path in sorted(folder.iterdir()) if path.is_dir() and grid_runs(path)]
        near = [str(folder.parent)] if RunFolder(folder).begun else grids[:3]
        hint = f"; did you mean {' or '.join(near)}?" if near else " (folders with a manifest.json)"
        raise ValueError(f"{folder} holds no runs{hint}")
    notebooks = [run.notebook for run in runs]
    return sorted(runs, key=lambda run: notebooks.index(run.notebook))


def provenance(runs: list[RunFolder]) -> list[tuple[str, str]]:
    """Commit, date and versions of the runs: each value once, several where the runs differ."""
    commits, versions = dict[str, None](), dict[str, dict[str, None]]()
    for run in runs:
        git, found = (said if isinstance(said := run.manifest.get(key), dict) else {} for key in ("git", "versions"))
        if git.get("commit"):
            commits[f"{str(git['commit'])[:12]}{' with uncommitted changes' if git.get('dirty') else ''}"] = None
        for package, version in found.items():
            versions.setdefault(str(package), {})[str(version)] = None
    listed = ", ".join(f"{package} {' and '.join(found)}" for package, found in versions.items())
    dates = sorted({moment for run in runs if (moment := _moment(run.manifest.get("finished")))})
    span = " to ".join(dict.fromkeys(dates[:1] + dates[-1:]))
    facts = {"commit": "; ".join(commits), "finished": span, "versions": listed}
    return [(name, said or "not recorded") for name, said in facts.items()]


def _moment(said: Any) -> str:
    """A manifest's time as `2026-01-31 14:05 UTC`."""
    try:
        return datetime.fromisoformat(said).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""
