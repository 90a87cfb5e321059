"""Grid files: what they mean, and every way they can be wrong before anything starts."""

from pathlib import Path

import pytest

from saftnb.batch import load_grid
from saftnb.batch.grid import GridError, Resources

TRAIN = """
suite: str = 'pocket'
task: str = 'mnist'  # a = b
seed: int = 0
lr: float = 0.1
device: str = 'auto'
"""
MERGE = "suite: str = 'pocket'\nkeep: list[float] = [0.2]\nlimit: int | None = None\nquick = False\n"


@pytest.fixture
def load(desk: Path, write_notebook):
    write_notebook(desk / "notebooks" / "01_train.ipynb", "1", parameters=TRAIN)
    write_notebook(desk / "notebooks" / "02_merge.ipynb", "1", parameters=MERGE)
    write_notebook(desk / "notebooks" / "appendix" / "seeds.ipynb", "1", parameters="seed = 1")
    write_notebook(desk / "elsewhere" / "mine.ipynb", "1")

    def load(text: str, file: str = "notebooks/grids/demo.yaml"):
        path = desk / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return load_grid(path)

    return load


def test_defaults_parameters_sweep_zip_and_after(load, desk: Path) -> None:
    grid = load("""
defaults: {suite: thimble, seed: 7}
jobs: 2
runs:
  - notebook: 01_train
    parameters: {seed: 8}
    sweep: {task: [mnist, digits], lr: [1e-3, 1]}
  - notebook: 02_merge
    after: [01_train]
    budget: 120
    zip: {limit: [1, ~], quick: [true, false]}
""")
    assert (grid.name, grid.jobs, grid.engine, len(grid.runs)) == ("demo", 2, "local", 6)
    train, merge = grid.runs[:4], grid.runs[4:]
    assert [(run.parameters["task"], run.parameters["lr"]) for run in train] == [
        ("mnist", 0.001),
        ("mnist", 1.0),
        ("digits", 0.001),
        ("digits", 1.0),
    ]
    assert all(type(run.parameters["lr"]) is float for run in train)
    assert train[0].parameters == {
        "suite": "thimble",
        "task": "mnist",
        "seed": 8,
        "lr": 0.001,
        "device": "auto",
    }
    assert train[0].overrides == {"suite": "thimble", "seed": 8, "task": "mnist", "lr": 0.001}
    assert [(run.parameters["limit"], run.parameters["quick"]) for run in merge] == [(1, True), (None, False)]
    assert "seed" not in merge[0].parameters
    assert merge[0].after == tuple(run.id for run in train)
    assert (merge[0].budget, train[0].budget, train[0].after) == (120.0, None, ())
    assert train[0].folder.path == desk / "runs" / "demo" / train[0].id
    assert len({run.id for run in grid.runs}) == 6


def test_a_run_is_named_by_its_notebook_and_effective_parameters(load, desk: Path, write_notebook) -> None:
    one = load("runs: [{notebook: 01_train}]").runs[0]
    same = load("runs: [{notebook: 01_train, parameters: {lr: '1e-1', seed: 0}}]", "other/g.yaml").runs[0]
    assert one.id == same.id
    assert one.id != load("runs: [{notebook: 01_train, parameters: {seed: 1}}]").runs[0].id
    write_notebook(desk / "notebooks" / "01_train.ipynb", "2", parameters=TRAIN)
    changed = load("runs: [{notebook: 01_train}]").runs[0]
    assert changed.id == one.id
    assert changed.notebook.sha256 != one.notebook.sha256


@pytest.mark.parametrize(
    ("wanted", "file", "found"),
    [
        ("01_train", "notebooks/grids/g.yaml", "notebooks/01_train.ipynb"),
        ("01_train", "g.yaml", "notebooks/01_train.ipynb"),
        ("01_train.ipynb", "g.yaml", "notebooks/01_train.ipynb"),
        ("seeds", "notebooks/grids/g.yaml", "notebooks/appendix/seeds.ipynb"),
        ("appendix/seeds", "notebooks/grids/g.yaml", "notebooks/appendix/seeds.ipynb"),
        ("mine.ipynb", "elsewhere/g.yaml", "elsewhere/mine.ipynb"),
        ("elsewhere/mine", "g.yaml", "elsewhere/mine.ipynb"),
        ("../../elsewhere/mine.ipynb", "notebooks/grids/g.yaml", "elsewhere/mine.ipynb"),
    ],
)
def test_where_a_notebook_is_found(load, desk: Path, wanted: str, file: str, found: str) -> None:
    run = load(f"runs: [{{notebook: {wanted}}}]", file).runs[0]
    assert run.notebook.path == (desk / found).resolve()
    assert run.notebook.name == Path(found).stem


