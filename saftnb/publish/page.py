"""One notebook as one HTML page that needs nothing but itself."""

import base64
import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from html import escape, unescape
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote

import nbformat
from nbconvert.exporters import TemplateExporter
from nbconvert.preprocessors import TagRemovePreprocessor

from saftnb.disk import whole_file
from saftnb.publish.outputs import keep_small, read_outputs
from saftnb.publish.prose import read_prose
from saftnb.publish.scrub import root_above, scrub

GENERATOR = '<meta name="generator" content="saftnb report">'
# No font, no request, and no script but our own by its hash: only the page's style and the pictures inside it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SWITCH = '<label class="switch"><input type="checkbox" id="show-code"> Show code</label>'
TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")
ESCAPE = re.compile(r"\\(?:u00([0-7][0-9a-fA-F])|/)")
HIDDEN_TAGS = {"no-report", "papermill-error-cell-tag"}


@dataclass(frozen=True)
class Page:
    """What is taken from a notebook, as safe HTML: its title, its claim, its cells, the figure of its headline."""

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
    header = f'<header><h1 dir="auto">{heading}</h1>{strip}{SWITCH if code else ""}</header>'
    out_html.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out_html) as temporary:
        html = document(title or page.title, f"{header}\n<main>{page.body}</main>")
        temporary.write_text(html, encoding="utf-8")
    return out_html


def read_page(path: Path, *, code: bool = True, changed: bool = False) -> Page:
    """Read a notebook; ValueError where it cannot be.

    `changed` says that it ran with other parameters than its own: cells tagged "committed-results" are then left out.
    """
    root = root_above(path)
    places = [path.parent, root / "notebooks", root / "notebooks" / "appendix"]
    ours = {
        "title": path.stem,
        "title_html": "",
        "claim": "",
        "clean": partial(discreet, roots=[root]),
        "places": places,
        "code": code,
        "changed": changed,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notebooks of older formats are fine to read
        try:
            notebook = nbformat.read(path, as_version=4)
        except Exception as error:  # nbformat raises many kinds
            raise ValueError(f"{path} is not a notebook that can be read ({type(error).__name__})") from None
        try:
            body, found = _exporter().from_notebook_node(notebook, ours)
        except Exception as error:  # a cell, an output or metadata of another kind than the format has
            raise ValueError(f"{path} holds what no page can be made of ({type(error).__name__}: {error})") from error
    title_html = found["title_html"] or escape(found["title"])
    return Page(found["title"], title_html, found["claim"], body, found["figure"])


def discreet(text: str, roots: Iterable[Path] = ()) -> str:
    """`scrub`, also where an encoding of HTML, of URLs or of JSON hides what must not be told: the text is then
    decoded."""
    text = scrub(text, roots)
    for decode in (unescape, unquote, _without_escapes):
        decoded = text
        for _ in range(3):  # encoded twice, it is still easy to read
            before, decoded = decoded, decode(decoded)
            if decoded == before:
                break
            if (known := scrub(decoded, roots)) != decoded:
                text = known
                break
    return text


def _without_escapes(text: str) -> str:
    """Text without the escapes of JSON that a path may be written with."""
    return ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else "/", text)


@cache
def _exporter() -> TemplateExporter:
    """nbconvert with the template and the preprocessors of a report."""
    exporter = TemplateExporter(
        extra_template_basedirs=[str(files("saftnb.publish"))],
        template_name="report",
        file_extension=".html",
        optimistic_validation=True,
    )
    for each in (TagRemovePreprocessor(remove_cell_tags=HIDDEN_TAGS), read_prose, read_outputs, keep_small):
        exporter.register_preprocessor(each, enabled=True)
    exporter.environment.autoescape = True
    return exporter


def document(title: str, body: str, script: str = "") -> str:
    """A whole HTML page around some content; `script` is the only one that may run in it."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{POLICY}; script-src 'sha256-{digest}'" if script else POLICY
    page = _exporter().environment.get_template("page.html.j2")
    html = page.render(title=title, body=body, script=script, policy=policy, generator=GENERATOR) + "\n"
    # What turns the order of letters around is seen, and turns nothing: text can otherwise be disguised as other text.
    html = TURNS.sub(lambda found: f"[U+{ord(found[0]):X}]", html)
    return html.encode("utf-8", "replace").decode("utf-8")  # half a character, which JSON can hold, is no text


def facts_strip(facts: list[tuple[str, str]]) -> str:
    """Label and (safe) HTML pairs as the strip below a title."""
    items = "".join(f"<div><dt>{escape(label)}</dt><dd>{value}</dd></div>" for label, value in facts)
    return f'<dl class="facts">{items}</dl>' if items else ""
