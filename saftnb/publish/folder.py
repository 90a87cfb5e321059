"""A report folder is replaced whole or not at all, and only where every file in it is a report's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saftnb.disk import whole_folder

GENERATOR = b'<meta name="generator" content="saftnb report">'  # in the template of all pages


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A new folder to build a report in, which takes the place of `out` when the block ends well; else `out` stays as
    it was. ValueError where `out` holds anything that is not a page of a report."""
    out = Path(os.path.abspath(out))
    refuse_foreign(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as building:
        yield building
        refuse_foreign(out)  # somebody may have put a file there meanwhile


def refuse_foreign(out: Path) -> None:
    """ValueError unless `out` is new, empty, or holds pages of a report and nothing else."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out} is not a folder; choose another place for the report")
    foreign = [entry.name for entry in sorted(out.iterdir()) if not _is_page(entry)] if out.exists() else []
    if foreign:
        more = f" and {len(foreign) - 1} more" if foreign[1:] else ""
        raise ValueError(f"{out} holds {foreign[0]}{more}, which no report wrote; choose another folder")


def _is_page(entry: Path) -> bool:
    if not entry.is_file() or entry.is_symlink() or entry.suffix != ".html":
        return False
    with entry.open("rb") as file:
        return GENERATOR in file.read(2000)
