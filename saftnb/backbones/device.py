"""Which device to use, and how many threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def resolve_device(device: str = "auto") -> torch.device:
    """ "auto" is the first CUDA device where there is one, else the CPU; any other name is torch's own.

    Raises:
        ValueError: the device does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not present: {torch.cuda.device_count()} CUDA devices here")
    return resolved


def require_bf16(device: torch.device) -> None:
    """Raises ValueError unless the device computes in bfloat16 itself (a CPU without it is slower than in float32)."""
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    if not has:
        raise ValueError(f"this {device.type} device has no bfloat16 instructions; use precision 'float32'")


@contextmanager
def tensor_cores(device: torch.device, wanted: bool) -> Iterator[None]:
    """Run a block in which float32 products on a GPU go through TF32, where `wanted`; it takes bfloat16, too.

    Raises:
        ValueError: as `require_bf16`, where wanted.
    """
    if not wanted:
        yield
        return
    require_bf16(device)
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with a fixed number of CPU threads: sums differ in their last bits between thread counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
