"""The outputs of code cells, each as its kind and what is shown of it."""

import json
import re
from collections.abc import Callable
from typing import Any

from markupsafe import Markup
from nbformat.v4 import new_output

from saftnb.publish import svg
from saftnb.publish.prose import render_markdown
from saftnb.publish.sanitise import attribute, clean_html, ends, text_of
from saftnb.publish.scrub import plain, shorten, without_progress

Scrub = Callable[[str], str]
Part = tuple[str, Any]  # a kind that the template knows, and its text or safe HTML
PICTURES = ("image/png", "image/svg+xml", "image/jpeg", "image/gif", "image/webp")
# What Python prints for the value of a drawing call: no reader of a report wants it.
DRAWING = re.compile(r"[(\[]*(?:array\(\[*)?<(?:Figure|Axes|matplotlib|seaborn)\b.*|Text\(.*", re.DOTALL)
FORMULA = ("$", "\\begin{equation", "\\begin{align", "\\begin{gather")  # and not a LaTeX table or document
ACTIVE = re.compile(r"<(?:script|iframe|object|embed|canvas|svg|video|audio)\b", re.IGNORECASE)
INTERACTIVE = re.compile(r"javascript|vnd\.(?:plotly|bokehjs|holoviews|vega|vegalite|jupyter\.widget-view)")
ELSEWHERE = "It is in the notebook, which JupyterLab opens."
LARGE, EDGE = 400_000, 5_000  # characters: of larger texts only the ends are read; next to a cut is half a secret
LONGEST = 100_000  # characters of one text
MOST_OUTPUTS = 60  # of one cell
LARGEST_PICTURE = 6_000_000
LARGEST_PAGE, MOST_TAGS = 20_000_000, 60_000  # what Chromium opens in a second


