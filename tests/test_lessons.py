"""Lessons: their words keep in step with their outputs, and they keep the shape that makes them readable."""

import json
import re
from pathlib import Path

import pytest

from tests.tools.thimble_notebooks import SIZES, check, notebooks

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
# Those whose prose is written by hand for the committed results.
LESSONS = [
    "00_merging_by_hand",
    "01_sharpness_aware_finetuning",
    "02_merging_comparison",
    "03_evidence",
    "04_weight_disentanglement",
    "05_cross_task_linearity",
    "06_joint_loss_linearity",
    "07_sharpness",
    "08_lora_merging",
    "09_joint_task",
    "10_alignment",
    "11_knots_ablations",
    "12_flat_and_aligned",
    "13_nli",
    "14_learned_merging",
    "15_pocket_and_published",
]
NUMBER = r"[+−]?\d+(?:\.\d+)?"


def cells_of(name: str) -> list[dict]:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]


def texts(output: dict) -> list[str]:
    data = output.get("data", {})
    return [
        "".join(part) for part in (output.get("text", ""), data.get("text/html", ""), data.get("text/markdown", ""))
    ]


def quoted(prose: str) -> list[str]:
    """The numbers that prose quotes as results: in percent, in points, and those with a decimal point or a sign."""
    prose = re.sub(r"\(https://[^)]*\)|\[\d{4}\.\d{5}\]|95 %", "", prose)
    return re.findall(rf"({NUMBER})(?= %| points)", prose) + re.findall(r"(?<![\w.])[+−]\d+(?:\.\d+)?|\d+\.\d+", prose)


@pytest.mark.parametrize("name", LESSONS)
def test_every_number_in_the_prose_on_results_is_shown_by_a_cell(name: str) -> None:
    shown = " ".join(text for cell in cells_of(name) for output in cell.get("outputs", []) for text in texts(output))
    shown = shown.replace("-", "−")
    there = set(re.findall(NUMBER, shown))
    there |= {number.lstrip("+−") for number in there}
    code = " ".join("".join(cell["source"]) for cell in cells_of(name) if cell["cell_type"] == "code")
    there |= set(re.findall(r"\d+(?:\.\d+)?", code))  # what the reader sees go in: λ, ρ, a size
    prose = [cell for cell in cells_of(name) if "committed-results" in cell["metadata"].get("tags", [])]
    wanted = [number for cell in prose for number in quoted("".join(cell["source"]))]
    assert wanted
    assert [number for number in wanted if number not in there] == []


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_asks_answers_and_stays_short(name: str) -> None:
    cells = cells_of(name)
    first = "".join(cells[0]["source"]).splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith("?")
    assert cells[1]["metadata"].get("tags") == ["committed-results"]  # the answer
    assert 12 <= len(cells) <= 46
    code = [
        cell for cell in cells if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    ]
    assert max(len(cell["source"]) for cell in code) <= 24
    checks = sum("nbval-check-output" in cell["metadata"].get("tags", []) for cell in cells)
    assert 1 <= checks <= 3
    words = sum(len("".join(cell["source"]).split()) for cell in cells if cell["cell_type"] == "markdown")
    assert words >= 2 * sum(len(cell["source"]) for cell in code)


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_every_notebook_is_ready_for_nbval(path: Path) -> None:
    """What `make test` asks of a notebook before it runs it, asked early."""
    check(path)
    assert path.relative_to(NOTEBOOKS).with_suffix("").as_posix() in SIZES
