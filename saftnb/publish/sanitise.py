"""HTML from a notebook, made safe: an allow-list of tags, attributes and CSS.

A notebook is somebody else's program, and its outputs are whatever that program wrote. What is
not listed here does not reach the page; the page's Content-Security-Policy is a second lock.
"""

import re
from html import escape

import tinycss2
from bleach.sanitizer import Cleaner
from bs4 import BeautifulSoup, Tag

# fmt: off
TAGS = {
    "a", "abbr", "b", "blockquote", "br", "caption", "code", "col", "colgroup", "dd", "del", "details",
    "div", "dl", "dt", "em", "figcaption", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i",
    "img", "kbd", "li", "mark", "ol", "p", "pre", "s", "samp", "small", "span", "strong", "sub",
    "summary", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "u", "ul",
}
WITH_CONTENT = [
    "script", "style", "iframe", "object", "embed", "template", "noscript", "form", "svg", "math",
    "title",
]
LINK = re.compile(r"(?:https?://|mailto:|#)", re.IGNORECASE)
IMAGE = re.compile(r"data:image/(?:png|jpeg|gif|webp|svg\+xml);base64,[A-Za-z0-9+/=\s]+", re.IGNORECASE)
ATTRIBUTES = {
    "a": {"href": LINK}, "img": {"src": IMAGE, "alt": None, "title": None, "width": r"\d+", "height": r"\d+"},
    "td": {"colspan": r"\d+", "rowspan": r"\d+"}, "col": {"span": r"\d+"}, "ol": {"start": r"\d+"},
    "th": {"colspan": r"\d+", "rowspan": r"\d+", "scope": r"row|col|rowgroup|colgroup"},
    "*": {"class": r"[\w\- ]*", "id": r"[\w\-]*", "style": None, "title": None},
}
PROPERTIES = {
    "color", "background", "background-color", "background-image", "font-weight", "font-style",
    "text-align", "text-decoration", "vertical-align", "white-space", "opacity", "border-bottom",
    "border-top", "border-left", "border-right", "border-color", "padding", "padding-left",
    "padding-right", "caption-side",
}
# fmt: on
FUNCTIONS = {"rgb", "rgba", "hsl", "hsla", "linear-gradient", "calc"}
TOKENS = {"ident", "number", "dimension", "percentage", "hash", "literal", "whitespace"}
STYLER_SELECTOR = re.compile(r"#T_[\w\-]+[\w\-#.:()> \n]*")
INK = "color:#1b1f24"  # on a background the notebook chose: it was chosen for a light page
BLACK = {"black", "#000", "#000000"}
NUMBER = re.compile(
    r"[+\-−]?(?:[\d,]+\.?\d*(?:e[+\-]?\d+)?|nan|inf|–|)\s*%?(?:\s*(?:±|\+/-)\s*[\d.]+%?)?", re.IGNORECASE
)
MARK = "\ue000"  # opens a placeholder for a formula (prose.py): never let into an attribute


def clean_html(html: str) -> str:
    """Safe HTML of an output or of rendered markdown; tables scroll, their numbers are aligned.

    Scripts, frames, forms, event handlers, `javascript:` links and images from elsewhere are
    dropped. pandas Styler's `<style>` block is kept where every rule stays inside its own table.
    """
    soup = _parse(html)
    css = "".join(clean_stylesheet(style.get_text()) for style in soup.find_all("style"))
    for element in soup.find_all(WITH_CONTENT):
        element.decompose()
    for table in soup.find_all("table"):
        join_headings(table)
        align_numbers(table)
    clean = _CLEANER.clean(soup.decode())
    clean = clean.replace("<table", f"{scroll_open('table')}<table").replace("</table>", "</table></div>")
    return (f"<style>{css}</style>" if css else "") + clean


def _attribute(tag: str, name: str, value: str) -> bool:
    """Whether an attribute may stay."""
    for owner in (tag, "*"):
        if name in ATTRIBUTES.get(owner, {}):
            pattern = ATTRIBUTES[owner][name]
            matches = re.match if pattern is LINK else re.fullmatch
            return MARK not in value and (pattern is None or matches(pattern, value.strip()) is not None)
    return False


