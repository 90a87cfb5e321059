"""HTML from a notebook, made safe by nh3: an allow-list of tags, attributes and CSS.

A notebook is somebody else's program, and its outputs are whatever that program wrote. What is
not listed here does not reach the page; the page's Content-Security-Policy is a second lock.
"""

import base64
import re
from collections.abc import Callable
from html import escape, unescape
from itertools import accumulate

import nh3
from markupsafe import Markup

from saftnb.publish import maths, svg

# Without what lays out a page, and what turns text around
TAGS = (nh3.ALLOWED_TAGS | {"tfoot"} | maths.ELEMENTS) - {
    "area", "article", "aside", "bdo", "footer", "header", "hgroup", "map", "nav",
}  # fmt: skip
WITH_CONTENT = {"script", "style", "iframe", "object", "embed", "template", "noscript", "form", "svg", "title"}
WORDS = {"b", "code", "em", "i", "kbd", "mark", "s", "samp", "small", "span", "strong", "sub", "sup", "u", "wbr"}
NUMBER_OF = r"\d{1,4}"
SPANS = {"colspan": NUMBER_OF, "rowspan": NUMBER_OF, "scope": "row|col|rowgroup|colgroup"}
ATTRIBUTES = {
    "a": {"href": "(?:https?://|mailto:|#).*"}, "col": {"span": NUMBER_OF}, "ol": {"start": NUMBER_OF},
    "img": {
        "src": r"data:image/(?:png|jpeg|gif|webp|svg\+xml);base64,[a-z0-9+/=\s]+", "alt": ".*",
        "width": NUMBER_OF, "height": NUMBER_OF,
    },
    "td": SPANS, "th": SPANS,
    "*": {
        # those of highlighted code, formulas and pandas; a class of our own pages would be a disguise
        "class": r"(?:\s*\b(?:[a-z]{1,2}\d?|highlight|tex|display|num|dataframe|data|blank|index_name|"
                 r"(?:row|col|level)(?:\d+|_heading\d*)))*\s*",
        "id": r"(?!(?:show-code|runs)$)[\w\-]*", "title": ".*", "dir": "ltr|rtl|auto",
    },
} | {tag: dict.fromkeys(maths.ATTRIBUTES, ".*") for tag in maths.ELEMENTS}  # fmt: skip
PROPERTIES = {
    "color", "background", "background-color", "background-image", "font-weight", "font-style", "font-family",
    "text-align", "text-decoration", "vertical-align", "white-space", "opacity", "border-bottom",
    "border-top", "border-left", "border-right", "border-color", "padding", "padding-left",
    "padding-right", "caption-side", "justify-items",
}  # fmt: skip
HARMLESS = re.compile(r"(?:[\w\s.,%#+*/!-]|\b(?:rgba?|hsla?|linear-gradient|calc)\(|\))+", re.IGNORECASE)
INK = "#1b1f24"  # on a background the notebook chose: it was chosen for a light page
BLACK = {"black", "#000", "#000000"}
STYLER_SELECTOR = re.compile(r"#T_[\w\-]+(?:[#.:()> \n][\w\-#.:()> \n]*)?")
TAG = re.compile(r'<(?:[^>"]|"[^"]*")*>')  # as the sanitiser writes it, like the next two
INLINE = re.compile(rf'</?(?:a|{"|".join(WORDS)})(?=[ >])(?:[^>"]|"[^"]*")*>')
CELL = re.compile(r"<td([^>]*)(?=>(.{0,200}?)</td>)", re.DOTALL)
NUMBER = re.compile(
    r"\s*[+\-−]?(?:[\d,]+\.?\d*(?:e[+\-]?\d+)?|nan|inf|–|)\s*%?(?:\s*(?:±|\+/-)\s*[\d.]+%?)?\s*", re.IGNORECASE
)
SVG = re.compile(r"(data:image/svg\+xml;base64,)([a-z0-9+/=\s]+)", re.IGNORECASE)
SCRIPT = re.compile(r"<script\b.*?</script\b[^<>]*>?", re.IGNORECASE | re.DOTALL)  # may be larger than all else
TAG_OF_SCRIPT = re.compile(r"<(?=/?script\b)", re.IGNORECASE)  # one alone would take all that follows with it
NESTING = re.compile(r"<(/?)(?!(?:area|br|col|dd|dt|hr|img|input|li|link|meta|p|t[dhr]|wbr)\b)[a-z]", re.IGNORECASE)
LARGEST, DEEPEST = 400_000, 1_000  # characters; elements inside one another, of which a parser's time is the square
MOST_ROWS = 240  # of the tables of one output


