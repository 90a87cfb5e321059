"""The notebooks as people run them: JupyterLab in a real Chromium, and papermill by hand."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import papermill
import pytest

from saftnb.batch.parameters import declared_parameters
from tests.tools.chromium import CHROMIUM, Browser
from tests.tools.thimble_notebooks import NOTEBOOKS, SIZES, notebooks
from tests.tools.waiting import until

ROOT = NOTEBOOKS.parent
FIRST = "01_sharpness_aware_finetuning"
BIN = Path(sys.executable).parent
SETTINGS = {  # all cells in the page, and no question about news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
CODE = "[...document.querySelectorAll('.jp-Notebook .jp-CodeCell')]"
PROMPTS = CODE + ".map(c => c.querySelector('.jp-InputPrompt').textContent.trim())"
MENU = "[...document.querySelectorAll('.lm-MenuBar-item')].find(e => e.textContent.trim() === 'Run')"
RUN_ALL = "[...document.querySelectorAll('.lm-Menu-item')].find(e => e.textContent.startsWith('Run All Cells'))"
ERRORS = "[...document.querySelectorAll('.jp-OutputArea [data-mime-type*=error]')].map(e => e.textContent)"
IDLE = "document.querySelector('#jp-main-statusbar')?.textContent.includes('(ipykernel) | Idle')"
LAST = "[...document.querySelectorAll('.jp-Notebook .jp-OutputArea img')].at(-1)"
IN_VIEW = f"(b => b.width > 100 && b.top < innerHeight && b.bottom > 0)({LAST}.getBoundingClientRect())"


def begun(browser: Browser) -> bool:
    """Choose Run All Cells; JupyterLab drops it while it connects to the kernel."""
    browser.click(MENU)
    until(lambda: browser.ask(f"!!{RUN_ALL}"), "the menu")
    browser.click(RUN_ALL)
    time.sleep(3)
    return set(browser.ask(PROMPTS)) != {"[ ]:"}


def run_through(browser: Browser) -> bool:
    """Whether every code cell has been run; an error in one is ours."""
    assert browser.ask(ERRORS) == []
    return all(prompt.strip("[]:").isdigit() for prompt in browser.ask(PROMPTS))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab that `make lab` started on a thimble-size copy of the first notebook.

    Its user has another kernel called python3, which must not be the one that is taken.
    """
    books, own = tmp_path / "books", tmp_path / "own"
    books.mkdir()
    path = NOTEBOOKS / f"{FIRST}.ipynb"
    small = SIZES[FIRST] | {"steps": 4, "more_seeds": []}
    copy = papermill.execute_notebook(path, books / path.name, small, prepare_only=True, progress_bar=False)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    nbformat.write(copy, books / path.name)
    for name, settings in SETTINGS.items():
        file = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    wrong = own / "data" / "kernels" / "python3" / "kernel.json"
    wrong.parent.mkdir(parents=True)
    wrong.write_text(json.dumps({"argv": ["false"], "display_name": "another", "language": "python"}))
    folders = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    environment = os.environ | {f"JUPYTER_{name}": str(own / folder) for name, folder in folders.items()}
    environment |= {
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        "JUPYTER_PATH": str(own / "data"), "SAFTNB_STORE": str(tmp_path / "store"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    options = f"--no-browser --ServerApp.ip=127.0.0.1 --ServerApp.port={port} --IdentityProvider.token={token}"
    ready = f"{sys.prefix}/.ready"  # is: this environment is not make's to set up
    command = ["make", "-o", ready, "lab", f"VENV={sys.prefix}", f"BOOKS={books}", f"LAB={options}"]
    with open(tmp_path / "server.txt", "w") as log:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until(lambda: list((own / "runtime").glob("jpserver-*.json")), "the server")
        yield f"http://127.0.0.1:{port}/lab/tree/{FIRST}.ipynb?token={token}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_first_notebook_runs_in_jupyterlab(lab: str, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "chromium", allowed="127.0.0.1")
    try:
        browser.open(lab, width=1400)
        until(lambda: browser.ask(IDLE), "an idle kernel")
        until(lambda: browser.ask(f"{CODE}.length") > 8, "the cells")
        until(lambda: begun(browser), "the first cell")
        until(lambda: run_through(browser), "the end of the last cell")
        assert browser.ask("document.querySelectorAll('.jp-OutputArea .widget-hprogress').length") >= 2, "two trainings"
        assert "Error displaying widget" not in browser.ask("document.body.textContent")
        browser.ask(f"{LAST}.scrollIntoView({{block: 'center'}})")
        until(lambda: browser.ask(IN_VIEW), "the last figure")
        assert browser.ask(f"{LAST}.naturalWidth") > 300
    finally:
        browser.picture(tmp_path / "lab.png")
        browser.close()


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_papermill_describes_every_parameter(path: Path) -> None:
    described = papermill.inspect_notebook(str(path))
    content = json.loads(path.read_text(encoding="utf-8"))
    declared = declared_parameters(content)
    assert list(described) == list(declared)
    for name, parameter in described.items():
        assert len(parameter["help"].split()) >= 2, name
        assert parameter["inferred_type_name"] == str(declared[name].kind), name
        assert parameter["default"], name
    assert content["metadata"]["kernelspec"]["name"] == "python3"


def test_papermill_by_hand_from_another_folder(tmp_path: Path) -> None:
    """Values given by -p and -y, a store of its own, and of the training's bar one line."""
    command = [str(BIN / "papermill"), str(NOTEBOOKS / "appendix" / "finetune_task.ipynb"), "out.ipynb"]
    values = {"suite": "thimble", "task": "patterns", "steps": "4"}
    for name, value in values.items():
        command += ["-p", name, value]
    command += ["-y", "{seed: 1, recipe: sgd}"]
    environment = os.environ | {"SAFTNB_STORE": str(tmp_path / "store"), "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [*command, "--log-output", "--no-progress-bar"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    done = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")
    streams = [out.text for cell in done.cells for out in cell.get("outputs", []) if out.get("name") == "stderr"]
    bars = [line for text in streams for line in text.splitlines() if "%|" in line]
    assert len([line for line in bars if "100%|" in line]) >= 1
    assert len(bars) == len({line.split(":")[0] for line in bars}), "one line for each bar"
    assert "\r" not in "".join(streams) + shown.stderr
    assert shown.stderr.count("%|") == len(bars)
    assert shutil.which("papermill", path=str(BIN))
