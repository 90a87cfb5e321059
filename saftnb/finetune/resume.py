"""A training in progress on disk: when its state is saved, how it is written whole, how it is read again."""

import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from saftnb.disk import whole_file

_OF = "file"  # in a state: the name of its file, which says of what; the first states did not have it
SAVE_EVERY = 50  # steps between saves of the training state, at least
SAVE_SHARE = 0.1  # of the time may go into saves: at full size a state is some GB
State = dict[str, Any]  # of a training in progress: tensors and numbers, by name


class Saves:
    """Saves a state now and then: every `SAVE_EVERY` steps, and only where that takes little of the time."""

    def __init__(self, save: Callable[[State], None]):
        self._save, self._last, self._cost = save, time.perf_counter(), 0.0

    def after(self, step: int, state: Callable[[], State]) -> None:
        """To be called after each step."""
        start = time.perf_counter()
        if step % SAVE_EVERY == 0 and start - self._last >= self._cost / SAVE_SHARE:
            self._save(state())
            self._last = time.perf_counter()
            self._cost = self._last - start


def save_state(state: State, path: Path) -> None:
    """Write a training state whole or not at all."""
    with whole_file(path) as part, part.open("wb") as file:  # by name, torch's own writer has other errors
        try:
            torch.save({_OF: path.name} | state, file)
        except RuntimeError as error:  # torch's second one, as it closes the file that it could not write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(path: Path) -> State | None:
    """The state of a training that was cut off; None where there is none, or (with a warning) where it cannot be read
    or is another training's."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as state:  # torch writes checksums, and does not compare them
            if state.testzip() is not None:
                raise ValueError
        found = torch.load(path, map_location="cpu", weights_only=True)
        if found.pop(_OF, path.name) != path.name:
            raise ValueError
        return found
    except Exception:  # whatever torch makes of a file that is not one of its own
        warnings.warn(f"the training state {path.name} cannot be read: training starts anew", stacklevel=4)
        return None
