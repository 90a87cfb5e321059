"""Bad grids and command lines, as a table: exit code 2, one line, nothing written."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from safetensors.torch import save_file

from saftnb import cli
from saftnb.merging import TaskVector

PARAMETERS = "suite: str = 'pocket'\nseed: int = 0\nlr: float = 0.1\n"


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """Two notebooks, a grid, and some files to be merged, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAFTNB_STORE", str(tmp_path / "store"))
    Path("notebooks").mkdir()
    cell = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    for name in "ab":
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), f"notebooks/{name}.ipynb")
    Path("g.yaml").write_text("runs: [{notebook: a}]")
    for name, delta in (("one", torch.ones(2, 2)), ("wide", torch.ones(2, 3)), ("bad", torch.full((2, 2), torch.nan))):
        # as TaskVector.save writes them, which itself writes nothing that is not finite
        save_file({"w": delta}, f"{name}.safetensors", metadata={"saftnb": "task vector, version 1"})
    TaskVector({"v": torch.ones(2, 2)}).save("other.safetensors")
    Path("there").mkdir()
    Path("there/mine.txt").write_text("keep me")
    Path("cut.safetensors").write_bytes(Path("one.safetensors").read_bytes()[:-4])
    return tmp_path


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def called(words: list[str], capsys) -> tuple[object, list[str]]:
    """The exit code and what stands on stderr; argparse's usage is left out."""
    try:
        code = cli.main(words)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    assert said.out == ""
    return code, re.sub(r"usage: .*(\n .*)*\n", "", said.err).splitlines()


def is_line(found: list[str], wanted: str) -> bool:
    return len(found) == 1 and re.fullmatch(".*".join(map(re.escape, wanted.split("…"))), found[0]) is not None


