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
from bs4 import BeautifulSoup, Tag
from markupsafe import Markup

from saftnb.publish import maths, svg

# fmt: off
# Without what lays out a page, and what turns text around
TAGS = (nh3.ALLOWED_TAGS | {"tfoot"}) - {
    "area", "article", "aside", "bdo", "footer", "header", "hgroup", "map", "nav",
}
WITH_CONTENT = {"script", "style", "iframe", "object", "embed", "template", "noscript", "form", "svg", "title"}
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
} | {tag: dict.fromkeys([*maths.ATTRIBUTES, "alttext", "mathvariant", "columnalign"], ".*") for tag in maths.ELEMENTS}
PROPERTIES = {
    "color", "background", "background-color", "background-image", "font-weight", "font-style", "font-family",
    "text-align", "text-decoration", "vertical-align", "white-space", "opacity", "border-bottom",
    "border-top", "border-left", "border-right", "border-color", "padding", "padding-left",
    "padding-right", "caption-side",
}
# fmt: on
TAG = re.compile(r'<(?:[^>"]|"[^"]*")*>')  # as the sanitiser writes it
HARMLESS = re.compile(r"(?:[\w\s.,%#+*/!-]|\b(?:rgba?|hsla?|linear-gradient|calc)\(|\))+", re.IGNORECASE)
SVG = re.compile(r"(data:image/svg\+xml;base64,)([a-z0-9+/=\s]+)", re.IGNORECASE)
BOXES = ("padding", "border", "vertical-align")
# Around a word such a length paints over, and takes the clicks of, what stands beside it.
COLOUR, FAR = (
    re.compile(r"#\w+|\b(?:rgb|hsl)a?\([^()]*\)"),
    re.compile(r"(?<![.\d])0*[1-9]\d\d|[.\d]e[+-]?\d|calc", re.I),
)
INLINE = re.compile(r'</?(?:a|b|code|em|i|kbd|mark|s|samp|small|span|strong|sub|sup|u|wbr)(?=[ >])(?:[^>"]|"[^"]*")*>')
NESTING = re.compile(r"<(/?)(?!(?:area|br|col|dd|dt|hr|img|input|li|link|meta|p|t[dhr]|wbr)\b)[a-z]", re.IGNORECASE)
LARGEST, DEEPEST = 400_000, 1_000  # characters; elements inside one another, of which a parser's time is the square
MOST_ROWS = 240  # of the tables of one output
STYLER_SELECTOR = re.compile(r"#T_[\w\-]+(?:[#.:()> \n][\w\-#.:()> \n]*)?")
INK = "color:#1b1f24"  # on a background the notebook chose: it was chosen for a light page
BLACK = {"black", "#000", "#000000"}
NUMBER = re.compile(
    r"[+\-−]?(?:[\d,]+\.?\d*(?:e[+\-]?\d+)?|nan|inf|–|)\s*%?(?:\s*(?:±|\+/-)\s*[\d.]+%?)?", re.IGNORECASE
)


def clean_html(html: str, clean: Callable[[str], str] = str) -> Markup:
    """Safe HTML of an output or of rendered markdown, without what `clean` takes out of texts; tables scroll, their
    numbers are aligned.

    Scripts, frames, forms, event handlers, `javascript:` links and images from elsewhere are
    dropped. pandas Styler's `<style>` block is kept where every rule stays inside its own table.
    """
    html = _few_rows(_without_scripts(html))
    if len(html) > LARGEST or _depth(html) > DEEPEST:
        return Markup("")
    css, html = "", _FIRST.clean(html)
    if "<table" in html or "<style" in html:
        soup = BeautifulSoup(html, "html.parser")
        css = "".join(clean_stylesheet(style.extract().get_text()) for style in soup.find_all("style"))
        tables = soup.find_all("table")
        for table in tables:
            if len(tables) > 20 and table.find_parent("table"):
                continue  # of many inside one another each would be read once more for every one around it
            join_headings(table)
            align_numbers(table)
        html = soup.decode(formatter="minimal")
    html = _LAST.clean(SVG.sub(lambda found: _drawing(found, clean), clean(html)))  # the sanitiser has the last word
    words = unescape(TAG.sub("\n", INLINE.sub("", html)))
    if (known := clean(words)) != words:  # tags or entities stood inside what is to be hidden
        return Markup(f"<pre>{escape(known)}</pre>")
    html = html.replace("<table", f"{scroll_open('table')}<table").replace("</table>", "</table></div>")
    return Markup((f"<style>{css}</style>" if css else "") + html)


def _drawing(found: re.Match[str], clean: Callable[[str], str]) -> str:
    """The URL of an SVG without what `clean` takes out of its text, which base64 hides."""
    try:
        return found[1] + (svg.encoded(base64.b64decode(found[2]).decode("utf-8", "replace"), clean) or "")
    except ValueError:
        return found[1]


