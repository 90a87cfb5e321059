"""Markdown cells as safe HTML with MathML.

nbconvert's parser finds the formulas; each is set aside under a placeholder while the HTML is
sanitised (the sanitiser knows no MathML, and need not), then put back in its place.
"""

import re

from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from saftnb.publish.maths import to_mathml
from saftnb.publish.sanitise import MARK, attribute, clean_html

END = "\ue001"
PLACEHOLDER = re.compile(f"{MARK}(\\d+){END}")
IMAGE_TYPES = ("image/svg+xml", "image/png", "image/jpeg", "image/gif", "image/webp")


class _Renderer(IPythonRenderer):
    """Markdown to HTML with placeholders for formulas, and images only from the cell itself."""

    def __init__(self, attachments: dict[str, dict[str, str]]) -> None:
        super().__init__(escape=False, exclude_anchor_links=True, attachments=attachments)
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
        if not url.startswith("data:image/"):
            return f"<em>[picture outside the notebook: {attribute(words)}]</em>"
        return f'<img src="{attribute(url)}" alt="{attribute(words)}">'

    def block_mermaidjs(self, code: str) -> str:
        return self.block_code(code)  # drawing it would take a script


def render_markdown(source: str, attachments: dict[str, dict[str, str]] | None = None) -> str:
    """Safe HTML of a markdown text; `attachments` as in a notebook cell."""
    renderer = _Renderer(attachments or {})
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
