"""Printed text of a cell: joined, bars as their last state, in time that grows with its length alone."""

import re
from pathlib import Path

import nbformat
from hypothesis import given
from hypothesis import strategies as st

from saftnb.batch import load_grid, run_grid
from saftnb.batch.execute import coalesced, settled
from saftnb.run_folder import find_runs

PIECES = """
import sys
for i in range(6000):
    print("x" * 100, end="", flush=True)
for i in range(50):
    print(f"\\r{i}", end="", file=sys.stderr, flush=True)
print("\\rdone", file=sys.stderr)
"""


@given(st.text("ab\r\n", max_size=30))
def test_carriage_returns_are_played_out_as_by_the_slow_pattern(text: str) -> None:
    assert settled(text) == re.sub(r".*\r(?=[^\n])", "", text)


def test_the_pieces_of_a_stream_stand_where_its_first_stood_and_stdout_before_stderr() -> None:
    def stream(name: str, text: str) -> nbformat.NotebookNode:
        return nbformat.v4.new_output("stream", name=name, text=text)

    figure = nbformat.v4.new_output("display_data", data={"text/plain": "figure"})
    found = coalesced(
        [stream("stderr", "1%"), stream("stdout", "a"), figure, stream("stderr", "\r2%"), stream("stdout", "b")]
    )
    assert [one.get("text", "figure") for one in found] == ["ab", "2%", "figure"]
    assert coalesced([]) == []


def test_a_long_line_does_not_hold_its_run(desk: Path, write_notebook) -> None:
    """With a pattern that is quadratic in a line's length the second cell alone took hours."""
    write_notebook(desk / "long.ipynb", PIECES, 'print("y" * 5_000_000)')
    (desk / "grid.yaml").write_text("runs: [{notebook: long.ipynb, resources: {time_limit: 120}}]")
    run_grid(load_grid("grid.yaml", "runs"), say=lambda _: None)
    (run,) = find_runs(desk / "runs")
    assert run.done, run.manifest
    pieces, line = nbformat.read(run.notebook_file, as_version=4).cells[-2:]
    printed, said = (one["text"] for one in pieces.outputs)
    assert (len(printed), set(printed), said) == (600_000, {"x"}, "done\n")  # long texts that differ: an hour of diff
    assert len(line.outputs[0]["text"]) == 5_000_001
