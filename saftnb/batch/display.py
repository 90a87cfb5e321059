"""What a launcher shows while a grid runs: lines, or on a terminal a table that follows the runs."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from saftnb.labels import duration


@dataclass(frozen=True)
class Row:
    """One run that goes on: where its notebook is, its seconds so far, and those it is expected to take."""

    run: str
    progress: dict[str, Any]
    seconds: float
    expected: float | None

    @property
    def cell(self) -> str:
        if "cell" not in self.progress:
            return "starting"
        heading, bar = self.progress.get("heading"), self.progress.get("bar")
        where = f"{self.progress['cell']} of {self.progress['of']}{f': {heading}' if heading else ''}"
        return f"{where} ({bar['desc']} {bar['n']}/{bar['total']})" if bar else where

    @property
    def left(self) -> str:
        if self.expected is None:
            return "?"
        rest = self.expected - self.seconds
        return duration(rest) if rest >= 0 else f"{duration(-rest)} over"


@dataclass(frozen=True)
class Overview:
    """The state of a grid: how many runs have which status, those that go on, those that failed, and what is ahead."""

    grid: str
    runs: int
    counts: Counter[str]
    rows: list[Row]
    failed: list[tuple[str, str]]
    ahead: list[float | None]  # seconds that the runs not yet begun are expected to take
    width: int

    @property
    def left(self) -> str:
        """The time until the end, by budgets and earlier runs."""
        rest = [None if row.expected is None else max(0.0, row.expected - row.seconds) for row in self.rows]
        known = [seconds for seconds in rest + self.ahead if seconds is not None]
        seconds = max([sum(known) / max(1, self.width), *known], default=0.0)
        if len(known) < len(rest) + len(self.ahead):
            return f"more than {duration(seconds)} left" if known else ""
        return f"about {duration(seconds)} left"

    @property
    def title(self) -> str:
        bad = {status: n for status, n in self.counts.items() if status != "done"}
        words = [f"{self.counts['done']} of {self.runs} done", f"{len(self.rows)} running"]
        words += [f"{n} {status}" for status, n in bad.items()] + [self.left]
        return f"grid {self.grid}: {', '.join(filter(None, words))}"


class Display(Protocol):
    """Where a launcher writes; used as a context."""

    def __enter__(self) -> "Display": ...
    def __exit__(self, *error: object) -> None: ...
    def say(self, line: str, /) -> None: ...
    def show(self, state: Overview, /) -> None: ...


class Lines:
    """Only lines, for a file or a pipe."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.say = say or (lambda line: print(line, flush=True))

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, state: Overview) -> None:
        pass


class Table:
    """Lines, and below them a table of what is running, redrawn in place; for a terminal."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = console or Console(highlight=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Table":
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def show(self, state: Overview) -> None:
        """Redraw the table."""
        from rich import box
        from rich.table import Table as Drawn
        from rich.text import Text

        drawn = Drawn(
            title=Text(state.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, expand=True
        )
        drawn.add_column("running", ratio=4, no_wrap=True, overflow="ellipsis")
        drawn.add_column("cell", ratio=5, no_wrap=True, overflow="ellipsis")
        drawn.add_column("time", justify="right", no_wrap=True)
        drawn.add_column("left", justify="right", no_wrap=True)
        for row in state.rows:
            drawn.add_row(Text(row.run), Text(row.cell), duration(row.seconds), row.left)
        for run, status in state.failed:
            drawn.add_row(Text(run, style="red"), Text(status, style="red"), "", "")
        self.live.update(drawn, refresh=True)


def fitting_display() -> Display:
    """A table where standard output is a terminal, else lines."""
    return Table() if sys.stdout.isatty() else Lines()
