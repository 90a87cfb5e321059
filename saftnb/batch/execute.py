"""The process in which one notebook runs: ``python -m saftnb.batch.execute SOCKETS``, started only by `run_one`.

It works in its current folder: ``run.ipynb`` is executed in place, and the outcome goes to
``.outcome.json``. SOCKETS is a folder for the kernel's sockets, which goes in the end. The first line of standard input
is the job. The pipe then stays open, and its end means that the launcher is gone, however it died: the kernel is killed
and this process leaves.
"""

import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import zmq
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from traitlets import default

from saftnb.run_folder import RunFolder, write_json

if TYPE_CHECKING:
    from nbformat import NotebookNode

# ipykernel's own launcher, but for a queue that loses nothing: by default ZeroMQ drops what a cell prints faster than
# it is read, 1,000 pieces on, and with it the word that the cell has ended.
LAUNCHER = """
import sys
if not sys.path[0]:
    del sys.path[0]
import zmq
from ipykernel.kernelapp import IPKernelApp
class App(IPKernelApp):
    def init_iopub(self, context):
        context.setsockopt(zmq.SNDHWM, 0)
        super().init_iopub(context)
App.launch_instance()
"""

HERE = RunFolder(Path())


class _ThisPython(KernelSpecManager):
    """Whatever kernels are installed, 'python3' is the interpreter that runs this."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        command = [sys.executable, "-c", LAUNCHER, "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python", name=kernel_name)


class _Kernel(AsyncKernelManager):
    """A kernel reached through sockets in a private folder: TCP ports are taken by whoever is faster."""

    sockets: ClassVar[str]
    started: ClassVar[list["_Kernel"]] = []
    exit_code: ClassVar[int | None] = None  # of a kernel that died

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(kernel_spec_manager=_ThisPython(), **kwargs)
        if os.name == "posix" and len(self.sockets) < 80:  # a socket's path is limited to about 100 bytes
            self.transport = "ipc"
        self.connection_file = os.path.join(self.sockets, "kernel.json")
        _Kernel.started.append(self)

    @default("shutdown_wait_time")
    def _patience(self) -> float:
        return 10.0

    def client(self, **options: Any) -> Any:
        """With a queue that loses nothing, too."""
        made = super().client(**options)
        made.context.setsockopt(zmq.RCVHWM, 0)
        return made

    async def is_alive(self) -> bool:
        alive = await super().is_alive()
        if not alive and self.provisioner is not None:
            _Kernel.exit_code = await self.provisioner.poll()
        return alive

    def kill_group(self) -> None:
        """Kill the kernel, and what it started and left behind."""
        pid = getattr(self.provisioner, "pid", None)
        try:
            if pid:
                os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def execute(parameters: dict[str, Any], cwd: str) -> dict[str, str]:
    """Run the notebook with these parameters; returns its ``status`` and, unless done, the ``reason``."""
    # jsonschema would compile a grammar of IRIs, which no notebook has, for half of the time that a short run takes
    sys.modules["rfc3987_syntax"] = None  # pyright: ignore[reportArgumentType]
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        notebook = papermill.execute_notebook(
            HERE.notebook_file,
            HERE.notebook_file,
            parameters=parameters,
            cwd=cwd,
            kernel_name="python3",
            language="python",
            kernel_manager_class=_Kernel,
            progress_bar=False,
            log_output=True,
            start_timeout=180,
            iopub_timeout=180,
            on_cell_start=_Follower(injected=bool(parameters)),
            on_cell_executed=_settle,
        )
    except papermill.PapermillExecutionError as error:
        return {"status": "failed", "reason": f"{error.ename}: {error.evalue} (cell {error.exec_count})"}
    except DeadKernelError:
        how = "got SIGKILL, as when memory runs out" if _Kernel.exit_code == -signal.SIGKILL else "died"
        return {"status": "killed", "reason": f"the kernel {how} (cell {_last_started()})"}
    except Exception as error:
        logging.getLogger("saftnb").exception("the notebook could not be run")
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    skipped = [cell for cell in notebook.cells if cell.cell_type == "code" and _was_skipped(cell)]
    if skipped:  # papermill takes sys.exit(0) for a success
        return {"status": "failed", "reason": f"stopped early: {len(skipped)} cells were not run"}
    for cell in notebook.cells:  # and so in the last cell
        left = [out for out in cell.get("outputs", ()) if out.get("ename") == "SystemExit"]
        if left and "raises-exception" not in cell.metadata.get("tags", []):
            return {"status": "failed", "reason": f"stopped early: SystemExit (cell {cell.execution_count})"}
    return {"status": "done"}


def _settle(cell: Any, cell_index: int, execute_reply: Any) -> None:
    cell.outputs = coalesced(cell.outputs)


def coalesced(outputs: Sequence["NotebookNode"]) -> list["NotebookNode"]:
    """A cell's outputs with all text of a stream in the place of its first piece, stdout before stderr where they meet,
    and progress bars as their last state. nbclient's `coalesce_streams` takes time quadratic in a line's length."""
    pieces: dict[str, list[str]] = {}
    kept: list[NotebookNode] = []
    for output in outputs:
        if output["output_type"] != "stream":
            kept.append(output)
            continue
        if output["name"] not in pieces:
            kept.append(output)
        pieces.setdefault(output["name"], []).append(output["text"])
    for output in kept:
        if output["output_type"] == "stream":
            output["text"] = settled("".join(pieces[output["name"]]))
    for i in range(len(kept) - 1):
        if [one.get("name") for one in kept[i : i + 2]] == ["stderr", "stdout"]:
            kept[i : i + 2] = kept[i + 1], kept[i]
    return kept


def settled(text: str) -> str:
    """What a terminal shows in the end: of each line what follows its last carriage return."""
    return "\n".join(line[line.rfind("\r", 0, max(0, len(line) - 1)) + 1 :] for line in text.split("\n"))


class _Follower:
    """Writes which code cell has begun, for those who watch the run."""

    def __init__(self, injected: bool) -> None:
        self.of, self.heading, self.cell = len(_code_cells()) + injected, "", 0
        self.file = HERE.progress_file.absolute()  # papermill works in the notebook's folder

    def __call__(self, cell: Any, cell_index: int) -> None:
        if cell["cell_type"] == "markdown":
            heading = re.match(r"\s*#+ +(.+)", cell["source"])
            self.heading = heading[1].strip() if heading else self.heading
        elif _is_code(cell):
            self.cell += 1
            progress = {"cell": self.cell, "of": self.of, "heading": self.heading}
            write_json(self.file, progress, durable=False)


def _is_code(cell: Any) -> bool:
    return cell["cell_type"] == "code" and bool("".join(cell["source"]).strip())


def _was_skipped(cell: Any) -> bool:
    meant = "skip-execution" in cell.metadata.get("tags", []) or not cell.source.strip()
    return cell.execution_count is None and not meant


def _last_started() -> int:
    """The number of the last code cell that papermill began: its own record calls all cells completed."""
    return sum(cell["metadata"].get("papermill", {}).get("start_time") is not None for cell in _code_cells())


def _code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(HERE.notebook_file.read_text(encoding="utf-8"))["cells"] if _is_code(cell)]


def _kill_kernels() -> None:
    for kernel in _Kernel.started:
        kernel.kill_group()
    shutil.rmtree(_Kernel.sockets, ignore_errors=True)  # a launcher that was killed cannot


def _is_true(line: logging.LogRecord) -> bool:
    """Not papermill's complaints about parameters cells: it reads fewer forms of them than we do."""
    return not line.getMessage().startswith(("Passed unknown parameter", "Unable to parse line"))


def _follow_launcher(stdin: int) -> None:
    while os.read(stdin, 1024):
        pass
    _kill_kernels()
    os._exit(1)


def main() -> None:
    """Read the job, run it, write the outcome."""
    _Kernel.sockets = sys.argv[1]
    line = sys.stdin.readline()
    if not line:  # the launcher was killed before it could send the job
        return _kill_kernels()
    job = json.loads(line)
    threading.Thread(target=_follow_launcher, args=(sys.stdin.fileno(),), daemon=True).start()
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_is_true)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=[handler])
    try:
        outcome = execute(**job)
    finally:
        _kill_kernels()
    write_json(HERE.outcome_file, outcome)


if __name__ == "__main__":
    main()
