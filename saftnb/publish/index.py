"""A folder of runs as a folder of pages: the headline first, then every run, failed ones too."""

import os
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Entry:
    """A run and what was found in its notebook: nothing where that has no page."""

    run: RunFolder
    found: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def title(self) -> str:
        return self.found.get("title") or self.run.notebook

    @property
    def title_html(self) -> str:
        return self.found.get("title_html") or self.title

    @property
    def file(self) -> str:
        return f"{self.run.name}.html" if self.run.name != "index" else "index-run.html"

    @property
    def address(self) -> str:
        """The page's, for a link: a folder's name need not be text."""
        return quote(os.fsencode(self.file)) if self.found else ""

    @property
    def anchor(self) -> str:
        return quote(os.fsencode(self.run.name))

    @property
    def reason(self) -> str:
        return " ".join(filter(None, (self.run.reason, self.problem)))


@dataclass(frozen=True)
class Sweep:
    """The runs of one notebook, and what differs among them."""

    entries: list[Entry]

    @property
    def single(self) -> bool:
        return len(self.entries) == 1

    @property
    def differ(self) -> list[str]:
        """The changed parameters that have several values."""
        return [
            name for name in self._names if len({repr(entry.run.overrides.get(name)) for entry in self.entries}) > 1
        ]

    @property
    def alike(self) -> dict[str, Any]:
        """The other changed parameters."""
        return {name: self.entries[0].run.overrides.get(name) for name in self._names if name not in self.differ}

    @property
    def scalars(self) -> list[str]:
        return list(dict.fromkeys(name for entry in self.entries for name in entry.run.scalars))

    @property
    def headlines(self) -> list[Entry]:
        """The runs that recorded a headline and are done."""
        return [entry for entry in self.entries if entry.run.done and entry.run.table("headline")]

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for entry in self.entries for name in entry.run.overrides))


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


def _run_page(run: RunFolder, folder: Path, pages: Pages, **values: Any) -> Entry:
    if taken := run.manifest.get("taken"):
        return Entry(run, problem=f"Taken from {taken} and not executed here, so there is no page.")
    values |= {"run": run, "facts": provenance([run]), "changed": bool(run.overrides)}
    try:
        html, found = pages.notebook(run.notebook_file, **values)
    except ValueError:
        problem = "cannot be read" if run.notebook_file.exists() else "is missing"
        return Entry(run, problem=f"run.ipynb {problem}, so there is no page.")
    entry = Entry(run, {name: found[name] for name in ("title", "title_html", "claim", "figure")})
    (folder / entry.file).write_text(html, encoding="utf-8")
    return entry


def _index_page(entries: list[Entry], folder: Path, pages: Pages, **values: Any) -> None:
    script = Markup(files("saftnb.publish").joinpath("report/index.js").read_text(encoding="utf-8"))
    sweeps = [Sweep(list(group)) for _, group in groupby(entries, key=lambda entry: entry.run.notebook)]
    facts = provenance([entry.run for entry in entries])
    html = pages.page("runs.html.j2", entries=entries, sweeps=sweeps, facts=facts, script=script, **values)
    (folder / "index.html").write_text(html, encoding="utf-8")
