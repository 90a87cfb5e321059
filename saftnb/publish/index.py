"""A folder of runs as a folder of pages: the headline first, then every run, failed ones too."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from saftnb.publish.folder import replaced
from saftnb.publish.page import Page, document, facts_strip, read_page
from saftnb.publish.runs import RunFolder, provenance, read_runs
from saftnb.publish.sanitise import scroll_open
from saftnb.publish.scrub import root_above, scrub
from saftnb.publish.tables import duration, is_number, number, table_html, value_text

QUESTION = "Which fine-tuned models merge well, and why"
SUBJECT = "Sharpness-aware fine-tuning (SAFT) and SVD alignment of LoRA updates (KnOTS)"
WIDE = 3  # a table of more columns stands below its figure, not beside it
Scrub = Callable[[str], str]


@dataclass(frozen=True)
class Entry:
    """A run and, where its notebook could be read, its page."""

    run: RunFolder
    page: Page | None
    problem: str = ""

    @property
    def file(self) -> str:
        return f"{self.run.name}.html"

    @property
    def title(self) -> str:
        return self.page.title if self.page else self.run.notebook

    @property
    def title_html(self) -> str:
        return self.page.title_html if self.page else escape(self.run.notebook)

    @property
    def link(self) -> str:
        """The title as a link to the page, or plain where there is none."""
        return f'<a href="{quote(self.file)}">{self.title_html}</a>' if self.page else self.title_html

    @property
    def reason(self) -> str:
        return " ".join(filter(None, (self.run.reason, self.problem)))


def publish_runs(runs: Path, out: Path, *, code: bool = False) -> Path:
    """Write the report of a folder of runs, one page a run and an index; return the index.

    `runs` is a grid's folder, such as runs/pocket; `out` is replaced as a whole when every page is
    written. `code=True` puts each cell's code behind a small switch; otherwise it is left out.
    Raises ValueError where there are no runs, or where `out` holds files no report wrote.
    """
    runs, out = Path(runs), Path(out)
    clean = partial(scrub, roots=[root_above(runs)])
    found = read_runs(runs)
    name = clean(str(found[0].manifest.get("grid") or runs.resolve().name))
    with replaced(out) as folder:
        entries = [_entry(run, code) for run in found]
        for entry in entries:
            if entry.page:
                (folder / entry.file).write_text(_run_page(entry, name, clean), encoding="utf-8")
        (folder / "index.html").write_text(_index_page(entries, name, clean), encoding="utf-8")
    return out / "index.html"


def _entry(run: RunFolder, code: bool) -> Entry:
    taken = run.manifest.get("taken")
    if taken:
        return Entry(run, None, f"Taken from {taken} and not executed here, so there is no page.")
    try:
        return Entry(run, read_page(run.path / "run.ipynb", code=code))
    except ValueError:
        problem = "cannot be read" if (run.path / "run.ipynb").exists() else "is missing"
        return Entry(run, None, f"run.ipynb {problem}, so there is no page.")


def _run_page(entry: Entry, name: str, clean: Scrub) -> str:
    run, page = entry.run, entry.page
    assert page is not None
    back = f'<nav><a href="index.html">All runs of {escape(name)}</a></nav>'
    facts = [
        ("notebook", escape(clean(run.notebook))),
        ("status", _status(run)),
        ("time", escape(duration(run.manifest.get("seconds"), run.manifest.get("budget")))),
        ("parameters", _parameters(run, clean)),
    ]
    reason = "" if run.done else f'<p class="reason">{escape(clean(entry.reason))}</p>'
    header = f"<header>{back}<h1>{page.title_html}</h1>{facts_strip(facts)}{reason}</header>"
    return document(page.title, f"{header}\n<main>{page.body}</main>\n{_foot([run], clean)}")


def _parameters(run: RunFolder, clean: Scrub) -> str:
    """Every effective parameter; the overridden ones first and marked."""
    merged = {**run.overrides, **run.parameters}
    return _pairs(merged, value_text, clean, marked=set(run.overrides)) or "defaults"


def _pairs(values: dict, show: Callable, clean: Scrub, marked: set | frozenset = frozenset()) -> str:
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
        counts += f', <a class="bad" href="#{quote(bad[0].run.name)}">{len(bad)} not done</a>'
    lead = f'<p class="lead">{SUBJECT}.</p><p class="counts">{counts}.</p>'
    header = f"<header><h1>{QUESTION}</h1>{lead}</header>"
    headlines = "".join(_headline(list(group), clean) for _, group in _by_notebook(entries))
    body = f"{header}\n<main>{headlines}{_run_table(entries, clean)}</main>\n"
    return document(f"{name}: {QUESTION.lower()}", body + _foot([entry.run for entry in entries], clean))


def _by_notebook(entries: list[Entry]):
    return groupby(entries, key=lambda entry: entry.run.notebook)


def _count(amount: int, noun: str) -> str:
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


def _headline(group: list[Entry], clean: Scrub) -> str:
    """The headline of one notebook: its claim, what came out here (a recorded `verdict`), its figure and table.

    Further runs of a sweep are folded away.
    """
    chosen = [entry for entry in group if entry.run.done and entry.run.table("headline")]
    if not chosen:
        return ""
    first, others = chosen[0], chosen[1:]
    claim = first.page.claim if first.page else ""
    folded = "".join(f'<p class="variant">{_variant(run, clean)}</p>{_table(run, clean)}' for run in others)
    if folded:
        summary = f"the same table for {_count(len(others), 'other run')} of this notebook"
        folded = f'<details class="others"><summary>{summary}</summary>{folded}</details>'
    which = f'<p class="variant">{_variant(first, clean)}</p>' if others else ""
    verdict = first.run.scalars.get("verdict")
    found = f'<p class="verdict"><b>In these runs:</b> {escape(clean(str(verdict)))}</p>' if verdict else ""
    top = f"<h2>{first.link}</h2>{claim}{which}{found}"
    return f'<article class="headline">{top}{_exhibit(first, clean)}{folded}</article>'


def _exhibit(entry: Entry, clean: Scrub) -> str:
    """Table and figure, side by side where the table is narrow enough."""
    table = entry.run.table("headline")
    figure = entry.page.headline_figure if entry.page else ""
    picture = f'<figure class="picture">{figure}</figure>' if figure else ""
    wide = " wide" if not picture or (table and len(table["columns"]) > WIDE) else ""
    return f'<div class="exhibit{wide}">{_table(entry, clean)}{picture}</div>'


def _table(entry: Entry, clean: Scrub) -> str:
    table = entry.run.table("headline")
    return table_html(table, clean(f"Headline of {entry.title}"), clean) if table else ""


def _variant(entry: Entry, clean: Scrub) -> str:
    """What sets a run of a sweep apart, as a link to its page."""
    words = _pairs(entry.run.overrides, value_text, clean) or "default parameters"
    return f'<a href="{quote(entry.file)}">{words}</a>' if entry.page else words


def _run_table(entries: list[Entry], clean: Scrub) -> str:
    """Every run; the runs of one notebook stand together under its title."""
    bodies = []
    for _, group in _by_notebook(entries):
        rows = list(group)
        title = f"{rows[0].title_html} <small>{escape(clean(rows[0].run.notebook))}, {len(rows)} runs</small>"
        label = f'<tr class="group"><th scope="rowgroup" colspan="4">{title}</th></tr>'
        shown = "".join(_run_row(entry, clean, alone=len(rows) == 1) for entry in rows)
        sweep = f'<tbody class="sweep">{label}{shown}</tbody>'
        bodies.append(sweep if len(rows) > 1 else f"<tbody>{shown}</tbody>")
    heads = ("Notebook, changed parameters", "Headline numbers", "Time", "Status")
    head = "".join(f'<th scope="col">{title}</th>' for title in heads)
    table = f"<table><thead><tr>{head}</tr></thead>{''.join(bodies)}</table>"
    heading = '<h2 id="runs">All runs</h2>'
    return f'<section class="runs">{heading}{scroll_open("All runs")}{table}</div></section>'


def _run_row(entry: Entry, clean: Scrub, *, alone: bool) -> str:
    """One run: named by its notebook, or in a sweep by what sets it apart; a reason stands below."""
    run = entry.run
    seconds = duration(run.manifest.get("seconds"), run.manifest.get("budget"))
    changed = _pairs(run.overrides, value_text, clean)
    small = f"<small>{escape(clean(run.notebook))} {changed}</small>"
    name = f"{entry.link}{small}" if alone else _variant(entry, clean)
    row = (
        f'<tr id="{escape(run.name, quote=True)}"><th scope="row">{name}</th>'
        f'<td>{_pairs(run.scalars, _scalar, clean)}</td><td class="time">{escape(seconds)}</td>'
        f"<td>{_status(run)}</td></tr>"
    )
    why = f'<p class="reason">{escape(clean(entry.reason))}</p>' if entry.reason else ""
    return f'{row}<tr class="why"><td colspan="4">{why}</td></tr>' if why else row


def _scalar(value) -> str:
    return number(value) if is_number(value) else value_text(value)


def _foot(runs: list[RunFolder], clean: Scrub) -> str:
    facts = [(label, escape(clean(text))) for label, text in provenance(runs)]
    return f"<footer>{facts_strip(facts)}</footer>"
