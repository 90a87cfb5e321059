"""pytest -p tests.tools.private_kernels: how nbval reaches its kernels here.

- Through sockets in a private folder. By default a kernel is given TCP ports that were free a moment before; with two
  workers another kernel takes one of them now and then, and then "Kernel died before replying to kernel_info".
- One kernel for all notebooks of a worker, emptied between two of them: much of a small notebook's time goes by while a
  new kernel imports torch. A name that a notebook takes without its import is found by ruff (F821).
- What a progress bar draws is compared with nothing: whether a cell trains depends on what the others have trained.
"""

import os
from tempfile import TemporaryDirectory
from typing import Any

import nbval.kernel
import nbval.plugin
import pytest
from jupyter_client.manager import KernelManager

EMPTY = """
import os
import matplotlib.pyplot as plt
plt.close("all")
os.chdir({cwd!r})
%reset -f
"""


class PrivateKernel(KernelManager):
    def __init__(self, **kwargs: Any) -> None:
        self.sockets = TemporaryDirectory(prefix="nbval-")  # goes with this object
        super().__init__(transport="ipc", connection_file=os.path.join(self.sockets.name, "kernel.json"), **kwargs)


class KeptKernel(nbval.kernel.RunningKernel):
    kept: "KeptKernel | None" = None

    def __init__(self, kernel_name: str, cwd: str | None = None, startup_timeout: int = 60) -> None:
        before = KeptKernel.kept
        if before is None or not before.is_alive():
            super().__init__(kernel_name, cwd, startup_timeout)
            KeptKernel.kept = self
            return
        self.km, self.kc = before.km, before.kc
        emptied = self.execute_cell_input(EMPTY.format(cwd=cwd or os.getcwd()))
        self.await_reply(emptied, timeout=startup_timeout)
        self.await_idle(emptied, timeout=startup_timeout)

    def stop(self) -> None:
        """Nothing yet: the next notebook may want it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for notebook in {item.parent for item in items}:
        if isinstance(notebook, nbval.plugin.IPyNbFile):
            notebook.skip_compare += ("stderr",)


def pytest_sessionfinish() -> None:
    if KeptKernel.kept is not None and KeptKernel.kept.is_alive():
        nbval.kernel.RunningKernel.stop(KeptKernel.kept)


nbval.kernel.KernelManager = PrivateKernel
nbval.plugin.RunningKernel = KeptKernel
