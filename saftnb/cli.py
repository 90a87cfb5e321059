"""The command line: ``saftnb grid``, ``keep``, ``report``, ``merge``, ``fetch``, ``doctor``.

Each imports only what it needs.
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import saftnb

ENGINES = ("local", "ray")


class _Refused(Exception):
    """Input that cannot be worked with; the message is one line for the user."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0; 1: a run is not done; 2: bad input; 130: stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal of another alphabet ends no command
            stream.reconfigure(errors="backslashreplace")
    options, rest = _parser().parse_known_args(arguments)
    try:
        if options.command is _merge:
            options.values = _values(rest)
        elif rest:
            _parser().parse_args(arguments)  # which refuses them
        return options.command(options)
    except _Refused as refused:
        print(f"saftnb: {refused}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        from saftnb.extras import extra_of, missing

        if not extra_of(error.name or ""):
            raise
        print(f"saftnb: {missing(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("saftnb: stopped", file=sys.stderr)
        return 130


@contextmanager
def _refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors that users can cause into one line; all others keep their traceback."""
    try:
        yield
    except kinds as error:
        name = getattr(error, "filename", None)
        missing = isinstance(error, FileNotFoundError) and name is not None
        failed = f"{name}: {getattr(error, 'strerror', None)}"
        text = f"{name}: no such file" if missing else str(error) if "None" in failed else failed
        raise _Refused(" ".join(text.split())) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saftnb", description="Grids of notebooks, reports, merges.")
    parser.add_argument("--version", action="version", version=f"saftnb {saftnb.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    grid = commands.add_parser("grid", help="run what is missing of a grid of notebooks")
    grid.add_argument("file", type=Path, metavar="FILE", help="the grid, in YAML")
    grid.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    grid.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: the grid's, or one a GPU, or 1)")
    grid.add_argument("--dry-run", action="store_true", help="check the grid and say what would be run")
    grid.add_argument(
        "--only", action="append", default=[], metavar="PATTERN",
        help="runs whose notebook or id matches, such as '04*', and those they come after; may be given again",
    )  # fmt: skip
    which = grid.add_mutually_exclusive_group()
    which.add_argument("--force", action="store_true", help="run again what is done and unchanged, too")
    which.add_argument(
        "--retry-failed",
        action="store_true",
        help="only what failed, was killed or interrupted, and what waited for it",
    )
    grid.add_argument("--engine", choices=ENGINES, help="default: the grid's, or local")
    grid.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster (default: RAY_ADDRESS, or started here)")
    grid.add_argument("--fresh", action="store_true", help="run here what would be taken from the kept runs")
    grid.add_argument("--report", type=Path, metavar="OUT", help="write the report into OUT, anew after each run")
    grid.set_defaults(command=_grid)
    keep = commands.add_parser("keep", help="write a grid's finished runs, tables and figures where its file says")
    keep.add_argument("file", type=Path, metavar="FILE", help="the grid, in YAML")
    keep.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    keep.set_defaults(command=_keep)
    report = commands.add_parser("report", help="export runs as HTML")
    report.add_argument("runs", type=Path, metavar="RUNS", help="a folder of runs")
    report.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="the folder to write")
    report.add_argument("--no-code", action="store_true", help="leave the notebooks' code out (default: hidden)")
    report.set_defaults(command=_report)
    fetch = commands.add_parser("fetch", help="download what a suite lacks, and check it")
    fetch.add_argument("suite", metavar="SUITE", help="pocket, pocket-nli, vision8 or nli6")
    fetch.add_argument(
        "--backbone", action="append", metavar="NAME", help="of vision8, may be given again (default: ViT-B-32)"
    )
    fetch.add_argument("--models", default="", metavar="SOURCE", help="published models: fusionbench or knots")
    fetch.set_defaults(command=_fetch)
    merge = commands.add_parser(
        "merge", help="merge adapters or models of your own, from files to files",
        usage="saftnb merge [--base BASE] MODEL MODEL ... --method METHOD [--space SPACE] [--scale 0.6 ...] -o OUT",
        epilog="Hyperparameters of the method and the space are options of their own, such as --keep 0.2; see --list.",
    )  # fmt: skip
    merge.add_argument("models", nargs="*", metavar="MODEL", help="PEFT adapters; models' files or folders; hub ids")
    merge.add_argument("--base", help="of models: what they were fine-tuned from")
    merge.add_argument("--method", help="a merge method, see --list")
    merge.add_argument("--space", default="weights", help="a merge space, see --list (default: weights)")
    merge.add_argument("-o", "--out", type=Path, metavar="OUT", help="the folder to write")
    merge.add_argument("--rank", type=int, metavar="R", help="of the merged adapter, at most")
    merge.add_argument("--any-base", action="store_true", help="also adapters that name different base models")
    merge.add_argument("--dry-run", action="store_true", help="check, say shapes, memory, time and result")
    merge.add_argument("--force", action="store_true", help="replace OUT where it is the result of a merge")
    merge.add_argument("--list", action="store_true", help="the methods and spaces, with what they take")
    merge.set_defaults(command=_merge)
    doctor = commands.add_parser("doctor", help="say what this machine has, what is missing, and what mends it")
    doctor.set_defaults(command=_doctor)
    return parser


def _grid(options: argparse.Namespace) -> int:
    from saftnb.batch.display import fitting_display
    from saftnb.batch.engine import OVER, run_grid
    from saftnb.batch.grid import GridError, load_grid
    from saftnb.batch.plan import measured_hours, plan

    with _refusing(ValueError, OSError):
        if options.jobs is not None and options.jobs < 1:
            raise ValueError(f"--jobs is {options.jobs}, not a whole number of at least 1")
        grid = load_grid(options.file, options.runs)
        grid = replace(grid, engine=options.engine or grid.engine)
        if options.address and grid.engine != "ray":
            raise ValueError("--address is for --engine ray")
        if options.dry_run:
            planned = plan(grid, options.force, options.fresh, options.only, options.retry_failed)
            print(*planned.lines(), sep="\n")
            about = planned.estimate(options.jobs or grid.jobs or 1) or measured_hours(grid, planned.todo)
            print(f"{len(planned.todo)} to do{about}")
            return 0
    display, live, index = fitting_display(), None, None
    if options.report:
        from saftnb.publish import LiveReport

        with _refusing(ValueError):
            live = LiveReport(grid.folder, options.report, display.say)
    with _stopped_politely(), _refusing(GridError, OSError):
        statuses = run_grid(
            grid, options.jobs, options.force, fresh=options.fresh, only=options.only,
            retry_failed=options.retry_failed, address=options.address, display=display, after_each=live,
        ).values()  # fmt: skip
        if live:
            index = live.close()
    if index:
        print(f"open {index}")
    if "interrupted" in statuses or "not started" in statuses:
        return 130
    return 0 if all(status in OVER for status in statuses) and (index or not live) else 1


@contextmanager
def _stopped_politely() -> Iterator[None]:
    """SIGTERM and SIGHUP stop a grid as Ctrl-C does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep(options: argparse.Namespace) -> int:
    from saftnb.batch.grid import load_grid
    from saftnb.batch.kept import keep

    with _refusing(ValueError, OSError):
        grid = load_grid(options.file, options.runs)
        kept = keep(grid)
    names = ", ".join(file.name for file in kept.files)
    dropped = f" ({kept.dropped} dropped)" if kept.dropped else ""
    print(f"{kept.runs} of {sum(not run.after for run in grid.runs)} runs kept{dropped}; wrote {names}")
    return 0


def _report(options: argparse.Namespace) -> int:
    with _refusing(ValueError, OSError):
        if not options.runs.is_dir():
            raise FileNotFoundError(f"{options.runs}: no such folder of runs")
        from saftnb.publish import publish_runs

        print(f"open {publish_runs(options.runs, options.out, code=not options.no_code)}")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    with _refusing(ValueError, OSError, RuntimeError):
        from saftnb.prepare import fetch

        given = {"backbones": options.backbone, "models": options.models}
        fetch(options.suite, **{name: value for name, value in given.items() if value})
    return 0


def _merge(options: argparse.Namespace) -> int:
    from saftnb.merging import files

    if options.list:
        if options.models or options.values:
            raise _Refused("--list takes nothing else")
        print(*files.listing(), sep="\n")
        return 0
    for name in ("method", "out"):
        if not getattr(options, name) and not (name == "out" and options.dry_run):
            raise _Refused(f"--{name} is missing: saftnb merge MODEL MODEL … --method METHOD -o OUT (see --list)")
    with _refusing(ValueError, OSError):
        planned = files.plan(
            options.models, options.out, options.method, space=options.space, values=options.values,
            base=options.base, rank=options.rank, any_base=options.any_base, force=options.force,
        )  # fmt: skip
        if options.dry_run:
            print(*planned.lines(), sep="\n")
            return 0
        for note in planned.notes:
            print(f"saftnb: {note}", file=sys.stderr)
        said = files.execute(planned)
    print(*said, f"wrote {options.out}", sep="\n")
    return 0


def _values(rest: Sequence[str]) -> dict[str, str]:
    """Hyperparameters among the arguments: --keep 0.2, or --keep=0.2."""
    found, left = {}, list(rest)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if not name.startswith("--") or not (equals or left):
            raise _Refused(f"{name}: not an option with a value, such as --keep 0.2")
        found[name.removeprefix("--").replace("-", "_")] = value if equals else left.pop(0)
    return found


def _doctor(options: argparse.Namespace) -> int:
    with _refusing(ValueError, OSError):
        from saftnb.prepare import doctor

        table = doctor().reset_index()
        lines = [list(table), *table.to_numpy().tolist()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print("  ".join(cells).rstrip())
    return 0


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
