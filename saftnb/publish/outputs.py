"""The outputs of code cells, each as its kind and what is shown of it."""

import base64
import re
from collections.abc import Callable
from typing import Any

from markupsafe import Markup
from nbformat.v4 import new_output

from saftnb.publish.prose import render_markdown
from saftnb.publish.sanitise import attribute, clean_html
from saftnb.publish.scrub import plain, shorten, without_progress

PICTURES = ("image/png", "image/svg+xml", "image/jpeg", "image/gif", "image/webp")
# What Python prints for the value of a drawing call: no reader of a report wants it.
DRAWING = re.compile(r"[(\[]*(?:array\(\[*)?<(?:Figure|Axes|matplotlib|seaborn)\b.*|Text\(.*", re.DOTALL)
Scrub = Callable[[str], str]
FORMULA = ("$", "\\begin{equation", "\\begin{align", "\\begin{gather")  # and not a LaTeX table or document


def read_outputs(notebook: Any, resources: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A preprocessor, after that of the prose: every output becomes a pair of its kind and what is shown of it, and
    pictures are described by the text around them; `resources` get the figure of the headline."""
    clean, figures, tagged = resources["clean"], [], []
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if cell.cell_type != "code":
            continue
        cell.source = clean(cell.source) if resources["code"] else ""
        seen = following.metadata.get("seen", "") if following else ""
        shown, pictures = [], 0
        for output in cell.outputs:
            kind = next((kind for kind in PICTURES if kind in output.get("data", {})), None)
            if kind:
                words = f"Figure {len(figures) + 1}: {cell.metadata.heading or resources['title']}. {seen}"
                figures.append(_picture(output, kind, clean(_own_alt(cell, pictures) or words.strip()[:400])))
                tagged += figures[-1:] * ("headline-figure" in cell.metadata.get("tags", []))
                shown.append(("picture", figures[-1]))
                pictures += 1
            else:
                shown.append(_texts(output, clean))
        cell.outputs = [
            new_output("display_data", metadata={"kind": kind, "shown": words}) for kind, words in shown if words
        ]
    resources["figure"] = (tagged or figures or [""])[-1]
    return notebook, resources


def _own_alt(cell: Any, nth: int) -> str:
    """The cell's own `alt`; a list has one per picture."""
    own = cell.metadata.get("alt") or ""
    return str(own) if not isinstance(own, list) else str(own[nth]) if nth < len(own) else ""


def _picture(output: Any, kind: str, alt: str) -> Markup:
    content = output.data[kind]
    if kind == "image/svg+xml":
        # Inside <img> an SVG can neither run scripts nor load anything.
        content = base64.b64encode(content.encode()).decode()
    shown = output.metadata.get(kind, {})
    sides = [side for side in ("width", "height") if isinstance(shown, dict) and isinstance(shown.get(side), int)]
    size = "".join(f' {side}="{shown[side]}"' for side in sides)
    content = re.sub(r"[^A-Za-z0-9+/=]", "", content)
    return Markup(f'<img src="data:{kind};base64,{content}" alt="{attribute(alt)}"{size}>')


def _texts(output: Any, clean: Scrub) -> tuple[str, Any]:
    """The kind of an output that is no picture, and its text or safe HTML; "" where there is nothing to see."""
    if output.output_type == "stream" and output.name == "stderr":
        return "stderr", shorten(clean(without_progress(output.text)))
    if output.output_type == "stream":
        return "stdout", shorten(clean(plain(output.text).strip("\n")))
    if output.output_type == "error":
        first, trace = clean(plain(f"{output.ename}: {output.evalue}")), "\n".join(output.traceback)
        return "error", (first.removesuffix(": "), shorten(clean(plain(trace))))
    if html := clean_html(str(output.data.get("text/html", "")), clean).strip():
        return "rich", html
    formula = str(output.data.get("text/latex", "")).strip()
    markdown = str(output.data.get("text/markdown", "")) or (formula if formula.startswith(FORMULA) else "")
    if markdown:
        return "rich", render_markdown(markdown, clean)
    text = plain(str(output.data.get("text/plain", "")))
    if DRAWING.fullmatch(text.strip()) or any("widget" in kind for kind in output.data):
        return "value", ""
    return "value", shorten(clean(text))