LAUGHS = "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]"] + [
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
])  # fmt: skip
MERGED = "\n".join(["a: &a {x: 1}"] + [
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
])  # fmt: skip
RUNS = "runs: [{notebook: a}]"
GRIDS = [  # name, the file, the line
    ("nothing", "", "g.yaml: the grid has no list of runs"),
    ("a tab", "runs:\n\t- notebook: a", "g.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
    ("an open bracket", "runs: [", "g.yaml:1: not valid YAML: …"),
    ("two documents", f"{RUNS}\n---\n{RUNS}", "g.yaml:2: not valid YAML: but found another document"),
    ("a key twice", f"jobs: 1\njobs: 2\n{RUNS}", "g.yaml:1: the key 'jobs' is given twice"),
    ("a key that is a list", f"? [a]\n: 1\n{RUNS}", "g.yaml:1: a key is not plain text"),
    ("anchors of anchors", f"{LAUGHS}\n{RUNS}", "g.yaml: its anchors repeat to more than 1,000,000 entries"),
    ("merge keys of merge keys", f"{MERGED}\n{RUNS}", "g.yaml: its anchors repeat to more than 1,000,000 entries"),
    ("something in itself", "runs: &a [*a]", "g.yaml: something in it contains itself"),
    ("bytes that are no UTF-8", b"runs: \xff", "g.yaml: cannot be read: 'utf-8' codec can't decode byte 0xff …"),
    ("UTF-16", RUNS.encode("utf-16"), "g.yaml: cannot be read: 'utf-8' codec can't decode byte 0xff …"),
    ("a byte 0", b"runs: \0", "g.yaml: not valid YAML: unacceptable character #x0000: …"),
    ("a number of 5,000 digits", f"jobs: 1{'0' * 5000}\n{RUNS}",
     "g.yaml:1: '1000…000...' with the tag … is not supported"),
    ("a text for jobs", f"jobs: two\n{RUNS}", "g.yaml:1: jobs is 'two', not a whole number of at least 1"),
    ("an unknown engine", f"engine: dask\n{RUNS}", "g.yaml:1: unknown engine 'dask'; there are: local, ray"),
    ("an unknown key", f"rums: []\n{RUNS}", "g.yaml:1: unknown key 'rums' in the grid; it may have name, engine, …"),
    ("a folder for a notebook", "runs: [{notebook: notebooks}]",
     "g.yaml:1: there is no notebook 'notebooks'; there are: a, b…"),
    ("a name of 300 letters", f"runs: [{{notebook: {'a' * 300}}}]", "…: File name too long"),
    ("an unknown notebook", "runs: [{notebook: c}]", "g.yaml:1: there is no notebook 'c'; there are: a, b…"),
    ("an unknown parameter", "runs: [{notebook: a, parameters: {sede: 1}}]",
     "g.yaml:1: a: unknown parameter 'sede'; it declares: suite, seed, lr"),
    ("half a seed", "runs:\n- notebook: a\n  parameters: {seed: 1.5}",
     "g.yaml:3: a: parameter 'seed': 1.5 is not of type int"),
    ("NaN", "runs: [{notebook: a, parameters: {lr: .nan}}]",
     "g.yaml:1: a: parameter 'lr': '.nan' is not of type float"),
    ("infinity", "runs: [{notebook: a, parameters: {lr: 1e999}}]",
     "g.yaml:1: a: parameter 'lr': inf is not a finite float"),
    ("an empty sweep", "runs: [{notebook: a, sweep: {seed: []}}]",
     "g.yaml:1: a: the sweep over 'seed' is empty or no list"),
    ("a sweep over a number", "runs: [{notebook: a, sweep: {seed: 3}}]",
     "g.yaml:1: a: the sweep over 'seed' is empty or no list"),
    ("a budget below 0", "runs: [{notebook: a, budget: -1}]", "g.yaml:1: budget is -1, not a number of seconds"),
    ("a circle", "runs:\n- {notebook: a, after: b}\n- {notebook: b, after: a}",
     "g.yaml:3: after goes round in a circle: …"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line"), [pytest.param(*row[1:], id=row[0]) for row in GRIDS])
def test_grids(desk, capsys, text, line):
    (desk / "g.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = everything(desk)
    code, said = called(["grid", "g.yaml"], capsys)
    assert code == 2
    assert is_line(said, f"saftnb: {line}"), said
    assert everything(desk) == before


TIES = "one.safetensors one.safetensors --method ties"
COMMANDS = [
    ("", "saftnb: error: the following arguments are required: COMMAND"),
    ("gird g.yaml", "saftnb: error: argument COMMAND: invalid choice: 'gird' (choose from …)"),
    ("grid", "saftnb grid: error: the following arguments are required: FILE"),
    ("grid none.yaml", "saftnb: none.yaml: no such grid file"),
    ("grid notebooks", "saftnb: notebooks: cannot be read: Is a directory"),
    ("grid g.yaml --jobs 0", "saftnb: --jobs is 0, not a whole number of at least 1"),
    ("grid g.yaml --jobs two", "saftnb grid: error: argument --jobs: invalid int value: 'two'"),
    ("grid g.yaml --engine dask", "saftnb grid: error: argument --engine: invalid choice: 'dask' (choose from …)"),
    ("grid g.yaml --address host:1", "saftnb: --address is for --engine ray"),
    ("grid g.yaml --set seed=1", "saftnb: error: unrecognized arguments: --set seed=1"),
    ("grid g.yaml --only z*", "saftnb: --only z* matches no run of grid g; its notebooks are: a"),
    ("grid g.yaml --runs g.yaml", "saftnb: …: Not a directory"),
    ("keep none.yaml", "saftnb: none.yaml: no such grid file"),
    ("keep g.yaml", "saftnb: grid g names no list of kept runs: add a line, kept: …"),
    ("report nowhere -o out", "saftnb: nowhere: no such folder of runs"),
    ("report g.yaml -o out", "saftnb: g.yaml: no such folder of runs"),
    ("report notebooks -o out", "saftnb: notebooks holds no runs (folders with a manifest.json)"),
    ("report notebooks", "saftnb report: error: the following arguments are required: -o/--out"),
    ("fetch pockets", "saftnb: nothing to fetch for suite 'pockets'; known are pocket, thimble, …"),
    ("fetch vision8 --backbone ViT", "saftnb: unknown backbone 'ViT'; those with OpenAI's weights: ViT-B-32, …"),
    ("fetch vision8 --models mine", "saftnb: no published models 'mine' for 'vision8'; there are: …"),
    ("doctor now", "saftnb: error: unrecognized arguments: now"),
    ("merge one.safetensors one.safetensors -o out", "saftnb: --method is missing: …"),
    (f"merge {TIES}", "saftnb: --out is missing: …"),
    ("merge one.safetensors --method ties -o out", "saftnb: a merge takes two models or more, got 1"),
    ("merge one.safetensors none --method ties -o out", "saftnb: none: no such file or folder"),
    ("merge one.safetensors cut.safetensors --method ties -o out",
     "saftnb: one.safetensors is of task vectors, cut.safetensors of models: merge one kind at a time"),
    ("merge cut.safetensors cut.safetensors --base cut.safetensors --method ties -o out",
     "saftnb: cut.safetensors is not a whole safetensors file: …"),
    ("merge one.safetensors wide.safetensors --method ties -o out",
     "saftnb: 'w' is (2, 2) in one.safetensors and (2, 3) in wide.safetensors"),
    ("merge one.safetensors other.safetensors --method ties -o out",
     "saftnb: one.safetensors has 'w', other.safetensors has not"),
    ("merge one.safetensors bad.safetensors --method ties -o out",
     "saftnb: bad.safetensors has NaN or infinite values in 'w'"),
    (f"merge {TIES} -o there", "saftnb: there is there already; --force replaces it"),
    (f"merge {TIES} -o there --force", "saftnb: there is no result of a merge (it has no README.md of one): …"),
    (f"merge {TIES} -o g.yaml/out", "saftnb: g.yaml/out: … is no folder"),
    (f"merge {TIES} -o /", "saftnb: -o /: the name of a new folder is wanted"),
    (f"merge {TIES} -o out --kep 0.2", "saftnb: ties has no hyperparameter 'kep'; allowed are keep: …"),
    (f"merge {TIES} -o out --keep 1.5",
     "saftnb: ties: keep = 1.5 is not allowed (keep: number in (0, 1], default 0.2)"),
    (f"merge {TIES} -o out --scale nan", "saftnb: ties: scale = nan is not allowed (scale: number, default 1.0)"),
    (f"merge {TIES} -o out --scale big", "saftnb: --scale big: not a number"),
    (f"merge {TIES} -o out --scale", "saftnb: --scale: not an option with a value, such as --keep 0.2"),
    (f"merge {TIES} -o out --rank two", "saftnb merge: error: argument --rank: invalid int value: 'two'"),
    ("merge one.safetensors wide.safetensors --method dare_ties --seed 1.5 -o out",
     "saftnb: --seed 1.5: not a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "line"), COMMANDS)
def test_command_lines(desk, capsys, words, line):
    before = everything(desk)
    code, said = called(words.split(), capsys)
    assert code == 2
    assert is_line(said, line), said
    assert everything(desk) == before


def test_a_result_that_overflows_leaves_no_folder(desk, capsys):
    code, said = called(["merge", *TIES.split(), "-o", "out", "--scale", "1e39"], capsys)
    assert code == 2
    assert said[-1] == "saftnb: ties: the merged 'w' overflows torch.float32; use a smaller scale"
    assert not (desk / "out").exists()
    assert not [path for path in desk.iterdir() if path.name.startswith(".")]


def test_the_home_of_nobody_is_no_store(desk, capsys, monkeypatch):
    monkeypatch.setenv("SAFTNB_STORE", "~nobody-of-that-name/store")
    line = "saftnb: ~nobody-of-that-name/store: SAFTNB_STORE names no user's home"
    assert called(["doctor"], capsys) == (2, [line])


@pytest.mark.parametrize("number", [11, 36])
def test_a_process_of_its_own_says_the_same(desk, number):
    words, line = COMMANDS[number]
    done = subprocess.run([sys.executable, "-m", "saftnb", *words.split()], capture_output=True, text=True)
    assert done.returncode == 2
    assert is_line(done.stderr.splitlines(), line), done.stderr
