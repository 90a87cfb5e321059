"""What a report leaves out of printed text: the machine's traces, progress bars, and the middle of what is long."""

import re

from saftnb.scrub import plain, root_above, scrub

__all__ = ["plain", "root_above", "scrub", "shorten", "without_progress"]

LONGEST = 240  # lines of one output
WIDEST = 20_000  # characters of one line
PROGRESS = re.compile(r"(?<!\d)\d+%\|.*\||(?<!\d)\d+(?:\.\d+)?(?:it|s)/(?:it|s)\]")


def without_progress(text: str) -> str:
    """Text without the lines that a progress bar drew."""
    return "\n".join(line for line in plain(text).split("\n") if not PROGRESS.search(line)).strip("\n")


def shorten(text: str, lines: int = LONGEST) -> str:
    """The beginning and the end of a text that is longer than `lines` lines, and of a line that is very long."""
    rows = [_narrow(row) for row in text.split("\n")]
    if len(rows) <= lines:
        return "\n".join(rows)
    half = lines // 2
    left_out = f"… {len(rows) - 2 * half:,} lines left out …"
    return "\n".join([*rows[:half], left_out, *rows[-half:]])


def _narrow(row: str) -> str:
    half = WIDEST // 2
    return row if len(row) <= WIDEST else f"{row[:half]} … {len(row) - 2 * half:,} characters left out … {row[-half:]}"
