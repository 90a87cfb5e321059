"""A notebook's parameters: what its ``parameters`` cell declares, and values brought to those types.

The cell holds one ``name: type = literal  # comment`` a line and is read with `ast`, never executed, so
what a grid checks and hashes is what the kernel will see.
"""

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

SCALARS = ("int", "float", "str", "bool")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class ParameterError(ValueError):
    """A ``parameters`` cell that cannot be read, or a value that does not fit its type."""


@dataclass(frozen=True)
class Kind:
    """A parameter's type: a scalar, ``list`` (of one scalar type or of anything), ``dict`` or ``any``."""

    base: str
    item: str | None = None
    optional: bool = False

    def __str__(self) -> str:
        name = f"{self.base}[{self.item}]" if self.item else self.base
        return f"{name} | None" if self.optional else name


@dataclass(frozen=True)
class Parameter:
    """One declared parameter with its default, already of its type."""

    name: str
    kind: Kind
    default: Any


def declared_parameters(notebook: Mapping[str, Any]) -> dict[str, Parameter]:
    """The parameters that ``notebook`` (its JSON) declares, in the order of its ``parameters`` cell.

    Raises ParameterError, with the line in the cell, for anything but imports and literal assignments.
    """
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) > 1:
        raise ParameterError("more than one cell is tagged 'parameters'")
    found: dict[str, Parameter] = {}
    for statement in _statements(cell_source(tagged[0])) if tagged else []:
        parameter = _parameter(statement)
        if parameter is not None:
            found[parameter.name] = parameter
    return found


def cell_source(cell: Mapping[str, Any]) -> str:
    """A cell's text; the notebook format allows a string or a list of lines."""
    source = cell.get("source", "")
    return source if isinstance(source, str) else "".join(source)


def coerce(value: Any, kind: Kind) -> Any:
    """``value`` as the type ``kind``, or ParameterError saying what it is not.

    Whole numbers are accepted for floats, and text that spells a number exactly for numbers ("1e-3"
    arrives from YAML as text in many readers). Nothing else changes type: a float is no int, a number is
    no text, 0 is no bool. Floats are finite.
    """
    if value is None:
        if kind.optional or kind.base == "any":
            return None
        raise ParameterError(f"null is not of type {kind}")
    if kind.base in SCALARS:
        return _scalar(value, kind.base)
    if kind.base == "any":
        return _plain(value)
    if not isinstance(value, list if kind.base == "list" else dict):
        raise ParameterError(f"{_show(value)} is not of type {kind}")
    if kind.item:
        return [_scalar(item, kind.item) for item in value]
    return _plain(value)


def _scalar(value: Any, base: str) -> Any:
    if base == "bool" and type(value) is bool:
        return value
    if base == "str":
        if isinstance(value, str):
            return _text(value)
        hint = "; put it in quotes" if isinstance(value, (bool, int, float)) else ""
        raise ParameterError(f"{_show(value)} is not of type str{hint}")
    text = value if isinstance(value, str) else ""
    if base == "int" and (type(value) is int or _INT.fullmatch(text)):
        return int(value)
    if base == "float" and (type(value) in (int, float) or _FLOAT.fullmatch(text)):
        return _finite(value)
    hint = "; write true or false" if base == "bool" else ""
    raise ParameterError(f"{_show(value)} is not of type {base}{hint}")


def _text(value: str) -> str:
    """Text as JSON gives it back: YAML's "\\ud83d\\ude00" is two halves of a character."""
    try:
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ParameterError(f"{value!a} has half a character, which no file can hold") from None


def _finite(value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ParameterError(f"{_show(value)} is not a finite float")
    return number


def _plain(value: Any) -> Any:
    """A JSON value as it is; anything that JSON cannot hold is an error."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise ParameterError(f"{_show(value)} is not plain data (numbers, text, lists, dicts with text keys)")


def _show(value: Any) -> str:
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(f"line {error.lineno} of the parameters cell: {error.msg}") from None


def _parameter(statement: ast.stmt) -> Parameter | None:
    """The parameter that one statement declares; None for an import or a docstring."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return None
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return None
    where = f"line {statement.lineno} of the parameters cell"
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    value = getattr(statement, "value", None)
    if len(targets) != 1 or not isinstance(targets[0], ast.Name) or value is None:
        raise ParameterError(f"{where}: not of the form 'name: type = literal'")
    name = targets[0].id
    try:
        default = ast.literal_eval(value)
        if isinstance(statement, ast.AnnAssign):
            kind = _refine(_annotation(statement.annotation), default)
        elif isinstance(statement, ast.Assign):
            kind = _refine(Kind("any" if default is None else type(default).__name__), default)
        else:
            raise ValueError
        return Parameter(name, kind, coerce(default, kind))
    except ParameterError as error:
        raise ParameterError(f"{where}: {name}: {error}") from None
    except (ValueError, TypeError):
        raise ParameterError(f"{where}: the default of {name} is not a literal") from None


def _refine(kind: Kind, default: Any) -> Kind:
    """Check the base type, and give a bare list the item type that its default shows."""
    if kind.base not in (*SCALARS, "list", "dict", "any"):
        raise ParameterError(f"the type {kind.base} is not one of {', '.join(SCALARS)}, list, dict")
    if kind.base != "list" or kind.item or not isinstance(default, list):
        return kind
    names = {type(item).__name__ for item in default}
    if names == {"int", "float"}:
        names = {"float"}
    return replace(kind, item=names.pop()) if len(names) == 1 and names <= set(SCALARS) else kind


def _annotation(node: ast.expr | None) -> Kind:
    """The type an annotation names: a name, ``list[x]``, ``dict[...]``, ``Optional[x]``, ``x | None``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([node.left, node.right])
    if isinstance(node, ast.Subscript):
        outer = _name(node.value)
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer == "Optional":
            return replace(_annotation(inner[0]), optional=True)
        if outer == "Union":
            return _union(inner)
        if outer.lower() == "dict":
            return Kind("dict")
        if outer.lower() == "list" and _name(inner[0]) in SCALARS:
            return Kind("list", _name(inner[0]))
    elif node is not None and _name(node):
        name = _name(node)
        return Kind({"List": "list", "Dict": "dict", "Any": "any"}.get(name, name))
    raise ParameterError(f"the type {ast.unparse(node) if node else '?'} is not supported")


def _union(members: list[ast.expr]) -> Kind:
    real = [node for node in members if not (isinstance(node, ast.Constant) and node.value is None)]
    if len(real) != 1:
        raise ParameterError("a union other than with None is not supported")
    return replace(_annotation(real[0]), optional=len(members) > 1)


def _name(node: ast.expr) -> str:
    """``list`` for both ``list`` and ``typing.list``."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