def read_outputs(notebook: Any, resources: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A preprocessor, after that of the prose: every output becomes a pair of its kind and what is shown of it, and
    pictures are described by the text around them; `resources` get the figure of the headline."""
    clean, figures, tagged = resources["clean"], [], []
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if cell.cell_type != "code":
            continue
        cell.source = readable(cell.source, clean, str, ends) if resources["code"] else ""
        seen = following.metadata.get("seen", "") if following else ""
        shown, pictures = [], 0
        for output in _few(cell.outputs):
            data = output.get("data", {})
            kind = next((kind for kind in PICTURES if 0 < len(data.get(kind, "")) < LARGEST_PICTURE), "")
            content = svg.encoded(str(data[kind]), clean) if kind == "image/svg+xml" else data.get(kind)
            if content:
                words = f"Figure {len(figures) + 1}: {cell.metadata.heading or resources['title']}. {seen}"
                alt = clean(_own_alt(cell, pictures) or words.strip()[:400])
                figures.append(_picture(str(content), kind, alt, output.metadata.get(kind)))
                tagged += figures[-1:] * ("headline-figure" in cell.metadata.get("tags", []))
                shown.append(("picture", figures[-1]))
                pictures += 1
            else:
                shown += [("note", f"A picture is too large for this page. {ELSEWHERE}")] * any(map(data.get, PICTURES))
                shown += _rich(data, clean) if data else [_text(output, clean)]
        cell.outputs = [
            new_output("display_data", metadata={"kind": kind, "shown": words}) for kind, words in shown if words
        ]
    resources["figure"] = (tagged or figures or [""])[-1]
    return notebook, resources


def _few(outputs: list[Any]) -> list[Any]:
    """The first and the last of very many outputs, and how many are left out."""
    left = len(outputs) - MOST_OUTPUTS
    if left <= 0:
        return outputs
    told = new_output("stream", text=f"… {left:,} outputs left out …")
    return [*outputs[: MOST_OUTPUTS // 2], told, *outputs[-MOST_OUTPUTS // 2 :]]


def keep_small(notebook: Any, resources: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A preprocessor, the last: what would make a page too large to open quickly is left out, and said to be."""
    size, tags, left, place = 0, 0, 0, None

    def fits(text: str, each: int) -> bool:
        nonlocal size, tags
        more = each + (text.count("<") if isinstance(text, Markup) else 0)
        if size + len(text) > LARGEST_PAGE or tags + more > MOST_TAGS:
            return False
        size, tags = size + len(text), tags + more
        return True

    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        kept = [output for output in outputs if fits(output.metadata.shown, 4)]
        small = not cell.source or fits(cell.source, 2 if cell.cell_type == "markdown" else len(cell.source) // 4)
        if len(kept) < len(outputs) or not small:
            left += len(outputs) - len(kept) + (not small)
            place = place or cell
            cell.source = cell.source if small else Markup("") if cell.cell_type == "markdown" else ""
            cell.update({"outputs": kept} if outputs else {})
    if place is not None:
        words = (
            f"From here on, {left:,} outputs and texts are left out: with them the page would be too large. {ELSEWHERE}"
        )
        place.metadata.note = words
    return notebook, resources


def readable(text: str, clean: Scrub, tidy: Callable[[str], str] = plain, cut: Callable[..., str] = shorten) -> str:
    """What a page shows of a text: in plain characters, without what `clean` takes out, and not too long."""
    if len(text) <= LARGE:
        return ends(cut(clean(tidy(text))), LONGEST)
    head, tail = (clean(tidy(part)) for part in (text[: LARGE // 2], text[-LARGE // 2 :]))
    head, tail = "\n".join(head[:-EDGE].split("\n")[:100]), "\n".join(tail[EDGE:].split("\n")[-100:])
    left = f"… about {len(text) - len(head) - len(tail):,} characters left out …"
    return ends("\n".join(filter(None, (cut(head), left, cut(tail)))), LONGEST)


def _own_alt(cell: Any, nth: int) -> str:
    """The cell's own `alt`; a list has one per picture."""
    own = cell.metadata.get("alt") or ""
    return str(own) if not isinstance(own, list) else str(own[nth]) if nth < len(own) else ""


def _picture(content: str, kind: str, alt: str, shown: Any) -> Markup:
    """A picture in base64; `shown` may say its width and height."""
    sides = [side for side in ("width", "height") if isinstance(shown, dict) and isinstance(shown.get(side), int)]
    size = "".join(f' {side}="{shown[side]}"' for side in sides)
    content = re.sub(r"[^A-Za-z0-9+/=]", "", content)
    return Markup(f'<img src="data:{kind};base64,{content}" alt="{attribute(alt)}"{size}>')


def _text(output: Any, clean: Scrub) -> Part:
    """What a cell printed, or how it failed."""
    if output.output_type == "error":
        first = readable(f"{output.ename}: {output.evalue}", clean).removesuffix(": ")
        return "error", (first, readable("\n".join(map(str, output.traceback)), clean))
    if output.get("name") == "stderr":
        return "stderr", readable(output.text, clean, without_progress)
    return "stdout", readable(output.get("text", ""), clean).strip("\n")


def _rich(data: dict[str, Any], clean: Scrub) -> list[Part]:
    """An output that is no picture: a table, a formula, markdown, else its text; where a script would have to run, a
    line stands in for it."""
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
    if any("widget-view" in kind for kind in data):
        named = (re.match(r"\w{1,60}(?=\()", text) or [""])[0]
        return [("note", f"An interactive widget ({named or 'of a notebook'}). {ELSEWHERE}")]
    if any(INTERACTIVE.search(kind) for kind in data) or ACTIVE.search(source):
        title = clean(_title(data))[:300]
        line = f"An interactive figure{f', “{title}”' if title else ''}: here it cannot run. {ELSEWHERE}"
        readable_text = "" if text.lstrip().startswith(("<", "Figure(", "alt.")) else text
        return [("note", line), ("value", readable_text)]
    large = [("note", f"HTML of {len(source):,} characters is too large for this page. {ELSEWHERE}")]
    return large * (len(source) > LARGE) + [("value", text if text.strip() else "")]


def _title(data: dict[str, Any]) -> str:
    """The title of a figure of Plotly, Vega or Bokeh; "" where none is found."""
    script = str(data.get("text/html", "")) + str(data.get("application/javascript", ""))
    specs = [value for value in data.values() if isinstance(value, dict)]
    for mark, nth in (("Plotly.newPlot(", 2), ("var spec =", 0)):
        specs.append(_json_after(script, mark, nth))
    for spec in specs:
        layout = spec.get("layout")
        title = (layout if isinstance(layout, dict) else spec).get("title")
        title = title.get("text") if isinstance(title, dict) else title
        if isinstance(title, str):
            return text_of(title)
    found = re.search(
        r'"name":\s*"Title"[^{}]{0,200}"attributes":\s*\{[^{}]{0,200}?"text":\s*("(?:[^"\\]|\\.)*")', script
    )
    return json.loads(found[1]) if found else ""


def _json_after(script: str, mark: str, nth: int) -> dict[str, Any]:
    """The `nth` of the JSON values, with commas between them, that follow `mark`; {} where that is no object."""
    at, value = script.find(mark) + len(mark), None
    try:
        for _ in range(nth + 1 if mark in script else 0):
            ahead = script[at : at + 500]
            value, at = json.JSONDecoder().raw_decode(script, at + len(ahead) - len(ahead.lstrip(", \t\r\n")))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
