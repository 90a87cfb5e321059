"""A folder of runs as a folder of pages: the headline first, then every run, failed ones too."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from saftnb.publish.folder import replaced
from saftnb.publish.page import SWITCH, Page, discreet, document, facts_strip, read_page
from saftnb.publish.runs import provenance, read_runs
from saftnb.publish.sanitise import attribute, scroll_open
from saftnb.publish.tables import duration, is_number, number, table_html, value_text
from saftnb.run_folder import RunFolder
from saftnb.scrub import root_above

QUESTION = "Which fine-tuned models merge well, and why"
SUBJECT = "Sharpness-aware fine-tuning (SAFT) and SVD alignment of LoRA updates (KnOTS)"
STATE = ("Time (budget)", "Status")
SEARCH = (
    '<div role="search" aria-label="Runs" hidden><label>Find <input type="search" autocomplete="off"></label>'
    '<label>Status <select><option value="">all</option><option>done</option><option>not done</option></select></label>'
    '<output aria-live="polite"></output></div>'
)
Scrub = Callable[[str], str]


@dataclass(frozen=True)
class Entry:
    """A run and, where its notebook could be read, its page."""

    run: RunFolder
    page: Page | None
    problem: str = ""

    @property
    def file(self) -> str:
        return f"{self.run.name}.html" if self.run.name != "index" else "index-run.html"

    @property
    def address(self) -> str:
        """The page's, for a link: a folder's name need not be text."""
        return quote(os.fsencode(self.file))

    @property
    def title(self) -> str:
        return self.page.title if self.page else self.run.notebook

    @property
    def title_html(self) -> str:
        return self.page.title_html if self.page else escape(self.run.notebook)

    @property
    def link(self) -> str:
        """The title as a link to the page, or plain where there is none."""
        return f'<a href="{self.address}">{self.title_html}</a>' if self.page else self.title_html

    @property
    def reason(self) -> str:
        return " ".join(filter(None, (self.run.reason, self.problem)))


def publish_runs(runs: Path, out: Path, *, code: bool = True) -> Path:
    """Write the report of a folder of runs, one page a run and an index; return the index.

    `runs` is a grid's folder, such as runs/pocket; `out` is replaced as a whole when every page is
    written. Each page hides its code until the reader ticks "Show code"; `code=False` leaves it out.
    Raises ValueError where there are no runs, or where `out` holds files no report wrote.
    """
    runs, out = Path(runs), Path(out)
    clean = partial(discreet, roots=[root_above(runs)])
    found = read_runs(runs)
    name = clean(str(found[0].manifest.get("grid") or runs.resolve().name))
    with replaced(out) as folder:
        entries = [_entry(run, code) for run in found]
        for entry in entries:
            if entry.page:
                (folder / entry.file).write_text(_run_page(entry, name, clean, code), encoding="utf-8")
        (folder / "index.html").write_text(_index_page(entries, name, clean), encoding="utf-8")
    return out / "index.html"


def _entry(run: RunFolder, code: bool) -> Entry:
    taken = run.manifest.get("taken")
    if taken:
        return Entry(run, None, f"Taken from {taken} and not executed here, so there is no page.")
    try:
        return Entry(run, read_page(run.notebook_file, code=code, changed=bool(run.overrides)))
    except ValueError:
        problem = "cannot be read" if run.notebook_file.exists() else "is missing"
        return Entry(run, None, f"run.ipynb {problem}, so there is no page.")


def _run_page(entry: Entry, name: str, clean: Scrub, code: bool) -> str:
    run, page = entry.run, entry.page
    assert page is not None
    back = f'<nav><a href="index.html">All runs of {escape(name)}</a></nav>'
    facts = [
        ("notebook", escape(clean(run.notebook))),
        ("status", _status(run)),
        ("time (budget)", _time(run)),
        *([("peak memory", f"{memory:.2g} GiB")] if is_number(memory := run.manifest.get("peak_memory")) else []),
        ("parameters", _parameters(run, clean)),
    ]
    reason = "" if run.done else f'<p class="reason">{escape(clean(entry.reason))}</p>'
    top = f"{back}<h1>{page.title_html}</h1>{_verdict(run, clean)}{facts_strip(facts)}"
    header = f"<header>{top}{reason}{SWITCH if code else ''}</header>"
    return document(page.title, f"{header}\n<main>{page.body}</main>\n{_foot([run], clean)}")


def _parameters(run: RunFolder, clean: Scrub) -> str:
    """Every effective parameter; the overridden ones first and marked."""
    merged = {**run.overrides, **run.parameters}
    return _pairs(merged, value_text, clean, marked=set(run.overrides)) or "defaults"


def _pairs(values: dict[str, Any], show: Callable[[Any], str], clean: Scrub, marked: Collection[str] = ()) -> str:
    """Names and values as a row of small labels."""
    items = []
    for name, value in values.items():
        kind = ' class="changed" title="overridden"' if name in marked else ""
        text = escape(clean(show(value)))
        items.append(f"<span{kind}>{escape(clean(str(name)).replace('_', ' '))} <b>{text}</b></span>")
    return f'<span class="pairs">{" ".join(items)}</span>' if items else ""


def _status(run: RunFolder) -> str:
    return f'<span class="status {"good" if run.done else "bad"}">{escape(run.status)}</span>'


def _index_page(entries: list[Entry], name: str, clean: Scrub) -> str:
    done = sum(entry.run.done for entry in entries)
    bad = [entry for entry in entries if not entry.run.done]
    notebooks = len({entry.run.notebook for entry in entries})
    counts = (
        f"Grid <b>{escape(name)}</b>: <a href='#runs'>{_count(len(entries), 'run')}</a> of "
        f"{_count(notebooks, 'notebook')}, {done} done"
    )
    if bad:
        counts += f', <a class="bad" href="#{quote(os.fsencode(bad[0].run.name))}">{len(bad)} not done</a>'
    lead = f'<p class="lead">{SUBJECT}.</p><p class="counts">{counts}.</p>'
    header = f"<header><h1>{QUESTION}</h1>{lead}</header>"
    headlines = "".join(_headline(list(group), clean) for _, group in _by_notebook(entries))
    body = f"{header}\n<main>{headlines}{_all_runs(entries, clean)}</main>\n"
    script = files("saftnb.publish").joinpath("index.js").read_text(encoding="utf-8")
    return document(f"{name}: {QUESTION.lower()}", body + _foot([entry.run for entry in entries], clean), script)


def _by_notebook(entries: list[Entry]):
    return groupby(entries, key=lambda entry: entry.run.notebook)


def _count(amount: int, noun: str) -> str:
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


def _headline(group: list[Entry], clean: Scrub) -> str:
    """The headline of one notebook: its question, what came out (a recorded `verdict`) and its figure. Folded away are
    its claim, the table, and those of further runs of a sweep."""
    chosen = [entry for entry in group if entry.run.done and entry.run.table("headline")]
    if not chosen:
        return ""
    first, others = chosen[0], chosen[1:]
    page = first.page
    figure = f'<figure class="picture">{page.headline_figure}</figure>' if page and page.headline_figure else ""
    which = f'<p class="variant">{_variant(first, clean)}</p>' if others else ""
    more = "".join(f'<p class="variant">{_variant(run, clean)}</p>{_table(run, clean)}' for run in others)
    summary = "The claim and the numbers" + (f", and those of {_count(len(others), 'other run')}" if others else "")
    inside = f"{page.claim if page else ''}{which}{_table(first, clean)}{more}"
    # Without a figure the numbers are what there is to see.
    folded = f"<details{'' if figure else ' open'}><summary>{summary}</summary>{inside}</details>"
    return f'<article class="headline"><h2>{first.link}</h2>{_verdict(first.run, clean)}{figure}{folded}</article>'


def _verdict(run: RunFolder, clean: Scrub) -> str:
    found = escape(clean(run.verdict))
    return f'<p class="verdict"><b>In this run:</b> {found}</p>' if found else ""


def _table(entry: Entry, clean: Scrub) -> str:
    table = entry.run.table("headline")
    return table_html(table, clean(f"Headline of {entry.title}"), clean) if table else ""


def _variant(entry: Entry, clean: Scrub) -> str:
    """What sets a run of a sweep apart, as a link to its page."""
    words = _pairs(entry.run.overrides, value_text, clean) or "default parameters"
    return f'<a href="{entry.address}">{words}</a>' if entry.page else words


def _all_runs(entries: list[Entry], clean: Scrub) -> str:
    """Every run: those of one notebook in a table of their own, with a column for each changed parameter and number;
    notebooks that were run once together in the first."""
    groups = [list(group) for _, group in _by_notebook(entries)]
    once = [entry for group in groups if len(group) == 1 for entry in group]
    first = [_table_of_notebooks(once, clean)] if once else []
    swept = [_table_of_sweep(group, clean) for group in groups if len(group) > 1]
    return f'<section class="runs"><h2 id="runs">All runs</h2>{SEARCH}{"".join(first + swept)}</section>'


def _table_of_notebooks(entries: list[Entry], clean: Scrub) -> str:
    rows = []
    for entry in entries:
        run = entry.run
        small = f"<small>{escape(clean(run.notebook))} {_pairs(run.overrides, value_text, clean)}</small>"
        numbers = f"<td>{_pairs(run.scalars, _scalar, clean)}</td>"
        rows.append(_rows(entry, f"{_named(f'{entry.link}{small}', clean(entry.title))}{numbers}", clean))
    heads = ["Notebook, changed parameters", "Headline numbers", *STATE]
    return _sortable("", "Notebooks that were run once", heads, rows)


def _table_of_sweep(entries: list[Entry], clean: Scrub) -> str:
    names = list(dict.fromkeys(name for entry in entries for name in entry.run.overrides))
    differ = [name for name in names if len({repr(entry.run.overrides.get(name)) for entry in entries}) > 1]
    found = list(dict.fromkeys(name for entry in entries for name in entry.run.scalars))
    rows = []
    for entry in entries:
        run = entry.run
        values = [run.overrides.get(name) for name in differ] or [run.name]
        first = escape(clean(value_text(values[0])))
        first = f'<a href="{entry.address}">{first}</a>' if entry.page else first
        cells = [_named(first, None if values[0] is None else clean(str(values[0])))] + [
            _cell(value, value_text, clean) for value in values[1:]
        ]
        cells += [_cell(run.scalars.get(name), _scalar, clean) for name in found]
        rows.append(_rows(entry, "".join(cells), clean))
    heads = [clean(str(name)).replace("_", " ") for name in (differ or ["run"]) + found]
    alike = {name: entries[0].run.overrides.get(name) for name in names if name not in differ}
    small = f"<small>{escape(clean(entries[0].run.notebook))} {_pairs(alike, value_text, clean)}</small>"
    title = f"<h3>{entries[0].title_html} {small}</h3>"
    return _sortable(title, clean(f"Runs of {entries[0].title}"), [*heads, *STATE], rows)


def _sortable(title: str, label: str, heads: list[str], rows: list[str]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    table = f"<table><thead><tr>{head}</tr></thead>{''.join(rows)}</table>"
    return f'<div class="batch">{title}{scroll_open(label)}{table}</div></div>'


def _rows(entry: Entry, cells: str, clean: Scrub) -> str:
    """One run with its time and status; a reason stands below. The script sorts by the cells' `data-value`."""
    run = entry.run
    words = " ".join([run.name, *(f"{name}={value_text(value)}" for name, value in run.parameters.items())])
    seconds = run.manifest.get("seconds")
    state = f'<td class="time"{_value(seconds)}>{_time(run)}</td><td{_value(run.status)}>{_status(run)}</td>'
    row = f'<tr id="{attribute(run.name)}">{cells}{state}</tr>'
    if entry.reason:
        width = cells.count("<td") + 3
        row += f'<tr class="why"><td colspan="{width}"><p class="reason">{escape(clean(entry.reason))}</p></td></tr>'
    status = "done" if run.done else "not done"
    return f'<tbody data-words="{attribute(clean(words))}" data-status="{status}">{row}</tbody>'


def _named(html: str, value: Any) -> str:
    return f'<th scope="row"{_value(value)}>{html}</th>'


def _cell(value: Any, show: Callable[[Any], str], clean: Scrub) -> str:
    if value is None:
        return "<td></td>"
    right = ' class="num"' if is_number(value) else ""
    return f"<td{right}{_value(value, clean)}>{escape(clean(show(value)))}</td>"


def _value(value: Any, clean: Scrub = str) -> str:
    """What a cell is sorted by."""
    return "" if value is None else f' data-value="{attribute(clean(str(value)))}"'


def _time(run: RunFolder) -> str:
    """The time that a run took beside its budget; over it, a word says so."""
    seconds, budget = run.manifest.get("seconds"), run.manifest.get("budget")
    text = duration(seconds, budget)
    over = is_number(seconds) and is_number(budget) and seconds > budget
    return escape(text) + (' <strong class="over">over</strong>' if over else "")


def _scalar(value: Any) -> str:
    return number(value) if is_number(value) else value_text(value)


def _foot(runs: list[RunFolder], clean: Scrub) -> str:
    facts = [(label, escape(clean(text))) for label, text in provenance(runs)]
    return f"<footer>{facts_strip(facts)}</footer>"
