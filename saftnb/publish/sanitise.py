"""HTML and drawings from a notebook, somebody else's program, made safe by nh3: what is not listed here does not reach
the page. Its Content-Security-Policy is a second lock.
"""

import base64
import re
from collections.abc import Callable
from html import escape, unescape
from itertools import accumulate
from xml.etree import ElementTree

import nh3
from markupsafe import Markup

from saftnb.publish import maths

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
    "img": {"src": r"data:image/(?:png|jpeg|gif|webp|svg\+xml);base64,[a-z0-9+/=\s]+", "alt": ".*"},
    "td": SPANS, "th": SPANS,
    "*": {
        # those of highlighted code, formulas and pandas; a class of our own pages would be a disguise
        "class": r"(?:\s*\b(?:[a-z]{1,2}\d?|highlight|tex|display|dataframe|data|blank|index_name|"
                 r"(?:row|col|level)(?:\d+|_heading\d*)))*\s*", "title": ".*", "dir": "ltr|rtl|auto",
        "id": r"(?!(?:show-code|runs)$)[\w\-]*", "width": NUMBER_OF, "height": NUMBER_OF,
    },
} | {tag: dict.fromkeys(maths.ATTRIBUTES, ".*") for tag in maths.ELEMENTS}  # fmt: skip
PROPERTIES = {
    "background", "background-color", "background-image", "border-bottom", "border-color", "border-left",
    "border-right", "border-top", "caption-side", "color", "font-family", "font-style", "font-weight", "justify-items",
    "opacity", "padding", "padding-left", "padding-right", "text-align", "text-decoration", "vertical-align",
    "white-space",
}  # fmt: skip
HARMLESS = re.compile(r"(?:[\w\s.,%#+*/!-]|\b(?:rgba?|hsla?|linear-gradient|calc)\(|\))+", re.IGNORECASE)
STYLER_SELECTOR = re.compile(r"#T_[\w\-]+(?:[#.:()> \n][\w\-#.:()> \n]*)?")
TAG = re.compile(r'<(?:[^>"]|"[^"]*")*>')  # as the sanitiser writes it, like the next two
INLINE = re.compile(rf'</?(?:a|{"|".join(WORDS)})(?=[ >])(?:[^>"]|"[^"]*")*>')
NUMBER = re.compile(  # in a table's cell
    r"<td(?=[^>]*>(?:<(?!/?td)[^>]*>|\s)*+[+\-−]?(?:[\d,]{1,30}\.?\d{0,30}(?:e[+\-]?\d{1,4})?|nan|inf|–|)\s?%?"
    r"(?:\s?(?:±|\+/-)\s?[\d.]{1,30}%?)?(?:<(?!/?td)[^>]*>|\s)*+</td>)", re.IGNORECASE
)  # fmt: skip
SVG = re.compile(r"(data:image/svg\+xml;base64,)([a-z0-9+/=\s]+)", re.IGNORECASE)
NESTING = re.compile(r"<(/?)(?!(?:area|br|col|dd|dt|hr|img|input|li|link|meta|p|t[dhr]|wbr)\b)[a-z]", re.IGNORECASE)
LARGEST, DEEPEST = 400_000, 1_000  # characters; elements inside one another, of which a parser's time is the square
MOST_ELEMENTS = 200_000  # that a drawing shows, counting what is drawn again at each reference to it
INSIDE = re.compile(r"data:image/svg|<!ENTITY", re.IGNORECASE)  # a drawing in a drawing, text that stands for text
REFERENCE = re.compile(r"(?:^|url\(\s*['\"]?)#([^'\")]+)")


def clean_html(html: str, clean: Callable[[str], str] = str) -> Markup:
    """Safe HTML of an output or of rendered markdown, without what `clean` takes out of texts; tables scroll, their
    numbers are marked.

    Scripts, frames, forms, event handlers, `javascript:` links and images from elsewhere are dropped. Of pandas
    Styler's `<style>` the rules are kept that stay inside their own table.
    """
    html, styles = _without("style", _without("script", html)[0])  # each may be larger than all else
    depth = max(accumulate(-1 if closing else 1 for closing in NESTING.findall(html)), default=0)
    if len(html) > LARGEST or depth > DEEPEST:
        return Markup("")
    css = "".join(clean_stylesheet(clean(style)) for style in styles)
    html = _ALL.clean(SVG.sub(lambda found: _drawing(found, clean), clean(html)))  # the sanitiser has the last word
    words = unescape(TAG.sub("\n", INLINE.sub("", html)))
    if (known := clean(words)) != words:  # tags or entities stood inside what is to be hidden
        return Markup(f"<pre>{escape(known)}</pre>")
    html = NUMBER.sub('<td data-number=""', html).replace("</table>", "</table></div>")
    html = html.replace("<table", '<div class="scroll" tabindex="0" role="group" aria-label="table"><table')
    return Markup((f"<style>{css}</style>" if css else "") + html)


