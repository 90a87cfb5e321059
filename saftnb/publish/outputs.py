"""The outputs of code cells, each as its kind and what is shown of it."""

import json
import re
from collections.abc import Callable
from itertools import islice
from textwrap import shorten
from typing import Any

from markupsafe import Markup
from nbconvert.filters.highlight import Highlight2HTML

from saftnb.publish.prose import PICTURES, render_markdown
from saftnb.publish.sanitise import LARGEST, clean_html, encoded, text_of
from saftnb.publish.text import readable, without_progress

Scrub = Callable[[str], str]
Part = tuple[str, str]  # a kind that the template knows, and its text or safe HTML
# What Python prints for the value of a drawing call: no reader of a report wants it.
DRAWING = re.compile(r"[(\[]*(?:array\(\[*)?<(?:Figure|Axes|matplotlib|seaborn)\b.*|Text\(.*", re.DOTALL)
FORMULA = ("$", "\\begin{equation", "\\begin{align", "\\begin{gather")  # and not a LaTeX table or document
ACTIVE = re.compile(r"<(?:script|iframe|object|embed|canvas|svg|video|audio)\b", re.IGNORECASE)
INTERACTIVE = re.compile(r"javascript|vnd\.(?:plotly|bokehjs|holoviews|vega|vegalite|jupyter\.widget-view)")
WRITTEN = re.compile(r'"(?:title|text|axis_label)":\s*("(?:[^"\\\n]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})){1,2000}")')
ELSEWHERE = "It is in the notebook, which JupyterLab opens."
FULL = f"From here on, what is large is left out: with it the page would be too large. {ELSEWHERE}"
LARGEST_PAGE, PER_TAG = 20_000_000, 330  # characters that Chromium opens in a second, and how many a tag counts for


def read_outputs(notebook: Any, resources: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A preprocessor, after that of the prose: code and outputs become parts, and pictures are described by the text
    around them; `resources` get the figure of the headline. What would make a page too large is left out."""
    clean, figures, tagged = resources["clean"], [], ""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        code = readable(cell.source, clean, str) if resources["code"] else ""
        parts = [("code", Markup(Highlight2HTML()(code, language="python")))] if code.strip() else []
        about = cell.metadata.alt or f"{cell.metadata.heading or resources['title']}. {cell.metadata.seen}"
        for output in cell.outputs:
            data = output.get("data", {})
            kind = next((kind for kind in PICTURES if data.get(kind)), "")
            content = encoded(str(data[kind]), clean) if kind == "image/svg+xml" else data.get(kind)
            if content:
                alt = shorten(clean(f"Figure {len(figures) + 1}: {about}"), 400, placeholder=" …")
                figures.append(_picture(str(content), kind, alt, output.metadata.get(kind)))
                parts.append(("picture", figures[-1]))
                tagged = figures[-1] if "headline-figure" in cell.metadata.get("tags", []) else tagged
            else:
                parts += [("note", f"A picture is too large for this page. {ELSEWHERE}")] * any(map(data.get, PICTURES))
                parts += _rich(data, clean) if data else _printed(output, clean)
        cell.metadata.parts = [(kind, Markup.escape(shown)) for kind, shown in parts if shown]  # all are clean
    resources["figure"] = tagged or (figures or [""])[-1]
    return _small(notebook), resources


def _small(notebook: Any) -> Any:
    """The notebook without the parts that would make a page too large to open quickly."""
    room, full = LARGEST_PAGE, False
    for cell in notebook.cells:
        parts, cell.metadata.parts = cell.metadata.parts, []
        for kind, shown in parts:
            size = len(shown) + PER_TAG * (1 + shown.count("<") * isinstance(shown, Markup))
            if size <= room:
                room -= size
                cell.metadata.parts.append((kind, shown))
            elif not full:
                full = True
                cell.metadata.parts.append(("note", FULL))
    return notebook


def _picture(content: str, kind: str, alt: str, shown: Any) -> Markup:
    """A picture in base64; `shown` may say its width and height."""
    sides = shown if isinstance(shown, dict) else {}
    size = "".join(f' {side}="{sides[side]}"' for side in ("width", "height") if isinstance(sides.get(side), int))
    content = re.sub(r"[^A-Za-z0-9+/=]", "", content)
    return Markup('<img src="data:{};base64,{}" alt="{}"{}>').format(kind, content, alt, Markup(size))


def _printed(output: Any, clean: Scrub) -> list[Part]:
    """What a cell printed, or how it failed."""
    if output.output_type == "error":
        first = readable(f"{output.ename}: {output.evalue}", clean).removesuffix(": ")
        return [("error", first), ("traceback", readable("\n".join(map(str, output.traceback)), clean))]
    if output.get("name") == "stderr":
        return [("stderr", readable(output.text, clean, without_progress))]
    return [("stdout", readable(output.get("text", ""), clean).strip("\n"))]


def _rich(data: dict[str, Any], clean: Scrub) -> list[Part]:
    """An output that is no picture: a table, a formula, markdown, else its text; where a script would have to run, a
    line with the words of the figure stands in for it."""
    if any(kind.endswith("_load.v0+json") for kind in data):
        return []  # Bokeh and HoloViews, getting ready
    source = str(data.get("text/html", ""))
    html = clean_html(source, clean).strip()
    if text_of(html) or "<img" in html:
        return [("rich", html)]
    formula = str(data.get("text/latex", "")).strip()
    markdown = str(data.get("text/markdown", "")) or (formula if formula.startswith(FORMULA) else "")
    if markdown:
        return [("rich", render_markdown(markdown, clean))]
    text = readable(str(data.get("text/plain", "")), clean)
    if DRAWING.fullmatch(text.strip()) or (text.strip() and not without_progress(text)) or "Progress(" in text:
        return []
    if any(INTERACTIVE.search(kind) for kind in data) or ACTIVE.search(source):
        told = " ".join(value if isinstance(value, str) else json.dumps(value) for value in data.values())
        found = (json.loads(said[1], strict=False) for said in islice(WRITTEN.finditer(told), 50))
        written = dict.fromkeys(text_of(clean(said))[:300] for said in found)
        words = f" (“{'”, “'.join(list(filter(None, written))[:12])}”)" if any(written) else ""
        value = "" if text.lstrip().startswith(("<", "Figure(", "alt.")) else text
        kind = "widget" if any("widget" in kind for kind in data) else "figure"
        return [("note", clean(f"An interactive {kind}{words}: here it cannot run. {ELSEWHERE}")), ("value", value)]
    large = [("note", f"HTML of {len(source):,} characters is too large for this page. {ELSEWHERE}")]
    return large * (len(source) > LARGEST) + [("value", text if text.strip() else "")]
