"""Markdown cells as safe HTML with MathML: nbconvert's parser, math-core for the formulas, the sanitiser last."""

import base64
import re
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from typing import Any

from markupsafe import Markup
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from saftnb.publish.maths import to_mathml
from saftnb.publish.sanitise import clean_html, text_of, words_of
from saftnb.publish.text import readable

COMMITTED = "committed-results"  # tags words on the results of the notebook's default parameters
OTHER_PARAMETERS = "The notebook’s words on results are for its default parameters, and left out: this run has others."
WHAT_WE_SEE = re.compile(r"[\s*_#>]*what (?:do )?we see\b[\s*_:.?]*", re.IGNORECASE)
HEADING = re.compile(r"<h([1-6])[^>]*>(.*?)</h\1>", re.DOTALL)
CLAIM = re.compile(r"<p>.*?</p>", re.DOTALL)
DRAWING = re.compile(r"(?:\.\./)?drawings/[\w\-]+\.svg")  # the project's own, beside its notebooks
SPACES = re.compile(r"([ \t]{100})[ \t]+")  # the parser takes the square of their number
LONGEST, LONGEST_TITLE = 20_000, 200  # characters of one cell that are read as markdown, and of a title
PICTURES = ("image/png", "image/svg+xml", "image/jpeg", "image/gif", "image/webp")


class _Renderer(IPythonRenderer):
    """Formulas as MathML; images come from the cell itself or the project's drawings."""

    block_mermaidjs = IPythonRenderer.block_code  # drawing it would take a script

    def __init__(self, attachments: dict[str, dict[str, str]], places: Sequence[Path]) -> None:
        super().__init__(escape=False, exclude_anchor_links=True, attachments=attachments)
        self.places = places
        self.inline_math = lambda body: to_mathml(body)
        self.block_math = lambda body: to_mathml(body, display=True)

    def latex_environment(self, name: str, body: str) -> str:
        return to_mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", display=True)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        bundle = self.attachments.get(url.removeprefix("attachment:"), {})
        drawn = [place / url for place in self.places if DRAWING.fullmatch(url) and (place / url).is_file()]
        if drawn:
            bundle = {"image/svg+xml": base64.b64encode(drawn[0].read_bytes()).decode()}
        kind = next((kind for kind in PICTURES if kind in bundle), "")
        url = f"data:{kind};base64,{bundle[kind]}" if kind else url
        if not url.startswith("data:image/"):
            return f"<em>[picture outside the notebook: {escape(text_of(text))}]</em>"
        return f'<img src="{escape(url)}" alt="{escape(text_of(text))}">'


def render_markdown(
    source: str, clean: Callable[[str], str] = str, attachments: Any = None, places: Sequence[Path] = ()
) -> Markup:
    """Safe HTML of a markdown text without what `clean` takes out; `attachments` as in a notebook cell; `places` are
    folders that may hold a folder `drawings`, whose SVGs are put into the page as pictures."""
    html, source = "", SPACES.sub(r"\1", clean(source))  # before its signs become markup: a secret may hold some
    if len(source) <= LONGEST:
        html = clean_html(MarkdownWithMath(renderer=_Renderer(attachments or {}, places)).render(source), clean)
    return Markup(html or (f"<pre>{escape(readable(source, clean))}</pre>" if source.strip() else ""))


def read_prose(notebook: Any, resources: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A preprocessor: cells get `parts` for the template, their heading, what is seen; `resources` title and claim."""
    heading, told, clean = "", False, resources["clean"]
    for before, cell in pairwise([NotebookNode(metadata={}), *notebook.cells]):
        tags, alt = cell.metadata.get("tags", []), cell.metadata.get("alt", "")
        cell.metadata = NotebookNode(tags=tags, alt=alt, seen="", heading=heading, parts=[])
        if cell.cell_type != "markdown":
            continue
        if resources["changed"] and COMMITTED in tags:
            cell.metadata.parts, told = ([] if told else [("note", OTHER_PARAMETERS)]), True
            continue
        html = render_markdown(cell.source, clean, cell.get("attachments"), resources["places"])
        found = HEADING.search(html)
        if found and not resources["title_html"]:
            title, html = text_of(found[2]), html.replace(found[0], "", 1)
            resources["title"] = short = shorten(title, LONGEST_TITLE, placeholder=" …")
            resources["title_html"] = words_of(found[2]) if title == short else Markup.escape(short)
        if resources["title_html"] and not resources["claim"] and (claim := CLAIM.search(html)):
            resources["claim"] = clean_html(claim[0])  # a formula's text may hold a paragraph: closes it
        heading = ([heading] + [text_of(inner) for _, inner in HEADING.findall(html)])[-1]
        see = WHAT_WE_SEE.match(cell.source)
        if see:
            seen = text_of(render_markdown(cell.source[see.end() :], clean))
            before.metadata.seen = re.split(r"(?<=[.!?])\s", seen)[0]
        cell.metadata.parts = [("see" if see else "prose", Markup(html.strip()))] if html.strip() else []
    return notebook, resources