def clean_stylesheet(css: str) -> str:
    """The rules of a stylesheet that stay inside one pandas Styler table."""
    kept = []
    for rule in tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True):
        if rule.type != "qualified-rule":
            continue
        selectors = [part.strip() for part in tinycss2.serialize(rule.prelude).split(",")]
        if all(STYLER_SELECTOR.fullmatch(selector) for selector in selectors):
            declarations = _declarations(rule.content)
            if declarations:
                kept.append(f"{','.join(selectors)}{{{declarations}}}")
    return "\n".join(kept)


class _InlineStyle:
    """What bleach asks for a `style` attribute."""

    def sanitize_css(self, style: str) -> str:
        return _declarations(tinycss2.parse_component_value_list(style))


def _declarations(tokens: list) -> str:
    """Listed properties with harmless values, readable on a light and on a dark page."""
    found = {}
    for declaration in tinycss2.parse_blocks_contents(tokens, skip_comments=True, skip_whitespace=True):
        known = declaration.type == "declaration" and declaration.lower_name in PROPERTIES
        if known and all(_harmless(token) for token in declaration.value):
            found[declaration.lower_name] = tinycss2.serialize(declaration.value).strip()
    painted = any(name.startswith("background") for name in found)
    if not painted and found.get("color", "").lower() in BLACK:
        del found["color"]
    written = ";".join(f"{name}:{value}" for name, value in found.items())
    return f"{written};{INK}" if painted and "color" not in found else written


def _harmless(token) -> bool:
    if token.type == "function":
        return token.lower_name in FUNCTIONS and all(_harmless(part) for part in token.arguments)
    return token.type in TOKENS and not (token.type == "literal" and token.value not in ",/+-*")


def join_headings(table: Tag) -> None:
    """Put the names of a pandas index, which pandas writes in a row of their own, beside the columns'."""
    head = table.find("thead")
    rows = [row.find_all("th") for row in head.find_all("tr")][-2:] if isinstance(head, Tag) else []
    if len(rows) < 2 or len(rows[0]) != len(rows[1]):
        return
    pairs = list(zip(*rows, strict=True))
    if all(not (above.get_text(strip=True) and below.get_text(strip=True)) for above, below in pairs):
        for above, below in pairs:
            if below.get_text(strip=True):
                above.replace_with(below)
        head.find_all("tr")[-1].decompose()


def align_numbers(table: Tag) -> None:
    """Mark the cells that hold numbers, and the headings above columns of them.

    Columns are counted from the right: the cells of an index, on the left, may span several rows.
    """
    head = table.find("thead")
    rows = [row.find_all(["td", "th"], recursive=False)[::-1] for row in table.find_all("tr")]
    rows = [row for row in rows if not any(cell.has_attr("colspan") for cell in row)]
    columns: dict[int, bool] = {}
    for row in rows:
        for position, cell in enumerate(row):
            if cell.name == "td":
                numeric = NUMBER.fullmatch(cell.get_text().strip()) is not None
                columns[position] = columns.get(position, True) and numeric
                if numeric:
                    cell["class"] = [*cell.get("class", []), "num"]
    for row in rows:
        for position, cell in enumerate(row):
            if columns.get(position) and cell.name == "th" and isinstance(head, Tag) and head in cell.parents:
                cell["class"] = [*cell.get("class", []), "num"]


def scroll_open(label: str) -> str:
    """The opening of a box in which a wide table scrolls, by mouse and by keyboard."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{attribute(label)}">'


def text_of(html: str) -> str:
    """The words of some HTML, without its tags."""
    return " ".join(_parse(html).get_text().split())


def _parse(html: str) -> BeautifulSoup:
    # The empty comment keeps bs4 from warning that a text without tags looks like a file name.
    return BeautifulSoup(f"<!---->{html}", "html.parser")


def attribute(text: str) -> str:
    """Text ready to stand between the quotes of an attribute."""
    return escape(" ".join(text.split()), quote=True)


_CLEANER = Cleaner(
    tags=TAGS,
    attributes=_attribute,
    protocols=["http", "https", "mailto", "data"],
    strip=True,
    strip_comments=True,
    css_sanitizer=_InlineStyle(),
)