def test_scalars_mean_what_they_look_like(load) -> None:
    def task(text: str) -> object:
        grid = load(f"runs: [{{notebook: 01_train, parameters: {{task: {text}}}}}]")
        return grid.runs[0].parameters["task"]

    assert [task(text) for text in ("on", "012", "2024-01-01", "1:30", "'5'", "!!str 5")] == [
        "on",
        "012",
        "2024-01-01",
        "1:30",
        "5",
        "5",
    ]


def test_anchors_and_merge_keys(load) -> None:
    grid = load("""
runs:
  - notebook: 01_train
    parameters: &common {lr: 0.5, seed: 1}
  - notebook: 01_train
    parameters: {<<: *common, seed: 2}
""")
    assert [(run.parameters["lr"], run.parameters["seed"]) for run in grid.runs] == [(0.5, 1), (0.5, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"demo.yaml:1: the grid has no list of runs|demo.yaml: the grid has no list of runs"),
        ("runs: []", r"demo.yaml:1: the grid has no list of runs"),
        ("[]", r"demo.yaml:1: the grid is not a mapping"),
        ("runs: [01_train]", r"demo.yaml:1: a run is not a mapping"),
        ("runs:\n- {notebok: a}", r"demo.yaml:2: unknown key 'notebok' in a run; it may have notebook,"),
        ("rums: []\nruns: [{notebook: 01_train}]", r"demo.yaml:1: unknown key 'rums' in the grid"),
        ("runs:\n- {notebook: nope}", r":2: there is no notebook 'nope'; there are: 01_train, 02_m"),
        ("runs:\n- {}", r":2: the run names no notebook"),
        (
            "runs:\n- notebook: 01_train\n  parameters:\n    sede: 1",
            r"demo.yaml:4: 01_train: unknown parameter 'sede'; it declares: suite, task, seed, lr, device",
        ),
        ("runs:\n- notebook: 01_train\n  sweep: {sede: [1]}", r":3: 01_train: unknown parameter 'sede'"),
        ("defaults:\n  sede: 1\nruns:\n- notebook: 01_train", r":2: no notebook .* declares .*'sede'"),
        ("runs:\n- notebook: 01_train\n  parameters:\n    seed: 1.5", r":4: .*'seed': 1.5 is not .* int"),
        ("runs:\n- notebook: 01_train\n  parameters: {task: 5}", r":3: .*5 is not .* str; put it in quotes"),
        ("runs:\n- notebook: 01_train\n  sweep:\n    lr: [0.1,\n      fast]", r":5: .*'fast' is not .*float"),
        ("runs:\n- notebook: 02_merge\n  parameters: {quick: yes}", r":3: .*'yes' is not of type bool"),
        ("runs:\n- notebook: 02_merge\n  parameters: {keep: 0.1}", r":3: .*0.1 is not of type list\[float\]"),
        ("defaults: {seed: a}\nruns:\n- notebook: 01_train", r":1: 01_train: parameter 'seed': 'a' is not"),
        ("runs:\n- notebook: 01_train\n  sweep: {lr: []}", r":3: 01_train: the sweep over 'lr' is empty"),
        ("runs:\n- notebook: 01_train\n  zip: {lr: [1], seed: [1, 2]}", r":3: .*zip differ in length"),
        (
            "runs:\n- notebook: 01_train\n  parameters: {lr: 1}\n  sweep: {lr: [1]}",
            r":4: .*'lr' is given twice",
        ),
        ("runs:\n- notebook: 01_train\n- notebook: 01_train\n  parameters: {seed: 0}", r":3: duplicate"),
        ("runs:\n- notebook: 01_train\n  sweep: {seed: [1, 1]}", r":2: duplicate run"),
        ("runs:\n- notebook: 01_train\n  after: [02_merge]", r":3: after names '02_merge', not in this grid"),
        (
            "runs:\n- {notebook: 01_train, after: 02_merge}\n- notebook: 02_merge\n  after: [01_train]",
            r":4: after goes round in a circle: .*01_train",
        ),
        ("runs:\n- notebook: 01_train\n  after: 01_train", r":3: after goes round in a circle"),
        ("runs:\n- notebook: 01_train\n  after: {a: 1}", r":3: after is not a list"),
        ("runs:\n- notebook: 01_train\n  budget: -1", r":3: budget is -1"),
        ("runs:\n- notebook: 01_train\n  gradients: 9", r":3: 01_train: gradients are of a notebook with a suite"),
        ("jobs: 0\nruns: [{notebook: 01_train}]", r":1: jobs is 0"),
        ("jobs: true\nruns: [{notebook: 01_train}]", r":1: jobs is True"),
        ("name: ../x\nruns: [{notebook: 01_train}]", r":1: the name '../x'"),
        ("name: store\nruns: [{notebook: 01_train}]", r":1: the name 'store'"),
        ("engine: dask\nruns: [{notebook: 01_train}]", r":1: unknown engine 'dask'; there are: local, ray"),
        ("threads: 1\nruns: [{notebook: 01_train}]", r":1: unknown key 'threads' in the grid; it may have .*resources"),
        ("resources: {cpu: 1}\nruns: [{notebook: 01_train}]", r":1: unknown key 'cpu' in resources; it may have cpus"),
        ("resources: 3\nruns: [{notebook: 01_train}]", r":1: resources is not a mapping"),
        ("runs:\n- notebook: 01_train\n  resources: {cpus: 0}", r":3: cpus is 0, not a whole number"),
        ("runs:\n- notebook: 01_train\n  resources: {gpus: 1.5}", r":3: gpus is 1.5, not a whole number or a share"),
        ("runs:\n- notebook: 01_train\n  resources: {gpus: -1}", r":3: gpus is -1"),
        ("runs:\n- notebook: 01_train\n  resources: {memory: 8GB}", r":3: memory is '8GB', not a number of GiB"),
        ("runs:\n- notebook: 01_train\n  resources: {time_limit: 0}", r":3: time_limit is 0, not a number of seconds"),
        ("jobs: 1\njobs: 2\nruns: [{notebook: 01_train}]", r":\d: the key 'jobs' is given twice"),
        ("runs: [", r"demo.yaml:\d: not valid YAML"),
        ("runs: \x07", r"demo.yaml: not valid YAML"),
        ("runs: &a [*a]", r"demo.yaml: something in it contains itself"),
        ("runs: [{notebook: !!python/name:os.system x}]", r":1: .*not supported"),
        (
            "runs:\n- notebook: 01_train\n- notebook: ../../elsewhere/01_train.ipynb",
            r":3: two different notebooks are called 01_train",
        ),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_line(load, desk, write_notebook, text, message) -> None:
    write_notebook(desk / "elsewhere" / "01_train.ipynb", "1")
    with pytest.raises(GridError, match=message) as caught:
        load(text)
    assert "\n" not in str(caught.value)
    assert not (desk / "runs").exists()


def test_files_that_are_no_grid_or_no_notebook(load, desk: Path, write_notebook) -> None:
    with pytest.raises(GridError, match=r"none.yaml: no such grid file"):
        load_grid("none.yaml")
    with pytest.raises(GridError, match="cannot be read"):
        load_grid(desk)
    (desk / "notebooks" / "broken.ipynb").write_text("{")
    with pytest.raises(GridError, match=r"demo.yaml:1: broken.ipynb is not a notebook"):
        load("runs: [{notebook: broken}]")
    write_notebook(desk / "notebooks" / "odd.ipynb", parameters="a = 1\nx = f()")
    with pytest.raises(GridError, match=r"odd.ipynb: line 2 of the parameters cell"):
        load("runs: [{notebook: odd}]")


def test_a_run_asks_for_its_own_resources_over_the_grids(load) -> None:
    grid = load("""
engine: ray
resources: {cpus: 4, gpus: 1, time_limit: 60}
runs:
  - notebook: 01_train
  - notebook: 02_merge
    resources: {gpus: 0.5, memory: 2, time_limit: 5.5}
""")
    assert grid.engine == "ray"
    assert [run.resources for run in grid.runs] == [Resources(4, 1, None, 60), Resources(4, 0.5, 2, 5.5)]
    assert [run.place for run in grid.runs] == ["demo.yaml:5", "demo.yaml:6"]
    assert load("runs: [{notebook: 01_train}]").runs[0].resources == Resources()
    assert load("runs: [{notebook: 01_train}]").runs[0].id == grid.runs[0].id, "another machine, the same run"
