"""Numbers and recorded tables, written the way a paper prints them."""

from collections.abc import Mapping
from typing import Any, TypeGuard

from saftnb.labels import duration, spoken

MISSING = "–"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number; True, False and an int beyond what a float can hold are words."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def number(value: float, largest: float | None = None) -> str:
    """One number; `largest` is the greatest magnitude of its column, which sets the decimals."""
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    size = abs(value) if largest is None else largest
    if 0 < size < 0.001:
        return f"{value:.1e}".replace("-", "−")
    text = f"{value:,.{3 if size < 10 else 1 if size < 1000 else 0}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.removeprefix("-")


def value_text(value: Any) -> str:
    """Any recorded value or parameter as short text; parameters keep the digits they were given."""
    if isinstance(value, list):
        return ", ".join(map(value_text, value))
    return MISSING if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def printed(table: Mapping[str, Any]) -> tuple[list[str], list[bool], list[tuple[str, ...]]]:
    """The headings of a recorded table ({"columns": [...], "data": [[...]]}), which columns hold numbers, and its rows
    as text: recipes, methods and spaces under their names, each column of numbers with one count of decimals."""
    heads = [spoken(str(column)).replace("_", " ") for column in table["columns"]]
    columns = [[row[at] if at < len(row) else None for row in table["data"]] for at in range(len(heads))]
    given = [[value for value in column if value is not None] for column in columns]
    numeric = [bool(values) and all(map(is_number, values)) for values in given]
    texts = (
        _numbers(column) if right else [spoken(value_text(value)) for value in column]
        for column, right in zip(columns, numeric, strict=True)
    )
    return heads, numeric, list(zip(*texts, strict=True))


def _numbers(column: list[Any]) -> list[str]:
    given = [value for value in column if value is not None]
    largest = max(map(abs, given))
    kind = float if any(isinstance(value, float) for value in given) else int
    return [MISSING if value is None else number(kind(value), largest) for value in column]


FILTERS = {
    "words": value_text, "result": lambda value: number(value) if is_number(value) else value_text(value),
    "duration": lambda value: duration(value) if is_number(value) else MISSING,
    "printed": printed, "is_number": is_number,
}  # fmt: skip
