"""The folder that `saftnb merge` writes: what may be replaced, and the README.md that tells it from other folders."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from saftnb.formats.adapter import WEIGHTS, is_adapter
from saftnb.formats.checkpoint import open_checkpoint

HEADING = "# A merged model"  # of a result's README.md, which tells it from other folders,
FILES = "Files: "  # and what it holds


def require_free(out: Path, inputs: Sequence[Path], force: bool) -> None:
    """Raises unless `out` can be written, and holds nothing that would be lost but the result of a merge."""
    if not out.name or out.name == "..":
        raise ValueError(f"-o {out}: the name of a new folder is wanted")
    place = os.path.realpath(out)  # Path.resolve raises at a symbolic link that leads to itself
    held = [path for path in inputs if Path(os.path.realpath(path)).is_relative_to(place)]
    if held:
        raise ValueError(f"{out} is, or holds, what is to be merged: {held[0]}")
    if out.is_symlink() or out.exists():
        if not force:
            raise FileExistsError(f"{out} is there already; --force replaces it")
        mark = out / "README.md"
        text = mark.read_text(errors="replace") if not out.is_symlink() and mark.is_file() else ""
        ours = text.splitlines()[:1] == [HEADING]
        written = {"README.md", *re.findall(r"`([^`]+)`", text.rpartition(FILES)[2])}
        foreign = [entry.name for entry in sorted(out.iterdir()) if entry.name not in written] if ours else []
        if not ours or foreign:
            why = f"it has {foreign[0]!r}, which no merge wrote" if foreign else "it has no README.md of one"
            raise FileExistsError(f"{out} is no result of a merge ({why}): --force does not replace it")
    above = out.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PermissionError(f"{out}: {above} is {'not writable' if above.is_dir() else 'no folder'}")


def write_readme(folder: Path, text: str) -> None:
    """The README.md of a result, with the names of the files that are there now at its end."""
    held = ", ".join(f"`{file.name}`" for file in sorted(folder.iterdir()))
    (folder / "README.md").write_text(f"{text}\n{FILES}{held}.\n", encoding="utf-8")


def digests(path: Path) -> Iterator[str]:
    """Each file of weights with its SHA-256, as `sha256sum` gives it."""
    files = [path] if path.is_file() else [path / name for name in WEIGHTS if (path / name).is_file()][:1]
    for file in files if files and (path.is_file() or is_adapter(path)) else open_checkpoint(path).files:
        name = file.name if path.is_file() else f"{path.name}/{file.name}"
        with open(file, "rb") as opened:
            yield f"{name}`, sha256 {hashlib.file_digest(opened, 'sha256').hexdigest()}"
