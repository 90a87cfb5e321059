"""A report that grows while its grid runs: written again after each run that has ended."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
        self.writer, self.last, self.told = ThreadPoolExecutor(1), Future[None](), False
        self.last.set_result(None)

    def __call__(self) -> None:
        if self.last.running() or self.last.done():  # else one waits, which will see this run, too
            self.last = self.writer.submit(self._grow)

    def close(self) -> Path | None:
        """Wait for what is being written, and write once more; returns the index, or None where that fails."""
        self.writer.shutdown()
        return self._write()

    def _grow(self) -> None:
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
