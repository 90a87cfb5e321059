"""One notebook as one HTML page that needs nothing but itself."""

import base64
import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import nbformat
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from saftnb.disk import whole_file
from saftnb.publish.outputs import image_tag, joined, picture_type, render_output
from saftnb.publish.prose import render_markdown
from saftnb.publish.sanitise import text_of
from saftnb.publish.scrub import root_above, scrub

GENERATOR = '<meta name="generator" content="saftnb report">'
# No font, no request, and no script but our own by its hash: only the page's style and the pictures inside it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SWITCH = '<label class="switch"><input type="checkbox" id="show-code"> Show code</label>'
HIDDEN_TAGS = frozenset(["no-report", "papermill-error-cell-tag"])
COMMITTED = "committed-results"  # tags words on the results of the notebook's default parameters
OTHER_PARAMETERS = (
    '<section class="prose note"><p>The notebook’s own words on results are for its default parameters. This run has '
    "others, so they are left out here.</p></section>"
)
WHAT_WE_SEE = re.compile(r"[\s*_#>]*what (?:do )?we see\b[\s*_:.?]*", re.IGNORECASE)
HEADING = re.compile(r"<h([1-6])[^>]*>(.*?)</h\1>", re.DOTALL)


@dataclass(frozen=True)
class Page:
    """What is taken from a notebook: its title, its claim, its cells, the figure of its headline."""

    title: str
    title_html: str
    claim: str
    body: str
    headline_figure: str


def publish_notebook(
    path: Path,
    out_html: Path,
    *,
    title: str | None = None,
    facts: Mapping[str, str] | None = None,
    code: bool = True,
) -> Path:
    """Write a notebook as one self-contained page and return where it is.

    `title` replaces the notebook's first heading, `facts` are shown below it. The code is hidden until the reader
    ticks "Show code"; with `code=False` it is not in the page at all.
    Raises ValueError where `path` is not a readable notebook.
    """
    path, out_html = Path(path), Path(out_html)
    page = read_page(path, code=code)
    strip = facts_strip([(label, escape(str(value))) for label, value in (facts or {}).items()])
    heading = escape(title) if title else page.title_html
    switch = SWITCH if code else ""
    body = f"<header><h1>{heading}</h1>{strip}{switch}</header>\n<main>{page.body}</main>"
    html = document(title or page.title, body)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out_html) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return out_html


def read_page(path: Path, *, code: bool = True, changed: bool = False) -> Page:
    """Read a notebook; ValueError where it cannot be.

    `changed` says that it ran with other parameters than its own: cells tagged "committed-results" are then left out.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notebooks of older formats are fine to read
            notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises many kinds
        raise ValueError(f"{path} is not a notebook that can be read ({type(error).__name__})") from None
    root = root_above(path)
    places = [path.parent, root / "notebooks", root / "notebooks" / "appendix"]
    return _Writer(notebook, partial(scrub, roots=[root]), path.stem, code, changed, places).page()


def document(title: str, body: str, script: str = "") -> str:
    """A whole HTML page around some content; `script` is the only one that may run in it."""
    style = files("saftnb.publish").joinpath("style.css").read_text(encoding="utf-8")
    policy, own = POLICY, ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, own = f"{POLICY}; script-src 'sha256-{digest}'", f"<script>{script}</script>\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
        f"<style>\n{style}</style>\n</head>\n"
        f"<body>\n{body}\n{own}</body>\n</html>\n"
    )


def facts_strip(facts: list[tuple[str, str]]) -> str:
    """Label and (safe) HTML pairs as the strip below a title."""
    items = "".join(f"<div><dt>{escape(label)}</dt><dd>{value}</dd></div>" for label, value in facts)
    return f'<dl class="facts">{items}</dl>' if items else ""


class _Writer:
    """Goes through the cells once; remembers the heading above, so that figures can be described."""

    def __init__(self, notebook: Any, clean, name: str, code: bool, changed: bool, places: list[Path]) -> None:
        cells = [cell for cell in notebook.cells if not HIDDEN_TAGS & set(cell.metadata.get("tags", []))]
        self.cells, self.clean, self.name, self.code = cells, clean, name, code
        self.changed, self.told, self.places = changed, False, places
        self.title_html = ""
        self.claim = ""
        self.heading = ""
        self.figures: list[tuple[bool, str]] = []  # tagged as the headline's?, <img>

    def page(self) -> Page:
        parts = [self._cell(index, cell) for index, cell in enumerate(self.cells)]
        title_html = self.title_html or escape(self.name)
        tagged = [image for chosen, image in self.figures if chosen]
        figure = (tagged or [image for _, image in self.figures] or [""])[-1]
        return Page(text_of(title_html), title_html, self.claim, "\n".join(filter(None, parts)), figure)

    def _cell(self, index: int, cell: Any) -> str:
        if cell.cell_type == "markdown":
            return self._markdown(cell)
        return self._code(index, cell) if cell.cell_type == "code" else ""

    def _markdown(self, cell: Any) -> str:
        if self.changed and COMMITTED in cell.metadata.get("tags", []):
            note, self.told = "" if self.told else OTHER_PARAMETERS, True
            return note
        source = self.clean(joined(cell.source))
        html = render_markdown(source, cell.get("attachments", {}), self.places)
        heading = HEADING.search(html)
        if heading and not self.title_html:
            self.title_html = re.sub(r"</?a\b[^>]*>", "", heading[2])  # it stands inside links
            html = html.replace(heading[0], "", 1)
        for _, inner in HEADING.findall(html):
            self.heading = text_of(inner)
        if self.title_html and not self.claim and (claim := re.search(r"<p>(.*?)</p>", html, re.DOTALL)):
            self.claim = claim[0]
        kind = "prose see" if WHAT_WE_SEE.match(source) else "prose"
        return f'<section class="{kind}">{html}</section>' if html.strip() else ""

    def _code(self, index: int, cell: Any) -> str:
        shown, pictures = [], 0
        for output in cell.get("outputs", []):
            alt = ""
            if picture_type(output):
                alt = self._alt(index, cell, pictures)
                pictures += 1
                chosen = "headline-figure" in cell.metadata.get("tags", [])
                self.figures.append((chosen, image_tag(output, alt)))
            shown.append(render_output(output, alt, self.clean))
        html = "".join(shown)
        if self.code and joined(cell.source).strip():
            source = highlight(self.clean(joined(cell.source)), PythonLexer(), HtmlFormatter(nowrap=True))
            source = f'<pre class="code" tabindex="0" role="group" aria-label="Code">{source}</pre>'
            return f'<section class="output{"" if html else " only-code"}">{source}{html}</section>'
        return f'<section class="output">{html}</section>' if html else ""

    def _alt(self, index: int, cell: Any, nth: int) -> str:
        """The cell's own `alt` (a list has one per picture), else number, heading and what we see."""
        own = cell.metadata.get("alt")
        if isinstance(own, list):
            own = own[nth] if nth < len(own) else None
        if own:
            return self.clean(str(own))
        words = f"Figure {len(self.figures) + 1}: {self.heading or text_of(self.title_html) or self.name}."
        following = self.cells[index + 1] if index + 1 < len(self.cells) else None
        if following is not None and following.cell_type == "markdown":
            source = self.clean(joined(following.source))
            if WHAT_WE_SEE.match(source):
                seen = text_of(render_markdown(WHAT_WE_SEE.sub("", source, count=1)))
                words += " " + re.split(r"(?<=[.!?])\s", seen)[0]
        return words.strip()[:400]
