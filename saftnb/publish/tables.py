"""Numbers and recorded tables, written the way a paper prints them."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from saftnb.labels import LABELS, SPACE_LABELS

MISSING = "–"


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


def value_text(value: Any, deepest: int = 5) -> str:
    """Any recorded value or parameter as short text; parameters keep the digits they were given."""
    if value is None:
        return MISSING
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(item, deepest - 1) for item in value) if deepest else "…"
    return f"{value:g}" if isinstance(value, float) else str(value)


def result_text(value: Any) -> str:
    """A recorded value, rounded where it is a number."""
    return number(value) if is_number(value) else value_text(value)


def duration(seconds: Any, budget: Any = None) -> str:
    """Seconds in the unit that a reader would say, beside the budget when one was given."""
    if not is_number(seconds):
        return MISSING
    size, unit = (1, "s") if seconds < 100 else (60, "min") if seconds < 6000 else (3600, "h")
    amount = f"{seconds / size:.1f}" if unit == "h" or seconds / size < 10 else f"{seconds / size:.0f}"
    return f"{amount} {unit} ({duration(budget)})" if is_number(budget) else f"{amount} {unit}"


def printed(table: Mapping[str, Any]) -> tuple[list[str], list[bool], list[tuple[str, ...]]]:
    """The headings of a recorded table ({"columns": [...], "data": [[...]]}), which columns hold numbers, and its rows
    as text: recipes, methods and spaces under their names, each column of numbers with one count of decimals."""
    names = [column if isinstance(column, (list, tuple)) else [column] for column in table["columns"]]
    heads = [" · ".join(spoken(str(part)).replace("_", " ") for part in parts if str(part)) for parts in names]
    columns = [[row[at] if at < len(row) else None for row in table["data"]] for at in range(len(heads))]
    given = [[value for value in column if value is not None] for column in columns]
    numeric = [bool(values) and all(map(is_number, values)) for values in given]
    texts = (
        _numbers(column) if right else [spoken(value_text(v)) for v in column]
        for column, right in zip(columns, numeric, strict=True)
    )
    return heads, numeric, list(zip(*texts, strict=True))


def spoken(name: str) -> str:
    """A recipe, merge method or space as people write it: TIES for "ties"; any other text as it is."""
    return LABELS.get(name) or SPACE_LABELS.get(name) or name


def _numbers(values: list[Any]) -> list[str]:
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    kind = float if any(isinstance(value, float) for value in values) else int
    return [MISSING if value is None else number(kind(value), largest) for value in values]


FILTERS = {
    "words": value_text, "result": result_text, "duration": duration, "printed": printed, "is_number": is_number,
}  # fmt: skip
