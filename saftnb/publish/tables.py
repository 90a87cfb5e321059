"""Numbers and recorded tables, written the way a paper prints them."""

import math
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from saftnb.labels import LABELS, SPACE_LABELS
from saftnb.publish.sanitise import scroll_open

MISSING = "–"


def is_number(value: Any) -> bool:
    """Whether a value is a number (True and False are words)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: float, largest: float | None = None) -> str:
    """One number; `largest` is the greatest magnitude of its column, which sets the decimals."""
    if not math.isfinite(value):
        return MISSING if math.isnan(value) else "∞" if value > 0 else "−∞"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    size = abs(value) if largest is None else largest
    if 0 < size < 0.001:
        return f"{value:.1e}".replace("-", "−")
    decimals = 3 if size < 10 else 1 if size < 1000 else 0
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.removeprefix("-")


def value_text(value: Any) -> str:
    """Any recorded value or parameter as short text; parameters keep the digits they were given."""
    if value is None:
        return MISSING
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def duration(seconds: Any, budget: Any = None) -> str:
    """Seconds in the unit that a reader would say, beside the budget when one was given."""
    if not is_number(seconds):
        return MISSING
    size, unit = (1, "s") if seconds < 100 else (60, "min") if seconds < 6000 else (3600, "h")
    amount = f"{seconds / size:.1f}" if unit == "h" or seconds / size < 10 else f"{seconds / size:.0f}"
    return f"{amount} {unit} ({duration(budget)})" if is_number(budget) else f"{amount} {unit}"


def table_html(table: Mapping[str, Any], caption: str, scrub: Callable[[str], str]) -> str:
    """A recorded table ({"columns": [...], "data": [[...]]}) as an HTML table.

    Each column of numbers has one count of decimals; a first column of words heads its rows. Recipes, methods and
    spaces stand under their names.
    """
    columns = [_label(column) for column in table["columns"]]
    rows = [list(row)[: len(columns)] + [None] * (len(columns) - len(row)) for row in table["data"]]
    numeric = [_is_numeric([row[i] for row in rows]) for i in range(len(columns))]
    shown = [_column([row[i] for row in rows], numeric[i]) for i in range(len(columns))]
    head = "".join(
        f'<th scope="col"{_class(right)}>{escape(scrub(name))}</th>'
        for name, right in zip(columns, numeric, strict=True)
    )
    body = []
    for at in range(len(rows)):
        cells = []
        for i, right in enumerate(numeric):
            tag = "th" if i == 0 and not right else "td"
            scope = ' scope="row"' if tag == "th" else ""
            cells.append(f"<{tag}{scope}{_class(right)}>{escape(scrub(shown[i][at]))}</{tag}>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f"{scroll_open(caption)}<table>{inside}</table></div>"


def spoken(name: str) -> str:
    """A recipe, merge method or space as people write it: TIES for "ties"; any other text as it is."""
    return LABELS.get(name) or SPACE_LABELS.get(name) or name


def _label(column: Any) -> str:
    parts = column if isinstance(column, (list, tuple)) else [column]
    return " · ".join(spoken(str(part)).replace("_", " ") for part in parts if str(part))


def _is_numeric(values: list[Any]) -> bool:
    given = [value for value in values if value is not None]
    return bool(given) and all(is_number(value) for value in given)


def _column(values: list[Any], numeric: bool) -> list[str]:
    if not numeric:
        return [spoken(value_text(value)) for value in values]
    finite = [abs(value) for value in values if value is not None and math.isfinite(value)]
    mixed = any(isinstance(value, float) for value in values)
    largest = max(finite, default=0.0)
    return [MISSING if v is None else number(float(v) if mixed else v, largest) for v in values]


def _class(right: bool) -> str:
    return ' class="num"' if right else ""
