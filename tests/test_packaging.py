"""The files around the library keep in step with it."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml

from saftnb.batch import load_grid
from saftnb.batch.kept import headline_figures
from saftnb.evaluate import interval_text

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirement_name(line: str) -> str:
    return re.split(r"[\s\[<>=!;]", line, maxsplit=1)[0].lower().replace("-", "_")


def test_environment_yml_installs_the_project_and_lists_no_dependency_of_its_own():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, nested = environment["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert pip == "pip"
    (install,) = nested["pip"]
    folder, extra = re.fullmatch(r"-e (\.)\[(\w+)\]", install).groups()
    assert folder == "."
    assert extra in PROJECT["optional-dependencies"]
    assert environment["name"] == PROJECT["name"]


def test_the_makefile_installs_the_same_extra():
    extra = re.search(r"-e '\.\[(\w+)\]'", (ROOT / "Makefile").read_text())[1]
    assert f"-e .[{extra}]" in (ROOT / "environment.yml").read_text()


def test_the_packages_that_the_project_promises_are_dependencies():
    extras = PROJECT["optional-dependencies"]
    names = {requirement_name(line) for line in PROJECT["dependencies"]}
    names |= {requirement_name(line) for extra in ("full", "notebooks", "test") for line in extras[extra]}
    promised = {"jupyterlab", "papermill", "torch", "open_clip_torch", "peft", "matplotlib", "seaborn", "pandas"}
    assert promised | {"nbval", "pytest"} <= names
    assert set(extras) == {"full", "notebooks", "test", "cluster", "pretrain"}


def test_importing_the_library_needs_neither_cuda_nor_the_pre_training_packages():
    code = "import sys, saftnb.finetune, saftnb.merging; sys.exit('resvg_py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""}, cwd=ROOT)
    assert done.returncode == 0


@pytest.mark.parametrize(("file", "listed"), [("__init__.py", "_DOORS"), ("finetune/__init__.py", "_PLACES")])
def test_type_checkers_see_what_is_loaded_when_it_is_asked_for(file, listed):
    tree = ast.parse((ROOT / "saftnb" / file).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = [alias for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    renamed = [name.id for node in block.body if isinstance(node, ast.Assign) for name in node.targets[0].elts]
    shown = {alias.asname for alias in imported if alias.asname} | set(renamed)
    (names,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
                and getattr(node.targets[0], "id", "") == listed]  # fmt: skip
    assert shown == set(names)


def test_rooms_import_only_from_rooms_above_them():
    order = ["labels", "extras", "paths", "scrub", "disk", "run_folder", "progress", "delta", "task_vector",
             "formats", "reference", "render", "backbones", "suites", "prepare", "evaluate", "scores", "finetune",
             "merging", "analysis", "plots", "batch", "publish", "cli"]  # fmt: skip
    for path in (ROOT / "saftnb").rglob("*.py"):
        room = path.relative_to(ROOT / "saftnb").parts[0].removesuffix(".py")
        if room.startswith("__"):
            continue
        for found in re.findall(r"^\s*(?:from|import) saftnb\.(\w+)", path.read_text(), re.MULTILINE):
            assert order.index(found) <= order.index(room), f"{path.relative_to(ROOT)} imports {found}"


def test_the_guides_estimates_cover_every_run_at_full_size():
    table = (GUIDE / "full_size.md").read_text().partition("| grid | notebook |")[2].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    for name in ("vision8", "knots-vision", "nli6"):
        grid = load_grid(ROOT / "notebooks" / "grids" / f"{name}.yaml", ROOT / "runs")
        assert sum(int(row[4]) for row in rows if row[0] == name) == len(grid.runs)
        assert {row[1] for row in rows if row[0] == name} == {run.notebook.name for run in grid.runs}


def test_every_notebook_runs_at_full_size_on_stand_ins():
    grid = load_grid(ROOT / "tests" / "tools" / "standins.yaml")
    named = {run.notebook.name for run in grid.runs}
    there = {path.stem for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    # One makes the pocket backbone; the others have no suite, they read what a grid recorded.
    assert there - named == {"pretrain_pocket_clip", "03_evidence", "15_pocket_and_published"}
    assert all(run.parameters["suite"] in ("vision8", "nli6") for run in grid.runs)


def test_nothing_that_users_read_names_a_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    traces = re.compile("/root/|/home/|/work/|/users/", re.IGNORECASE)
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".safetensors", ".png"} or name.startswith("tests/") or not path.is_file():
            continue
        found = traces.search(path.read_text())
        assert not found, f"{name} holds {found[0]}"


GUIDE = ROOT / "notebooks" / "guide"


def section(page: Path, title: str) -> str:
    return page.read_text().split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_results_quote_only_numbers_of_the_kept_evidence():
    """Every difference with its interval stands in the tables under the recipe that the page names before it."""
    text = section(GUIDE / "results.md", "Does SAFT merge better here?")
    folder = ROOT / "reports" / "pocket-seeds"
    primary = pd.read_csv(folder / "primary.csv").set_index(["recipe", "group"])
    against = pd.read_csv(folder / "saft_against.csv").set_index("SAFT minus")
    number = r"[+-]\d+\.\d"
    interval = rf"({number})\s+points\s+\(({number})\s+to\s+({number})\)"
    found = re.findall(rf"(SAFT\s+minus\s+)?`([\w-]+)`[^`|]*?\s{interval}", text)
    assert len(found) == len(re.findall(interval, text)) >= 4
    for minus, recipe, *numbers in found:
        line = against.loc[recipe] if minus else primary.loc[(recipe, "all backbones")]
        values = [line[name] for name in ("mean", "low", "high")]
        assert [float(n) for n in numbers] == pytest.approx(values, abs=0.05 + 1e-4), recipe  # rounded once more
    sweep = pd.read_csv(folder / "sweep.csv")["gain"]
    one = {f"{value:+.1f}" for value in [*primary["mean"], *sweep]}
    rest = {f"{value:.1f}" for value in pd.read_csv(folder / "headline.csv").select_dtypes("number").to_numpy().ravel()}
    left = re.sub("`[^`]*`", "", re.sub(interval, "", text))  # nor the numbers in a recipe's name
    assert [n for n in re.findall(r"[+-]?\d+\.\d\b", left) if n not in one | rest] == []


@pytest.mark.parametrize(
    ("title", "lines_"),
    [
        ("What carries over from the papers' size?", 1),
        ("Does that depend on the learning rate?", 1),
        ("Why: what the analyses say here", 5),
        ("Does KnOTS's basis help here?", 6),
        ("What do learned coefficients bring?", 1),
    ],
)
def test_the_results_quote_only_what_the_notebooks_show(title, lines_):
    """Every number with a decimal point, in a line on a notebook's results, stands in its outputs."""
    lines = section(GUIDE / "results.md", title).split("\n- ")[1:]
    assert len(lines) == lines_
    for line in lines:
        link, rest = re.match(r"\[\w+\]\((.*?)\):(.*)", line, re.DOTALL).groups()
        cells = json.loads((GUIDE / link).read_text())["cells"]
        shown = [text for cell in cells for out in cell.get("outputs", []) for text in _texts(out)]
        there = set(re.findall(r"[+−]?\d+\.\d+", " ".join(shown).replace("-", "−")))
        wanted = re.findall(r"[+−]?\d+\.\d+", re.sub(r"ρ = \d\.\d", "", rest))
        assert wanted
        assert [number for number in wanted if number not in there] == [], link


