"""Markdown cells as safe HTML with MathML: nbconvert's parser, latex2mathml for the formulas, the sanitiser last."""

import base64
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from saftnb.publish.maths import to_mathml
from saftnb.publish.sanitise import INLINE, TAG, attribute, clean_html, ends, text_of

COMMITTED = "committed-results"  # tags words on the results of the notebook's default parameters
OTHER_PARAMETERS = Markup(
    "<p>The notebook’s own words on results are for its default parameters. This run has others, so they are left out "
    "here.</p>"
)
WHAT_WE_SEE = re.compile(r"[\s*_#>]*what (?:do )?we see\b[\s*_:.?]*", re.IGNORECASE)
HEADING = re.compile(r"<h([1-6])[^>]*>(.*?)</h\1>", re.DOTALL)
MATHS = re.compile(r"<math\b.*?</math>", re.DOTALL)
DRAWING = re.compile(r"(?:\.\./)?drawings/[\w\-]+\.svg")  # the project's own, beside its notebooks
SPACES = re.compile(r"([ \t]{100})[ \t]+")  # the parser takes the square of their number
LONGEST = 20_000  # characters of one cell that are read as markdown
LONGEST_TITLE = 200  # characters
IMAGE_TYPES = ("image/svg+xml", "image/png", "image/jpeg", "image/gif", "image/webp")


class _Renderer(IPythonRenderer):
    """Formulas as MathML; images come from the cell itself or the project's drawings."""

    def __init__(self, attachments: dict[str, dict[str, str]], places: Sequence[Path]) -> None:
        super().__init__(escape=False, exclude_anchor_links=True, attachments=attachments)
        self.places = places

    def block_math(self, body: str) -> str:
        return to_mathml(body, display=True)

    def inline_math(self, body: str) -> str:
        return to_mathml(body)

    def latex_environment(self, name: str, body: str) -> str:
        return to_mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", display=True)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        bundle = self.attachments.get(url.removeprefix("attachment:"), {})
        for kind in IMAGE_TYPES:
            if kind in bundle:
                url = f"data:{kind};base64,{bundle[kind]}"
        drawn = [place / url for place in self.places if DRAWING.fullmatch(url) and (place / url).is_file()]
        if drawn:
            url = f"data:image/svg+xml;base64,{base64.b64encode(drawn[0].read_bytes()).decode()}"
        if not url.startswith("data:image/"):
            return f"<em>[picture outside the notebook: {escape(text_of(text))}]</em>"
        return f'<img src="{attribute(url)}" alt="{attribute(text_of(text))}">'

    def block_mermaidjs(self, code: str) -> str:
        return self.block_code(code)  # drawing it would take a script


def render_markdown(
    source: str, clean: Callable[[str], str] = str, attachments: Any = None, places: Sequence[Path] = ()
) -> Markup:
    """Safe HTML of a markdown text without what `clean` takes out; `attachments` as in a notebook cell; `places` are
    folders that may hold a folder `drawings`, whose SVGs are put into the page as pictures."""
    html, source = "", SPACES.sub(r"\1", clean(source))  # before its signs become markup: a secret may hold some
    if len(source) <= LONGEST:
        html = clean_html(MarkdownWithMath(renderer=_Renderer(attachments or {}, places)).render(source), clean)
    return Markup(html or (f"<pre>{escape(ends(source, LONGEST))}</pre>" if source.strip() else ""))


def read_prose(notebook: Any, resources: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A preprocessor: markdown cells become safe HTML, and code cells get the heading that they stand under; title and
    claim go into `resources`."""
    heading, told = "", False
    for cell in notebook.cells:
        known = {name: cell.metadata[name] for name in ("tags", "alt") if name in cell.metadata}
        cell.metadata = NotebookNode(known, heading=heading)  # the rest is the notebook's, not for the template
        if cell.cell_type != "markdown":
            continue
        if resources["changed"] and COMMITTED in cell.metadata.get("tags", []):
            cell.metadata.kind, cell.source, told = "prose note", "" if told else OTHER_PARAMETERS, True
            continue
        html = render_markdown(cell.source, resources["clean"], cell.get("attachments"), resources["places"])
        found = HEADING.search(html)
        if found and not resources["title_html"]:
            # It stands inside links, and in the index beside other runs: nothing in it may be painted over those.
            inside = re.sub(r"</?a\b[^>]*>| style=\"[^\"]*\"", "", found[2])
            # A heading may hold blocks, another heading too: cut there, it would open what it does not close.
            plain = not TAG.search(INLINE.sub("", MATHS.sub("", inside))) and "<mpadded" not in inside
            words = text_of(found[2])
            resources["title"] = words if len(words) <= LONGEST_TITLE else f"{words[:LONGEST_TITLE]} …"
            resources["title_html"] = inside if plain and words == resources["title"] else escape(resources["title"])
            html = html.replace(found[0], "", 1)
        if resources["title_html"] and not resources["claim"] and (claim := re.search(r"<p>.*?</p>", html, re.DOTALL)):
            resources["claim"] = clean_html(claim[0])  # a formula's text may hold a paragraph: closes it
        heading = ([heading] + [text_of(inner) for _, inner in HEADING.findall(html)])[-1]
        see = WHAT_WE_SEE.match(cell.source)
        if see:
            cell.metadata.seen = re.split(
                r"(?<=[.!?])\s", text_of(render_markdown(cell.source[see.end() :], resources["clean"]))
            )[0]
        cell.metadata.kind, cell.source = "prose see" if see else "prose", Markup(html.strip())
    return notebook, resources
