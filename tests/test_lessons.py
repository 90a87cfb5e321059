"""The words of a lesson keep in step with its outputs: every percentage in the prose is shown by a cell."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
LESSONS = ["00_merging_by_hand"]  # those whose prose is written by hand for the committed results


def texts(output: dict) -> list[str]:
    data = output.get("data", {})
    return [
        "".join(part) for part in (output.get("text", ""), data.get("text/html", ""), data.get("text/markdown", ""))
    ]


@pytest.mark.parametrize("name", LESSONS)
def test_every_percentage_in_the_prose_is_shown_by_a_cell(name: str) -> None:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    shown = " ".join(text for cell in cells for output in cell.get("outputs", []) for text in texts(output))
    there = set(re.findall(r"\d+(?:\.\d+)?", shown))
    prose = " ".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    wanted = re.findall(r"(\d+(?:\.\d+)?) %", prose)
    assert wanted
    assert [number for number in wanted if number not in there] == []
