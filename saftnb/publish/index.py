"""A folder of runs as a folder of pages: the headline first, then every run, failed ones too."""

import os
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from saftnb.publish.folder import replaced
from saftnb.publish.page import Pages, pages_of
from saftnb.publish.runs import provenance, read_runs
from saftnb.run_folder import RunFolder
from saftnb.scrub import root_above


def publish_runs(runs: Path, out: Path, *, code: bool = True) -> Path:
    """Write the report of a folder of runs, one page a run and an index; return the index.

    `runs` is a grid's folder, such as runs/pocket; `out` is replaced as a whole when every page is
    written. Each page hides its code until the reader ticks "Show code"; `code=False` leaves it out.
    Raises ValueError where there are no runs, or where `out` holds files no report wrote.
    """
    runs, out = Path(runs), Path(out)
    found = read_runs(runs)
    pages, name = pages_of(root_above(runs)), str(found[0].manifest.get("grid") or runs.resolve().name)
    with replaced(out) as folder:
        entries = [_run_page(run, folder, pages, grid=name, code=code) for run in found]
        _index_page(entries, folder, pages, grid=name)
    return out / "index.html"


def _run_page(run: RunFolder, folder: Path, pages: Pages, **values: Any) -> dict[str, Any]:
    if taken := run.manifest.get("taken"):
        return _entry(run, {}, f"Taken from {taken} and not executed here, so there is no page.")
    values |= {"run": run, "facts": provenance([run]), "changed": bool(run.overrides)}
    try:
        html, found = pages.notebook(run.notebook_file, **values)
    except ValueError:
        problem = "cannot be read" if run.notebook_file.exists() else "is missing"
        return _entry(run, {}, f"run.ipynb {problem}, so there is no page.")
    entry = _entry(run, found)
    (folder / entry["file"]).write_text(html, encoding="utf-8")
    return entry


def _entry(run: RunFolder, found: dict[str, Any], problem: str = "") -> dict[str, Any]:
    """What the index shows of a run; `found` is empty where there is no page."""
    title, file = found.get("title") or run.notebook, f"{'index-run' if run.name == 'index' else run.name}.html"
    return {
        "run": run, "title": title, "title_html": found.get("title_html") or title, "claim": found.get("claim"),
        "figure": found.get("figure"), "file": file, "reason": " ".join(filter(None, (run.reason, problem))),
        # for links: a folder's name need not be text
        "address": quote(os.fsencode(file)) if found else "", "anchor": quote(os.fsencode(run.name)),
    }  # fmt: skip


def _index_page(entries: list[dict[str, Any]], folder: Path, pages: Pages, **values: Any) -> None:
    script = Markup(files("saftnb.publish").joinpath("report/index.js").read_text(encoding="utf-8"))
    sweeps = [_sweep(list(group)) for _, group in groupby(entries, key=lambda entry: entry["run"].notebook)]
    facts = provenance([entry["run"] for entry in entries])
    html = pages.page("runs.html.j2", entries=entries, sweeps=sweeps, facts=facts, script=script, **values)
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
