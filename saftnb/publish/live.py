"""A report that grows while its grid runs: written again after each run that has ended."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from saftnb.publish.folder import refuse_foreign
from saftnb.publish.index import publish_runs


class LiveReport:
    """Writes the report of `runs` into `out` whenever it is called, in a thread of its own; calls that come meanwhile
    are answered by one more writing. `say` gets a line when the first report stands, and where a writing failed.
    ValueError where `out` holds anything that is not a page of a report."""

    def __init__(self, runs: Path, out: Path, say: Callable[[str], None] = print) -> None:
        refuse_foreign(out)
        self.runs, self.out, self.say, self.stands = runs, out, say, False
        self.writer, self.last = ThreadPoolExecutor(1), Future[Path | None]()
        self.last.set_result(None)

    def __call__(self) -> None:
        if self.last.running() or self.last.done():  # else one waits, which will see this run, too
            self.last = self.writer.submit(self._write)

    def close(self) -> Path | None:
        """Wait for what is being written, and write once more; returns the index, or None where that fails."""
        self.writer.shutdown()
        return self._write()

    def _write(self) -> Path | None:
        try:
            index = publish_runs(self.runs, self.out)
        except Exception as error:  # a page that cannot be written stops no grid
            self.say(f"report   cannot be written: {' '.join(str(error).split()) or type(error).__name__}")
            return None
        if not self.stands:
            self.stands = True
            self.say(f"report   {index} stands, and grows with each run")
        return index
