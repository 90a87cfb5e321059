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
    return None if _multiplies(known) else base64.b64encode(known.encode("utf-8", "replace")).decode()


def _multiplies(svg: str) -> bool:
    """Whether few elements of a drawing stand for very many."""
    if INSIDE.search(svg):
        return True
    try:
        root = ElementTree.fromstring(svg.encode("utf-8", "replace"))
        return _Elements(root).shown(root) > MOST_ELEMENTS
    except (ElementTree.ParseError, ValueError, LookupError):
        return False  # not drawn either
    except RecursionError:
        return True


class _Elements:
    def __init__(self, root: ElementTree.Element) -> None:
        self.named = {name: element for element in root.iter() if (name := element.get("id"))}
        self.known: dict[ElementTree.Element, int] = {}

    def shown(self, element: ElementTree.Element) -> int:
        """How many elements are drawn for this one, itself included."""
        if element not in self.known:
            self.known[element] = 0  # what refers to itself is not drawn
            again = filter(None, map(self.named.get, _references(element)))
            self.known[element] = 1 + sum(map(self.shown, [*element, *again]))
        return self.known[element]


def _references(element: ElementTree.Element) -> list[str]:
    """The ids that an element's attributes name."""
    names = [value[1:] for name, value in element.items() if name.endswith("href") and value.startswith("#")]
    return names + [name for value in element.attrib.values() for name in REFERENCE.findall(value)]
