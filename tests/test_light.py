"""`pip install saftnb` without extras: it merges, and names the extra that something else would need."""

import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

from saftnb.merging import LowRank, TaskVector

ROOT = Path(__file__).parent.parent


def closure(names: list[str]) -> set[str]:
    """Distributions and everything that they require without extras, of what is installed here."""
    found, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:  # for another platform or Python
            continue
        found.add(name)
        plain = [line for line in lines if "extra ==" not in line]
        for line in plain:
            stem = line.partition(";")[0]
            for mark in "[<>=!~ (":
                stem = stem.split(mark)[0]
            todo.append(stem.strip())
    return found


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """A new venv with the wheel, and beside it no packages but those that the wheel itself requires."""
    folder = tmp_path_factory.mktemp("light")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = folder / "source"  # a build leaves files behind
    shutil.copytree(ROOT / "saftnb", source / "saftnb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("saftnb-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    install = [*pip, "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    (meta,) = site.glob("saftnb-*.dist-info")
    lines = [line.removeprefix("Requires-Dist: ") for line in (meta / "METADATA").read_text().splitlines()
             if line.startswith("Requires-Dist: ") and "extra ==" not in line]  # fmt: skip
    for name in closure([line.split(">")[0].split(";")[0].strip() for line in lines]):
        for file in distribution(name).files or ():
            top = file.parts[0]
            place = Path(distribution(name).locate_file(top))
            if top not in ("..", "bin") and place.exists() and not (site / top).exists():
                (site / top).symlink_to(place)
    return folder / "venv" / "bin"


def run(light, *words, code=""):
    command = [str(light / "python"), "-c", code] if code else [str(light / "saftnb"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=light)


def test_it_merges_adapters_and_models_from_the_command_line(light, tmp_path):
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        factors = LowRank(torch.randn(4, 2, generator=generator), torch.randn(2, 3, generator=generator))
        TaskVector({"layer.weight": factors}).to_adapter(tmp_path / f"a{number}")
    adapters = [str(tmp_path / f"a{number}") for number in range(2)]
    done = run(light, "merge", *adapters, "--method", "ties", "--space", "knots", "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert run(light, "merge", "--list").returncode == 0


def test_sharpness_aware_steps_need_torch_alone(light):
    code = """
import sys, torch
from saftnb.finetune import SharpnessAware
from saftnb.merging import merge
import saftnb as sn
net = torch.nn.Linear(2, 1)
optimizer = SharpnessAware(torch.optim.AdamW(net.named_parameters()), rho=0.05)
def closure():
    optimizer.zero_grad(); loss = net(torch.ones(3, 2)).square().mean(); loss.backward(); return loss
optimizer.step(closure)
sn.task_vector, sn.merge
sys.exit(any(m in sys.modules for m in ("pandas", "open_clip", "peft", "matplotlib")))
"""
    done = run(light, code=code)
    assert done.returncode == 0, done.stderr


def test_what_is_missing_is_named_with_its_extra(light, tmp_path):
    done = run(light, code="import saftnb as sn; sn.load_suite")
    assert "sn.load_suite: this needs" in done.stderr
    assert "pip install 'saftnb[full]'" in done.stderr
    done = run(light, code="import saftnb as sn; sn.plots")
    assert "pip install 'saftnb[" in done.stderr
    (tmp_path / "grid.yaml").write_text("name: x\nruns: []\n")
    done = run(light, "grid", str(tmp_path / "grid.yaml"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'saftnb[notebooks]'" in done.stderr


def test_the_guides_example_in_python(light, tmp_path):
    """The block that merges, as it stands there, on adapters of these names."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "notebooks" / "guide" / "methods.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if block.startswith("import saftnb as sn")]
    for number, name in enumerate(("rte", "snli")):
        draw = torch.Generator().manual_seed(number)
        factors = LowRank(torch.randn(4, 2, generator=draw), torch.randn(2, 3, generator=draw))
        TaskVector({"layer.weight": factors}).to_adapter(tmp_path / name)
    done = run(light, code=f"import os; os.chdir({str(tmp_path)!r})\n{code}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()


def test_the_wheel_tells_type_checkers_that_it_has_types(light):
    assert list((light.parent / "lib").glob("python3*/site-packages/saftnb/py.typed"))