def _without_scripts(html: str) -> str:
    """HTML without its scripts, which may be larger than everything else in it."""
    first, *rest = re.split(r"<script\b", html, flags=re.IGNORECASE)
    return first + "".join(re.split(r"</script\b[^>]*>", part, maxsplit=1, flags=re.I)[-1] for part in rest)


def _few_rows(html: str) -> str:
    """HTML with the first and the last rows of long tables, and how many are left out."""
    rows = re.split(r"(?=<tr\b)", html, flags=re.IGNORECASE)
    left = len(rows) - 1 - MOST_ROWS
    if left <= 0:
        return html
    half = MOST_ROWS // 2
    told = f'<tr><td colspan="{rows[half].count("<t") - 1}">… {left:,} rows left out …</td></tr>'
    return "".join([*rows[: half + 1], told, *rows[-half:]])


def _depth(html: str) -> int:
    """How many elements stand inside one another, or are never closed."""
    return max(accumulate(-1 if closing else 1 for closing in NESTING.findall(html)), default=0)


def ends(text: str, most: int = LARGEST) -> str:
    """The beginning and the end of a text of more than `most` characters."""
    left, half = len(text) - most, most // 2
    return text if left <= 0 else f"{text[:half]}\n… {left:,} characters left out …\n{text[-half:]}"


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
        if all(STYLER_SELECTOR.fullmatch(selector) for selector in selectors) and (safe := declarations(inside)):
            kept.append(f"{','.join(selectors)}{{{safe}}}")
    return "\n".join(kept)


def declarations(css: str) -> str:
    """Listed properties with harmless values, readable on a light and on a dark page."""
    pairs = [
        (name.strip().lower(), value.strip()) for name, _, value in (part.partition(":") for part in css.split(";"))
    ]
    found = [(name, value) for name, value in pairs if name in PROPERTIES and HARMLESS.fullmatch(value)]
    found = [pair for pair in found if not (pair[0].startswith(BOXES) and FAR.search(COLOUR.sub("", pair[1])))]
    painted = any(name.startswith("background") for name, _ in found)
    kept = [(name, value) for name, value in found if painted or name != "color" or value.lower() not in BLACK]
    written = ";".join(f"{name}:{value}" for name, value in kept)
    return f"{written};{INK}" if painted and "color" not in dict(kept) else written


def join_headings(table: Tag) -> None:
    """Put the names of a pandas index, which pandas writes in a row of their own, beside the columns'."""
    rows = [row.find_all("th") for row in table.select("thead tr")][-2:]
    if len(rows) < 2 or len(rows[0]) != len(rows[1]):
        return
    pairs = list(zip(*rows, strict=True))
    if all(not (above.get_text(strip=True) and below.get_text(strip=True)) for above, below in pairs):
        for above, below in pairs:
            if below.get_text(strip=True):
                above.replace_with(below)
        table.select("thead tr")[-1].decompose()


def align_numbers(table: Tag) -> None:
    """Mark the cells that hold numbers, and the headings above columns of them.

    Columns are counted from the right: the cells of an index, on the left, may span several rows.
    """
    rows = [row.find_all(["td", "th"], recursive=False)[::-1] for row in table.find_all("tr")]
    rows = [row for row in rows if not any(cell.has_attr("colspan") for cell in row)]
    columns: dict[int, bool] = {}
    for row in rows:
        for position, cell in enumerate(row):
            if cell.name == "td":
                words = cell.get_text().strip()
                numeric = len(words) < 60 and NUMBER.fullmatch(words) is not None
                columns[position] = columns.get(position, True) and numeric
                if numeric:
                    _add_class(cell, "num")
    for row in rows:
        for position, cell in enumerate(row):
            if columns.get(position) and cell.name == "th" and cell.find_parent("thead"):
                _add_class(cell, "num")


def _add_class(cell: Tag, name: str) -> None:
    there = cell.get("class") or []
    cell["class"] = " ".join([there, name] if isinstance(there, str) else [*there, name])


def scroll_open(label: str) -> str:
    """The opening of a box in which a wide table scrolls, by mouse and by keyboard."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{attribute(label)}">'


def text_of(html: str) -> str:
    """The words of some HTML, without its tags."""
    return " ".join(unescape(TAG.sub("", _LAST.clean(html))).split())


def attribute(text: str) -> str:
    """Text ready to stand between the quotes of an attribute."""
    return escape(" ".join(text.split()), quote=True)


_NAMES = {tag: {*names, *(["style"] if tag == "*" else [])} for tag, names in ATTRIBUTES.items()}


def _cleaner(tags: set[str]) -> nh3.Cleaner:
    return nh3.Cleaner(
        tags=tags, clean_content_tags=WITH_CONTENT - tags, attributes=_NAMES, attribute_filter=_attribute,
        url_schemes={"http", "https", "mailto", "data"}, link_rel=None,
    )  # fmt: skip


_FIRST, _LAST = _cleaner(TAGS | maths.ELEMENTS | {"style"}), _cleaner(TAGS | maths.ELEMENTS)