def _without(tag: str, html: str) -> tuple[str, list[str]]:
    """HTML without the elements of a kind, and what was in them. A tag without an end would take all that follows with
    it: it is shown as text."""
    *before, rest = re.split(rf"</{tag}\b[^<>]*>?", html, flags=re.IGNORECASE)
    halves = [re.split(rf"<{tag}\b[^<>]*>?", part, maxsplit=1, flags=re.IGNORECASE) for part in before]
    rest = re.sub(rf"<(?={tag}\b)", "&lt;", rest, flags=re.IGNORECASE)
    return "".join(half[0] for half in halves) + rest, [half[1] for half in halves if len(half) == 2]


def _drawing(found: re.Match[str], clean: Callable[[str], str]) -> str:
    """The URL of an SVG without what `clean` takes out of its text, which base64 hides."""
    try:
        return found[1] + (encoded(base64.b64decode(found[2]).decode("utf-8", "replace"), clean) or "")
    except ValueError:
        return found[1]


def encoded(svg: str, clean: Callable[[str], str] = str) -> str | None:
    """A drawing in base64 without what `clean` takes out of it; None where a browser would draw on it without end. In
    <img> it can neither run scripts nor load anything."""
    known = clean(svg)
    small = not INSIDE.search(known) and _is_small(known)
    return base64.b64encode(known.encode("utf-8", "replace")).decode() if small else None


def _is_small(svg: str) -> bool:
    """Whether not too many elements are drawn, those that are referred to counted at each reference."""
    try:
        root = ElementTree.fromstring(svg.encode("utf-8", "replace"))
    except (ElementTree.ParseError, ValueError, LookupError):
        return True  # not drawn either
    named = {name: element for element in root.iter() if (name := element.get("id"))}
    waiting, left = [root], MOST_ELEMENTS
    while waiting and left > 0:
        element = waiting.pop()
        meant = (name for value in element.attrib.values() for name in REFERENCE.findall(value))
        more = [*element, *filter(None, map(named.get, meant))]
        waiting += more
        left -= len(more)
    return not waiting


def _attribute(tag: str, name: str, value: str) -> str | None:
    """The value of an attribute that may stay."""
    if name == "style":
        return declarations(value) or None
    pattern = ATTRIBUTES.get(tag, {}).get(name) or ATTRIBUTES["*"].get(name, "")
    return value if re.fullmatch(pattern, value.strip(), re.IGNORECASE | re.DOTALL) else None


def clean_stylesheet(css: str) -> str:
    """The rules of a stylesheet that stay inside one pandas Styler table."""
    css = re.sub(r"/\*.*?(?:\*/|\Z)", "", css, flags=re.DOTALL)  # these patterns read each character once
    rules = re.findall(r"(?<![^{}])([^{}]+)\{([^{}]*)\}", css)
    rules = (([part.strip() for part in before.split(",")], declarations(inside)) for before, inside in rules)
    return "\n".join(
        f"{','.join(names)}{{{safe}}}" for names, safe in rules if safe and all(map(STYLER_SELECTOR.fullmatch, names))
    )


def declarations(css: str) -> str:
    """Listed properties with harmless values."""
    pairs = ((name.strip().lower(), value.strip()) for name, _, value in (p.partition(":") for p in css.split(";")))
    return ";".join(f"{name}:{value}" for name, value in pairs if name in PROPERTIES and HARMLESS.fullmatch(value))


def text_of(html: str) -> str:
    """The words of some HTML, without its tags."""
    return " ".join(unescape(TAG.sub("", _ALL.clean(html))).split())


def words_of(html: str) -> Markup:
    """Safe HTML of a heading: words and formulas that open nothing else, lead nowhere and paint nothing."""
    return Markup(_HEADING.clean(html))


def _cleaner(tags: set[str], style: set[str]) -> nh3.Cleaner:
    return nh3.Cleaner(
        tags=tags, clean_content_tags=WITH_CONTENT, attribute_filter=_attribute, link_rel=None,
        attributes={tag: {*names, *(style if tag == "*" else ())} for tag, names in ATTRIBUTES.items()},
        url_schemes={"http", "https", "mailto", "data"},
    )  # fmt: skip


_ALL, _HEADING = _cleaner(TAGS, {"style"}), _cleaner(WORDS | (maths.ELEMENTS - {"mpadded"}), set())
