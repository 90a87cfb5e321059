"""Progress bars: a widget in JupyterLab, a bar on a terminal, and in a headless run one line when it has ended.

A headless run also notes where it is in its folder, for those who watch the grid.
"""

import io
import os
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from saftnb.run_folder import BAR, run_folder, write_json

LIVE = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")  # a Jupyter server, VS Code and Colab set one of these


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> "tqdm[Any]":
    """A `tqdm` bar of the kind that fits the place; ``options`` are tqdm's."""
    return _kind()(iterable, **options)


def _kind() -> "type[tqdm[Any]]":
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if type(shell).__name__ != "ZMQInteractiveShell":
        return tqdm
    if run_folder() is not None or not any(name in os.environ for name in LIVE):
        return OneLine
    from tqdm.notebook import tqdm as widget

    return widget


class OneLine(tqdm):  # pyright: ignore[reportMissingTypeArgument]  (it takes none when it runs)
    """A bar that shows nothing until it is closed, and then its last line."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.noted = 0.0
        super().__init__(*arguments, **options | {"file": io.StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        folder, now = run_folder(), time.monotonic()
        if folder is not None and now - self.noted > 1:
            self.noted = now
            write_json(folder / BAR, {"desc": self.desc, "n": self.n, "total": self.total}, durable=False)

    def close(self) -> None:
        if self.disable:
            return
        line = self.format_meter(**self.format_dict)
        super().close()
        folder = run_folder()
        if folder is not None:
            (folder / BAR).unlink(missing_ok=True)
        print(line, file=sys.stderr, flush=True)