def clean_html(html: str, clean: Callable[[str], str] = str) -> Markup:
    """Safe HTML of an output or of rendered markdown, without what `clean` takes out of texts; tables scroll, their
    numbers are marked.

    Scripts, frames, forms, event handlers, `javascript:` links and images from elsewhere are
    dropped. pandas Styler's `<style>` block is kept where every rule stays inside its own table.
    """
    last = html.lower().rfind("</script")  # what begins after it has no end, which to look for would take long
    last = html.find(">", last) + 1 if last >= 0 else 0
    html = _few_rows(TAG_OF_SCRIPT.sub("&lt;", SCRIPT.sub("", html[:last]) + html[last:]))
    depth = max(accumulate(-1 if closing else 1 for closing in NESTING.findall(html)), default=0)
    if len(html) > LARGEST or depth > DEEPEST:
        return Markup("")
    css, parts = "", re.split(r"<style[^>]*>(.*?)</style>", _FIRST.clean(html), flags=re.DOTALL)
    css, html = "".join(clean_stylesheet(clean(part)) for part in parts[1::2]), "".join(parts[::2])
    html = _LAST.clean(SVG.sub(lambda found: _drawing(found, clean), clean(html)))  # the sanitiser has the last word
    words = unescape(TAG.sub("\n", INLINE.sub("", html)))
    if (known := clean(words)) != words:  # tags or entities stood inside what is to be hidden
        return Markup(f"<pre>{escape(known)}</pre>")
    html = CELL.sub(_number, html)
    html = html.replace("<table", '<div class="scroll" tabindex="0" role="group" aria-label="table"><table')
    return Markup((f"<style>{css}</style>" if css else "") + html.replace("</table>", "</table></div>"))


def _number(cell: re.Match[str]) -> str:
    """The beginning of a table's cell, marked where it holds a number."""
    words = TAG.sub("", cell[2])
    if len(words) > 60 or not NUMBER.fullmatch(words):
        return cell[0]
    own, named, more = cell[1].partition(' class="')
    return f'<td{own} class="num {more}' if named else f'<td{own} class="num"'


def _drawing(found: re.Match[str], clean: Callable[[str], str]) -> str:
    """The URL of an SVG without what `clean` takes out of its text, which base64 hides."""
    try:
        return found[1] + (svg.encoded(base64.b64decode(found[2]).decode("utf-8", "replace"), clean) or "")
    except ValueError:
        return found[1]


def _few_rows(html: str) -> str:
    """HTML with the first and the last rows of long tables, and how many are left out."""
    rows = re.split(r"(?=<tr\b)", html, flags=re.IGNORECASE)
    left, half = len(rows) - 1 - MOST_ROWS, MOST_ROWS // 2
    if left <= 0:
        return html
    told = f'<tr><td colspan="{rows[half].count("<t") - 1}">… {left:,} rows left out …</td></tr>'
    return "".join([*rows[: half + 1], told, *rows[-half:]])


def _attribute(tag: str, name: str, value: str) -> str | None:
    """The value of an attribute that may stay."""
    if name == "style":
        return declarations(value) or None
    pattern = ATTRIBUTES.get(tag, {}).get(name) or ATTRIBUTES["*"].get(name, "")
    return value if re.fullmatch(pattern, value.strip(), re.IGNORECASE | re.DOTALL) else None


def clean_stylesheet(css: str) -> str:
    """The rules of a stylesheet that stay inside one pandas Styler table."""
    kept = []
    css = re.sub(r"/\*.*?(?:\*/|\Z)", "", css, flags=re.DOTALL)  # these patterns read each character once
    for prelude, inside in re.findall(r"(?<![^{}])([^{}]+)\{([^{}]*)\}", css):
        selectors = [part.strip() for part in prelude.split(",")]
        if all(map(STYLER_SELECTOR.fullmatch, selectors)) and (safe := declarations(inside)):
            kept.append(f"{','.join(selectors)}{{{safe}}}")
    return "\n".join(kept)


def declarations(css: str) -> str:
    """Listed properties with harmless values, readable on a light and on a dark page."""
    pairs = [
        (name.strip().lower(), value.strip()) for name, _, value in (part.partition(":") for part in css.split(";"))
    ]
    found = {name: value for name, value in pairs if name in PROPERTIES and HARMLESS.fullmatch(value)}
    painted = any(name.startswith("background") for name in found)
    if painted:
        found = {"color": INK} | found
    elif found.get("color", "").lower() in BLACK:
        del found["color"]
    return ";".join(f"{name}:{value}" for name, value in found.items())


def text_of(html: str) -> str:
    """The words of some HTML, without its tags."""
    return " ".join(unescape(TAG.sub("", _LAST.clean(html))).split())


def words_of(html: str) -> Markup:
    """Safe HTML of a heading: words and formulas that open nothing else, lead nowhere and paint nothing."""
    return Markup(_HEADING.clean(html))


def _cleaner(tags: set[str], style: set[str]) -> nh3.Cleaner:
    return nh3.Cleaner(
        tags=tags, clean_content_tags=WITH_CONTENT - tags, attribute_filter=_attribute, link_rel=None,
        attributes={tag: {*names, *(style if tag == "*" else ())} for tag, names in ATTRIBUTES.items()},
        url_schemes={"http", "https", "mailto", "data"},
    )  # fmt: skip


_FIRST, _LAST = _cleaner(TAGS | {"style"}, {"style"}), _cleaner(TAGS, {"style"})
_HEADING = _cleaner(WORDS | (maths.ELEMENTS - {"mpadded"}), set())