def _texts(output: dict) -> list[str]:
    data = output.get("data", {})
    return [
        "".join(text) for text in (output.get("text", ""), data.get("text/markdown", ""), data.get("text/html", ""))
    ]


def test_the_readme_is_short_and_its_links_and_pictures_are_there():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1000
    for page in (ROOT / "README.md", *GUIDE.glob("*.md")):
        for target in re.findall(r"(?:\]\(|src=\")([^)\"#]+)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
    notebooks = {path.stem for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert {name for name in notebooks if f"{name}.ipynb" not in text} == set()


def test_contributing_is_short_and_every_file_that_it_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert len(text.split()) <= 900
    named = re.findall(r"`([^`\s]+)`|\]\(([^)]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    paths = {path for pair in named for path in pair if "/" in path or re.search(r"\.(md|py|toml|ya?ml)$", path)}
    paths |= set(re.findall(r"(?:saftnb|tests|notebooks|reports)/[\w./-]+", text))
    paths = {path for path in paths if not path.startswith((".venv", "https://"))}
    assert len(paths) > 20
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_the_kept_evidence_is_what_its_notebook_shows():
    folder, notebook = ROOT / "reports" / "pocket-seeds", json.loads((ROOT / "notebooks/03_evidence.ipynb").read_text())
    (shown,) = headline_figures(notebook)
    assert (folder / "03_evidence.png").read_bytes() == shown
    primary = pd.read_csv(folder / "primary.csv").set_index(["recipe", "group"])
    shown = " ".join(text for cell in notebook["cells"] for out in cell.get("outputs", []) for text in _texts(out))
    for recipe, group in [("saft", "all backbones"), ("sgd-wd0", "all backbones")]:
        line = primary.loc[(recipe, group)]
        assert interval_text((line["mean"], line["low"], line["high"])) in shown


def test_the_readme_says_what_both_regimes_found():
    text, folder = " ".join((ROOT / "README.md").read_text().split()), ROOT / "reports" / "pocket-seeds"
    first = pd.read_csv(folder / "primary.csv").set_index(["recipe", "group"]).loc[("saft", "all backbones")]
    low, high = -first["low"], first["high"]
    behind = f"{-first['mean']:.1f} percentage points behind AdamW's"
    assert f"{behind} (95 % interval: {low:.1f} behind to {high:.1f} ahead)" in text
    second = pd.read_csv(folder / "second_regime.csv").set_index("outcome").iloc[0]
    assert f"SAFT is {second['mean']:.1f} points ahead ({second['low']:.1f} to {second['high']:.1f};" in text
    assert second["verdict"] == "above 0"


def test_the_readme_and_the_guide_say_what_carries_over():
    readme, guide = (" ".join(path.read_text().split()) for path in (ROOT / "README.md", GUIDE / "results.md"))
    table = pd.read_csv(ROOT / "reports" / "pocket-calibration" / "verdicts.csv").set_index("fact")
    tsv_m = table.loc["share: tsv_m"]
    assert f"TSV-M covers {tsv_m['mean']:.0f} % of the way from zero-shot to experts; about 85 % is quoted" in readme
    assert tsv_m["verdict"] == "does not"
    steps = table.loc[["average<ta", "ta<ties", "ties<iso_c", "ties<tsv_m"]]  # "carries over in part"
    assert (steps["mean"] > 0).all()
    assert steps["verdict"].tolist() == ["carries over", "not clear", "carries over", "carries over"]
    for fact in ("average<ta", "ta<ties", "ties<tsv_m", "share: average", "plain<tangent", "ties<knots", "lora<full"):
        assert table.loc[fact, "here"] in guide, fact


def test_each_event_in_the_guides_table_has_the_test_that_it_names():
    table = (GUIDE / "grids.md").read_text().split("| what happens |")[1].split("\n\n")[0]
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "batch").glob("test_*.py"))
    defined = re.findall(r"^def test_(\w+)", tests, re.MULTILINE)
    rows = table.splitlines()[2:]
    assert len(rows) == 8
    for row in rows:
        named = [name for name in re.findall(r"`([^`]+)`", row.split("|")[4]) if not name.endswith(".py")]
        assert named, row
        assert set(named) <= set(defined), row


def test_each_promise_has_the_test_that_it_names():
    text = (ROOT / "tests" / "README.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    rows = [row for row in text.splitlines() if row.startswith("| ") and "| command |" not in row]
    assert len(rows) > 25
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for row in rows:
        for name in re.findall(r"`([^`]+)`", "|".join(row.split("|")[2:])):
            words = name.split()
            places = words[1:] if words[0] == "pytest" else [name] if "/" in name else []
            assert all((ROOT / place).exists() for place in places), row
            assert words[0] != "make" or words[1] in targets, row
            assert not name.startswith("test_") or name in defined, row
