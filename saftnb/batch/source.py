"""A grid file as data that still knows its lines.

YAML is read with the few scalar rules that people expect: only true and false are bools, ``1e-3`` is a
float, ``012``, ``on`` and ``2024-01-01`` are text. A key given twice is an error.
"""

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

Place = tuple[str | int, ...]
ENTRIES = 1_000_000  # of a grid, at most: a few anchors of anchors would stand for billions


class GridError(ValueError):
    """A grid that cannot be run, with the file and line that say so."""


class _Loader(yaml.SafeLoader):
    """The safe loader with its implicit scalars replaced below."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+|[0-9]+\.[0-9]*)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


class GridFile:
    """The parsed file: ``data`` is plain Python, ``fail`` raises a GridError at a place in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[Place, int] = {}
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise GridError(f"{path}: no such grid file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise GridError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            if node is not None and _entries(node, {}) > ENTRIES:
                raise GridError(f"{path.name}: its anchors repeat to more than {ENTRIES:,} entries")
            self.data = {} if node is None else self._plain(loader, node, ())
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise GridError(f"{path.name}{line}: not valid YAML: {error.problem}") from None
        except yaml.YAMLError as error:
            raise GridError(f"{path.name}: not valid YAML: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise GridError(f"{path.name}: something in it contains itself") from None

    def fail(self, place: Place, message: str) -> NoReturn:
        """Raise GridError for ``place``, or for the nearest thing around it that has a line."""
        while place and place not in self._lines:
            place = place[:-1]
        line = f":{self._lines[place]}" if place in self._lines else ""
        raise GridError(f"{self.path.name}{line}: {message}")

    def line(self, place: Place) -> int | None:
        """The line (from 1) where ``place`` begins."""
        return self._lines.get(place)

    def keys(self, place: Place, value: Any, allowed: tuple[str, ...], what: str) -> dict[str, Any]:
        """``value`` if it is a mapping with only the ``allowed`` keys."""
        if not isinstance(value, dict):
            self.fail(place, f"{what} is not a mapping of {', '.join(allowed)}")
        for key in value:
            if key not in allowed:
                self.fail((*place, key), f"unknown key '{key}' in {what}; it may have {', '.join(allowed)}")
        return value

    def _plain(self, loader: _Loader, node: yaml.Node, place: Place) -> Any:
        self._lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(loader, item, (*place, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self._scalar(loader, node, place)
        own = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        loader.flatten_mapping(node)
        result = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.fail(place, "a key is not plain text")
            self._lines[(*place, key.value)] = key.start_mark.line + 1
            if own.count(key.value) > 1:
                self.fail((*place, key.value), f"the key '{key.value}' is given twice")
            result[key.value] = self._plain(loader, value, (*place, key.value))
        return result

    def _scalar(self, loader: _Loader, node: yaml.Node, place: Place) -> Any:
        kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
        try:
            plain = {
                "str": str,
                "int": int,
                "float": float,
                "null": lambda _: None,
                "bool": lambda word: {"true": True, "false": False}[word.lower()],
            }[kind]
            return plain(text)
        except (KeyError, ValueError):
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            self.fail(place, f"{shown!r} with the tag {node.tag} is not supported")


def _entries(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node is, what its aliases stand for counted each time; RecursionError where it holds itself."""
    if id(node) not in known:
        inside = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for entry in inside for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_entries(part, known) for part in parts)
    return known[id(node)]
