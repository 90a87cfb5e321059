"""Drawings: an SVG inside ``<img>`` can neither run scripts nor load anything, but it can tell, and it can multiply."""

import base64
import re
from collections.abc import Callable
from xml.etree import ElementTree

MOST_ELEMENTS = 200_000  # that a drawing shows, counting what is drawn again at each reference to it
INSIDE = re.compile(r"data:image/svg|<!ENTITY", re.IGNORECASE)  # a drawing in a drawing, text that stands for text
REFERENCE = re.compile(r"url\(\s*['\"]?#([^'\")]+)")


def encoded(svg: str, clean: Callable[[str], str] = str) -> str | None:
    """A drawing in base64 without what `clean` takes out of it; None where a browser would draw on it without end."""
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
        meant = [value[1:] for name, value in element.items() if name.endswith("href") and value.startswith("#")]
        meant += [name for value in element.attrib.values() for name in REFERENCE.findall(value)]
        more = [*element, *filter(None, map(named.get, meant))]
        waiting += more
        left -= len(more)
    return not waiting
