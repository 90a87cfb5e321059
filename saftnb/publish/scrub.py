"""What a report must not carry: paths of this machine, terminal colours, progress bars."""

import re
import socket
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# A home directory of any machine: a grid may have run on a cluster under another name.
ANY_HOME = re.compile(
    r"(?<![\w.~-])(?:/(?:home|Users)/|[A-Za-z]:\\Users\\)[^/\\\s'\"<>:]+|(?<![\w.~/-])/root(?![\w-])"
)
KERNEL_FILE = re.compile(r"/(?:tmp|var)/[\w/.-]*ipykernel_\d+/\d+\.py")
LONGEST = 240  # lines of one output
PROGRESS = re.compile(r"\d+%\|.*\||\d+(?:\.\d+)?(?:it|s)/(?:it|s)\]")


def project_root(start: Path) -> Path | None:
    """The nearest folder at or above `start` that holds a pyproject.toml or a .git."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
            return folder
    return None


@lru_cache(maxsize=1)
def _machine() -> tuple[tuple[str, ...], str]:
    """Project root(s) of this machine, and its name where it is no ordinary word."""
    found = (project_root(Path(__file__)), project_root(Path.cwd()))
    roots = {str(root) for root in found if root is not None and len(root.parts) > 1}
    host = socket.gethostname()
    telling = len(host) > 5 and re.search(r"[\d.-]", host) is not None
    return tuple(roots), host if telling else ""


def scrub(text: str, roots: Iterable[Path] = ()) -> str:
    """Text with the project root removed from paths, any home as `~`, and the host's name gone.

    `roots` are further project roots (of the folder that is being published).
    """
    own, host = _machine()
    here = sorted({*own, *(str(root) for root in roots if len(root.parts) > 1)}, key=len, reverse=True)
    for root in here:
        text = re.sub(rf"(?<![\w.~-]){re.escape(root)}(?:/(?=[\w.])|(?![\w.-]))", _relative, text)
    home = str(Path.home())
    if len(Path(home).parts) > 1:
        text = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w-])", "~", text)
    text = ANY_HOME.sub("~", KERNEL_FILE.sub("notebook cell", text))
    return re.sub(rf"\b{re.escape(host)}\b", "host", text) if host else text


def _relative(match: re.Match[str]) -> str:
    return "" if match[0].endswith("/") else "."


def plain(text: str) -> str:
    """Terminal text as it looks in the end: no colours, and carriage returns played out."""
    lines = ANSI.sub("", text).replace("\r\n", "\n").split("\n")
    settled = (line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines)
    return CONTROL.sub("", "\n".join(settled))


def without_progress(text: str) -> str:
    """Text without the lines that a progress bar drew."""
    return "\n".join(line for line in plain(text).split("\n") if not PROGRESS.search(line)).strip("\n")


def shorten(text: str, lines: int = LONGEST) -> str:
    """The beginning and the end of a text that is longer than `lines` lines."""
    rows = text.split("\n")
    if len(rows) <= lines:
        return text
    half = lines // 2
    left_out = f"… {len(rows) - 2 * half:,} lines left out …"
    return "\n".join([*rows[:half], left_out, *rows[-half:]])
