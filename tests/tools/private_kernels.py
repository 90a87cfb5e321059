"""pytest -p tests.tools.private_kernels: nbval reaches its kernels through sockets in a private folder.

By default a kernel is given TCP ports that were free a moment before; with two workers another kernel takes one of them
now and then, and then "Kernel died before replying to kernel_info".
"""

import os
from tempfile import TemporaryDirectory
from typing import Any

import nbval.kernel
from jupyter_client.manager import KernelManager


class PrivateKernel(KernelManager):
    def __init__(self, **kwargs: Any) -> None:
        self.sockets = TemporaryDirectory(prefix="nbval-")  # goes with this object
        super().__init__(transport="ipc", connection_file=os.path.join(self.sockets.name, "kernel.json"), **kwargs)


nbval.kernel.KernelManager = PrivateKernel
