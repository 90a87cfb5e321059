"""Numbers and recorded tables, written the way a paper prints them."""

import math
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any, TypeGuard

from saftnb.labels import LABELS, SPACE_LABELS
from saftnb.publish.sanitise import scroll_open

MISSING, NUM = "–", ' class="num"'


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number (True and False are words, and so is an int beyond what a float can hold)."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300)


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
    names = [_label(column) for column in table["columns"]]
    rows = [(list(row) + [None] * len(names))[: len(names)] for row in table["data"]]
    columns = [[row[i] for row in rows] for i in range(len(names))]
    right = [_is_numeric(column) for column in columns]
    shown = [_column(column, numeric) for column, numeric in zip(columns, right, strict=True)]

    def cells(texts: Iterable[str], head: bool) -> str:
        tags = ['th scope="col"' if head else "td" if i or right[0] else 'th scope="row"' for i in range(len(names))]
        return "".join(
            f"<{tag}{NUM * numeric}>{escape(scrub(text))}</{tag[:2]}>"
            for tag, numeric, text in zip(tags, right, texts, strict=True)
        )

    body = "".join(f"<tr>{cells((texts[at] for texts in shown), False)}</tr>" for at in range(len(rows)))
    inside = f"<thead><tr>{cells(names, True)}</tr></thead><tbody>{body}</tbody>"
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
