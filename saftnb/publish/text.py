"""Printed text as a page shows it: plain characters, nothing that is nobody's business, no middle where it is long."""

import re
from collections.abc import Callable

from saftnb.scrub import plain

LINES, CHARACTERS = 240, 100_000  # of one text
LARGE, EDGE = 400_000, 5_000  # characters: of larger texts only the ends are read; next to a cut is half a secret
PROGRESS = re.compile(r"(?<!\d)\d+%\|.*\||(?<!\d)\d+(?:\.\d+)?(?:it|s)/(?:it|s)\]")


def readable(text: str, clean: Callable[[str], str], tidy: Callable[[str], str] = plain) -> str:
    """What a page shows of a text: without what `clean` takes out, and of a long one the beginning and the end."""
    if len(text) > LARGE:
        head, tail = clean(tidy(text[: LARGE // 2]))[:-EDGE], clean(tidy(text[-LARGE // 2 :]))[EDGE:]
    else:
        head = tail = text = clean(tidy(text))
        if text.count("\n") < LINES and len(text) <= CHARACTERS:
            return text
    head = "\n".join(head.split("\n")[: LINES // 2])[: CHARACTERS // 2]
    tail = "\n".join(tail.split("\n")[-LINES // 2 :])[-CHARACTERS // 2 :]
    lines = text.count("\n") - 1 - head.count("\n") - tail.count("\n")
    left = f"{lines:,} lines" if lines > 0 else f"{len(text) - len(head) - len(tail):,} characters"
    return f"{head}\n… {left} left out …\n{tail}"


def without_progress(text: str) -> str:
    """Text without the lines that a progress bar drew."""
    return "\n".join(line for line in plain(text).split("\n") if not PROGRESS.search(line)).strip("\n")
