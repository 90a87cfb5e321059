"""What a launcher shows: lines in a file, a table on a terminal, and how much time is left."""

import io
from collections import Counter

import pytest
from rich.console import Console

from saftnb.batch.display import Lines, Overview, Row, Table, fitting_display
from saftnb.labels import duration

AT = {"cell": 7, "of": 19, "heading": "Losses along [bold]lines[/bold]"}


def overview(rows=(), ahead=(), width=2, failed=()) -> Overview:
    return Overview("pocket", 9, Counter(done=3, failed=len(failed)), list(rows), list(failed), list(ahead), width)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (75, "1 min 15 s"),
        (3599, "59 min 59 s"),
        (3661, "1 h 1 min"),
        (90000, "25 h"),
    ],
)
def test_a_duration_is_said_in_its_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_row_says_where_it_is_and_what_is_left() -> None:
    assert (Row("a", AT, 30.0, 100.0).cell, Row("a", AT, 30.0, 100.0).left) == (
        "7 of 19: " + AT["heading"],
        "1 min 10 s",
    )
    assert (Row("a", {}, 30.0, None).cell, Row("a", {}, 30.0, None).left) == ("starting", "?")
    bar = {"bar": {"desc": "train mnist", "n": 120, "total": 200}}
    assert Row("a", AT | bar, 3.0, None).cell == f"7 of 19: {AT['heading']} (train mnist 120/200)"
    assert Row("a", bar, 3.0, None).cell == "starting"
    assert Row("a", AT, 30.0, 10.0).left == "20 s over"


def test_the_time_left_is_shared_by_those_that_run_at_once_but_no_run_is_shared() -> None:
    rows = [Row("a", AT, 30.0, 100.0), Row("b", AT, 500.0, 100.0)]
    assert overview(rows, [130.0, 0.0]).left == "about 2 min 10 s left"  # the longest
    assert overview(rows, [130.0, 120.0, 120.0]).left == "about 3 min 40 s left"  # (70 + 0 + 370) / 2
    assert overview(rows, [None, 130.0]).left == "more than 2 min 10 s left"
    assert overview([Row("a", AT, 1.0, None)]).left == ""
    assert overview(rows, failed=[("c", "failed")]).title == (
        "grid pocket: 3 of 9 done, 2 running, 1 failed, about 1 min 10 s left"
    )


def test_a_terminal_gets_lines_above_a_table_that_follows_the_runs() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None, highlight=False)
    with Table(console) as table:
        table.show(overview([Row("02_merging-1f", AT, 61.0, 100.0)], [30.0], failed=[("01_x-ab", "killed")]))
        table.say("done     [red]01[/red] " + "x" * 200)
    shown = screen.getvalue()
    for text in (
        "02_merging-1f",
        "7 of 19: Losses along [bold]lines[/bold]",
        "1 min 1 s",
        "39 s",
        "01_x-ab",
        "killed",
    ):
        assert text in shown
    assert "done     [red]01[/red] " + "x" * 200 in shown, "one line stays one line, as it is"
    assert shown.index("7 of 19") < shown.index("done     [red]")


def test_without_a_terminal_there_are_only_lines(capsys: pytest.CaptureFixture[str]) -> None:
    shown = fitting_display()
    assert isinstance(shown, Lines)
    with shown:
        shown.say("start    a")
        shown.show(overview())
    assert capsys.readouterr().out == "start    a\n"
