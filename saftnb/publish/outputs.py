"""One output of a code cell as HTML."""

import base64
import re
from collections.abc import Callable
from html import escape
from typing import Any

from saftnb.publish.prose import is_math, render_markdown
from saftnb.publish.sanitise import attribute, clean_html
from saftnb.publish.scrub import plain, shorten, without_progress

Scrub = Callable[[str], str]
PICTURES = ("image/png", "image/svg+xml", "image/jpeg", "image/gif", "image/webp")
# What Python prints for the value of a drawing call: no reader of a report wants it.
DRAWING = re.compile(r"[(\[]*(?:array\(\[*)?<(?:Figure|Axes|matplotlib|seaborn)\b.*|Text\(.*", re.DOTALL)


def joined(value: Any) -> str:
    """Notebook text, which the format allows to be a list of lines."""
    return "".join(value) if isinstance(value, list) else str(value)


def picture_type(output: dict[str, Any]) -> str | None:
    """The MIME type of the picture that an output shows, if it shows one."""
    return next((kind for kind in PICTURES if kind in output.get("data", {})), None)


def render_output(output: dict[str, Any], alt: str, scrub: Scrub) -> str:
    """Safe HTML of one output, "" where there is nothing to see.

    `alt` describes the output where it is a picture; `scrub` cleans texts of machine paths.
    """
    kind = output.get("output_type")
    if kind == "stream":
        return _stream(output, scrub)
    if kind == "error":
        return _error(output, scrub)
    data = output.get("data", {})
    picture = picture_type(output)
    if picture:
        return f'<figure class="picture">{_picture(output, picture, alt)}</figure>'
    return _rich(data, scrub)


def image_tag(output: dict[str, Any], alt: str) -> str:
    """The `<img>` of an output that shows a picture."""
    return _picture(output, picture_type(output) or "", alt)


def _picture(output: dict[str, Any], kind: str, alt: str) -> str:
    content = joined(output["data"][kind])
    if kind == "image/svg+xml":
        # Inside <img> an SVG can neither run scripts nor load anything.
        content = base64.b64encode(content.encode()).decode()
    content = re.sub(r"[^A-Za-z0-9+/=]", "", content)
    shown = output.get("metadata", {}).get(kind, {})
    shown = shown if isinstance(shown, dict) else {}
    sides = [side for side in ("width", "height") if isinstance(shown.get(side), int)]
    size = "".join(f' {side}="{shown[side]}"' for side in sides)
    return f'<img src="data:{kind};base64,{content}" alt="{attribute(alt)}"{size}>'


def _rich(data: dict[str, Any], scrub: Scrub) -> str:
    """Tables, markdown, formulas, else text; a widget has nothing to show without its script."""
    if "text/html" in data:
        html = clean_html(scrub(joined(data["text/html"])))
        if html.strip():
            return f'<div class="rich">{html}</div>'
    for kind in ("text/markdown", "text/latex"):
        text = joined(data.get(kind, ""))
        if text and (kind == "text/markdown" or is_math(text)):
            return f'<div class="rich">{render_markdown(scrub(text))}</div>'
    text = plain(joined(data.get("text/plain", "")))
    if not text.strip() or DRAWING.fullmatch(text.strip()) or any("widget" in name for name in data):
        return ""
    return _pre(text, "value", scrub)


def _pre(text: str, name: str, scrub: Scrub) -> str:
    return f'<pre class="{name}" tabindex="0">{escape(shorten(scrub(text)), quote=False)}</pre>'


def _stream(output: dict[str, Any], scrub: Scrub) -> str:
    text = joined(output.get("text", ""))
    if output.get("name") != "stderr":
        text = plain(text).strip("\n")
        return _pre(text, "stdout", scrub) if text.strip() else ""
    text = without_progress(text)
    if not text.strip():
        return ""
    return f'<details class="messages"><summary>messages</summary>{_pre(text, "stderr", scrub)}</details>'


def _error(output: dict[str, Any], scrub: Scrub) -> str:
    name, value = str(output.get("ename", "Error")), plain(str(output.get("evalue", "")))
    trace = plain("\n".join(str(line) for line in output.get("traceback", [])))
    first = escape(scrub(f"{name}: {value}" if value else name))
    shown = _pre(trace, "traceback", scrub) if trace.strip() else ""
    return f'<div class="error" role="note"><p><strong>{first}</strong></p>{shown}</div>'
