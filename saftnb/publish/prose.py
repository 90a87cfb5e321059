"""Markdown cells as safe HTML with MathML.

nbconvert's parser finds the formulas; each is set aside under a placeholder while the HTML is
sanitised (the sanitiser knows no MathML, and need not), then put back in its place.
"""

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from saftnb.publish.maths import to_mathml
from saftnb.publish.sanitise import MARK, attribute, clean_html

END = "\ue001"
PLACEHOLDER = re.compile(f"{MARK}(\\d+){END}")
DRAWING = re.compile(r"(?:\.\./)?drawings/[\w\-]+\.svg")  # the project's own, beside its notebooks
IMAGE_TYPES = ("image/svg+xml", "image/png", "image/jpeg", "image/gif", "image/webp")


class _Renderer(IPythonRenderer):
    """Markdown to HTML with placeholders for formulas; images come from the cell itself or the project's drawings."""

    def __init__(self, attachments: dict[str, dict[str, str]], places: Sequence[Path]) -> None:
        super().__init__(escape=False, exclude_anchor_links=True, attachments=attachments)
        self.places = places
        self.formulas: list[tuple[str, bool]] = []

    def _set_aside(self, latex: str, display: bool) -> str:
        self.formulas.append((latex, display))
        return f"{MARK}{len(self.formulas) - 1}{END}"

    def block_math(self, body: str) -> str:
        return self._set_aside(body, True)

    def inline_math(self, body: str) -> str:
        return self._set_aside(body, False)

    def latex_environment(self, name: str, body: str) -> str:
        return self._set_aside(f"\\begin{{{name}}}{body}\\end{{{name}}}", True)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        words = PLACEHOLDER.sub(lambda mark: self.formulas[int(mark[1])][0], text or "")
        if url.startswith("attachment:"):
            bundle = self.attachments.get(url.removeprefix("attachment:"), {})
            for kind in IMAGE_TYPES:
                if kind in bundle:
                    url = f"data:{kind};base64,{bundle[kind]}"
        if DRAWING.fullmatch(url):
            found = [place / url for place in self.places if (place / url).is_file()]
            if found:
                url = f"data:image/svg+xml;base64,{base64.b64encode(found[0].read_bytes()).decode()}"
        if not url.startswith("data:image/"):
            return f"<em>[picture outside the notebook: {attribute(words)}]</em>"
        return f'<img src="{attribute(url)}" alt="{attribute(words)}">'

    def block_mermaidjs(self, code: str) -> str:
        return self.block_code(code)  # drawing it would take a script


def render_markdown(
    source: str, attachments: dict[str, dict[str, str]] | None = None, places: Sequence[Path] = ()
) -> str:
    """Safe HTML of a markdown text; `attachments` as in a notebook cell; `places` are folders that may hold a folder
    `drawings`, whose SVGs are put into the page as pictures."""
    renderer = _Renderer(attachments or {}, places)
    source = source.replace(MARK, "").replace(END, "")
    safe = clean_html(MarkdownWithMath(renderer=renderer).render(source))

    def formula(mark: re.Match[str]) -> str:
        number = int(mark[1])
        if number >= len(renderer.formulas):
            return ""
        latex, display = renderer.formulas[number]
        return to_mathml(latex, display=display)

    return PLACEHOLDER.sub(formula, safe)


def is_math(text: str) -> bool:
    """Whether a text/latex output is a formula, and not a LaTeX table or document."""
    return text.strip().startswith(("$", "\\begin{equation", "\\begin{align", "\\begin{gather"))
