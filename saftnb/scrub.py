"""What neither a manifest nor a report may carry: paths, names and secrets of this machine, terminal colours."""

import getpass
import os
import re
import socket
from collections.abc import Callable, Iterable
from html import unescape
from pathlib import Path
from urllib.parse import unquote

from saftnb.paths import project_root, store_root

ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
HALF = re.compile("[\ud800-\udfff]")  # half a character, which JSON can hold, is no text
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# A home directory of any machine: a grid may have run on a cluster under another name.
ANY_HOME = re.compile(
    r"(?<![\w.~-])(?:/(?:home|Users)/|[A-Za-z]:\\Users\\)[^/\\\s'\"<>:]+"  # with its user's name
    r"|(?<![\w.~/-])/root(?![\w-])"
)
KERNEL_FILE = re.compile(r"/(?:tmp|var)/[\w/.-]{0,200}ipykernel_\d+/\d+\.py")
# Other places where clusters keep things: only the last part of such a path is anybody's business.
ELSEWHERE = re.compile(
    r"(?<![\w.~:/-])/(?:data|datasets|efs|fsx|gpfs|lustre|media|mnt|net|nfs|opt|private|projects?|scratch|shared?|srv|"
    r"storage|tmp|usr|var|workspace)(?:/[^/\s'\"<>:,;)\]]+)*/(?=[^/\s'\"<>])"
)
ANY_FOLDER = re.compile(r"(?<![\w.:/…~])~?/(?:[^\s/'\":]+/)+")
ESCAPE = re.compile(r"\\(?:u00([0-7][0-9a-fA-F])|/)")  # of JSON
SECRET = re.compile(r"token|key|secret|passw|credential", re.IGNORECASE)  # in the name of an environment variable


def root_above(start: Path) -> Path:
    """The nearest folder at or above `start` with a pyproject.toml or a .git, else the current folder."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
            return folder
    return Path.cwd()


def _no_word(name: str) -> str:
    """A name of a machine or person, where it is no ordinary word that a text may hold; else ""."""
    return name if name != "localhost" and (len(name) > 7 or re.search(r"[\d.-]", name)) else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no name for this user's number
        return ""


def _secrets() -> list[str]:
    """The values of this process's environment that are nobody's business."""
    found = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= 8}
    return sorted(found, key=len, reverse=True)  # one may begin like another


def scrub(text: str, roots: Iterable[Path] = ()) -> str:
    """Text with the project root removed from paths, any home as `~`, other absolute paths cut to their last part, and
    without the names of host and user and the secrets of the environment (variables called token, key, password).

    `roots` are further folders whose paths become relative (the project of the runs that are being published).
    """
    return scrubber(roots)(text)


def scrubber(roots: Iterable[Path] = ()) -> Callable[[str], str]:
    """`scrub` for many texts, with the folders, the names and the environment as they are now."""
    secrets, home = _secrets(), _folder(Path.home(), "~")
    roots = sorted({project_root(), *roots}, key=lambda root: len(str(root)), reverse=True)
    folders = [_folder(store_root(), "store"), *(_folder(root, "") for root in roots)]
    names = [
        (re.compile(rf"\b{re.escape(name)}\b"), instead)
        for name, instead in ((socket.gethostname(), "host"), (_user(), "user"))
        if _no_word(name)
    ]

    def scrubbed(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, "***")
        for without in folders:
            text = without(text)
        text = home(KERNEL_FILE.sub("notebook cell", text))
        text = ELSEWHERE.sub("…/", ANY_HOME.sub("~", text))
        for pattern, instead in names:
            text = pattern.sub(instead, text)
        return text

    return scrubbed


def discreet(roots: Iterable[Path] = ()) -> Callable[[str], str]:
    """`scrubber`, also where an encoding of HTML, of URLs or of JSON hides what must not be told: the text is then
    decoded. Half a character becomes a question mark."""
    scrubbed = scrubber(roots)

    def clean(text: str) -> str:
        text = HALF.sub("?", scrubbed(text))
        for decode in (unescape, unquote, _without_escapes):
            decoded = text
            for _ in range(3):  # encoded twice, it is still easy to read
                before, decoded = decoded, decode(decoded)
                if decoded == before:
                    break
                if (known := scrubbed(decoded)) != decoded:
                    text = known
                    break
        return text

    return clean


def _without_escapes(text: str) -> str:
    """Text without the escapes of JSON that a path may be written with."""
    return ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else "/", text)


def _folder(folder: Path, name: str) -> Callable[[str], str]:
    """What puts `name` in place of `folder` in a text; with "", what lies in the folder becomes relative to it."""
    if len(folder.parts) < 2:
        return lambda text: text
    inside, alone = (f"{name}/", name) if name else ("", ".")
    pattern = re.compile(rf"(?<![\w.~-]){re.escape(str(folder))}(?:(/)(?=[\w.])|(?![\w.-]))")
    return lambda text: pattern.sub(lambda found: inside if found[1] else alone, text)


def plain(text: str) -> str:
    """Terminal text as it looks in the end: no colours, and carriage returns played out."""
    lines = ANSI.sub("", text).replace("\r\n", "\n").split("\n")
    settled = (line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines)
    return CONTROL.sub("", "\n".join(settled))


def one_line(text: str, roots: Iterable[Path] = (), longest: int = 300) -> str:
    """Text of a terminal, scrubbed, on one line of at most so many characters; of any path only the last part."""
    line = " ".join(scrub(plain(text), [*roots, Path.cwd()]).split())
    line = ANY_FOLDER.sub("…/", line)
    return line if len(line) <= longest else line[: longest - 1] + "…"
