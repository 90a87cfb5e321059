"""A report that grows while its grid runs: written again after each run that has ended."""

import threading
from collections.abc import Callable
from pathlib import Path

from saftnb.publish.folder import refuse_foreign
from saftnb.publish.index import publish_runs


class LiveReport:
    """Writes the report of `runs` into `out` whenever it is called, in a thread of its own; calls that come meanwhile
    are answered by one more writing.

    Args:
        say: gets a line when the first report stands, and one where a writing failed.

    Raises:
        ValueError: `out` holds anything that is not a page of a report.
    """

    def __init__(self, runs: Path, out: Path, say: Callable[[str], None] = print) -> None:
        refuse_foreign(out)
        self.runs, self.out, self.say = runs, out, say
        self.lock, self.due, self.thread, self.told = threading.Lock(), False, None, False

    def __call__(self) -> None:
        with self.lock:
            self.due = True
            if self.thread is None:
                self.thread = threading.Thread(target=self._write_while_due)  # waited for at exit
                self.thread.start()

    def close(self) -> Path | None:
        """Wait for what is being written, and write once more; returns the index, or None where that fails."""
        thread = self.thread
        if thread is not None:
            thread.join()
        return self._write()

    def _write_while_due(self) -> None:
        while True:
            with self.lock:
                if not self.due:
                    self.thread = None
                    return
                self.due = False
            index = self._write()
            if index is not None and not self.told:
                self.told = True
                self.say(f"report   {index} stands, and grows with each run")

    def _write(self) -> Path | None:
        try:
            return publish_runs(self.runs, self.out)
        except Exception as error:  # a page that cannot be written stops no grid
            self.say(f"report   cannot be written: {' '.join(str(error).split()) or type(error).__name__}")
            return None
