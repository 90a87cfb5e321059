"""TIES against stack-and-sort, in time and memory: python tests/tools/bench/ties.py [--vectors 8] [--size 88e6]

Each runs once, in a process of its own, on the same task vectors, shaped like CLIP ViT-B/32's vision tower.
The inputs are multiples of 2⁻³⁰ small enough for float32 to add without rounding: results must be equal.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from saftnb.merging import TaskVector, merge

KEEP = 0.2
GOAL_RATIO, GOAL_GIB = 10, 1.0


def shapes(size: float) -> dict[str, tuple[int, ...]]:
    """The vision tower's parameters, its width (768) scaled until they have about `size` entries."""
    width = max(8, 8 * round(96 * math.sqrt(size / 88e6)))
    tower = {
        "conv1.weight": (width, 3, 32, 32),
        "class_embedding": (width,),
        "positional_embedding": (50, width),
        "proj": (width, 512),
    }
    for norm in ("ln_pre", "ln_post"):
        tower |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for i in range(12):
        layers = {"attn.in_proj": (3, 1), "attn.out_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
        for name, (rows, columns) in layers.items():
            tower[f"blocks.{i}.{name}.weight"] = (rows * width, columns * width)
            tower[f"blocks.{i}.{name}.bias"] = (rows * width,)
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            tower[f"blocks.{i}.{name}"] = (width,)
    return tower


def inputs(count: int, size: float) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def delta(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(2**19).round_().mul_(2.0**-30)

    return [{name: delta(shape) for name, shape in shapes(size).items()} for _ in range(count)]


def stack_and_sort(vectors: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """TIES as it is usually written. kthvalue, since `torch.sort` takes some six times as long."""
    stacked = torch.stack([torch.cat([delta.flatten() for delta in vector.values()]) for vector in vectors])
    entries = stacked.shape[1]
    k = entries - int(entries * KEEP)
    thresholds = torch.stack([row.abs().kthvalue(k).values for row in stacked])
    trimmed = stacked * (stacked.abs() >= thresholds[:, None])
    elected = trimmed.sum(0).sign()
    elected[elected == 0] = elected.sum().sign()
    agreeing = trimmed * torch.where(elected > 0, trimmed > 0, trimmed < 0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


def ours(vectors: list[dict[str, torch.Tensor]]) -> TaskVector:
    return merge([TaskVector(vector) for vector in vectors], "ties", keep=KEEP)


IMPLEMENTATIONS = {"stack-and-sort": stack_and_sort, "saftnb": ours}


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def child(name: str, count: int, size: float, result: Path) -> None:
    IMPLEMENTATIONS[name](inputs(2, 1e5))  # loads what is loaded on first use
    vectors = inputs(count, size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    merged = IMPLEMENTATIONS[name](vectors)
    figures = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    print(json.dumps(figures | {"gib": resident("VmHWM") - before}))
    if isinstance(merged, TaskVector):
        merged = torch.cat([delta.flatten() for delta in merged.values()])
    torch.save(merged, result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=8)
    parser.add_argument("--size", type=float, default=88e6, help="entries per vector, about")
    parser.add_argument("--child", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.vectors, arguments.size, arguments.result)
        return 0
    entries = sum(math.prod(shape) for shape in shapes(arguments.size).values())
    of = f"{arguments.vectors} vectors of {entries / 1e6:.1f} M"
    print(f"TIES, keep {KEEP}: {of}, {torch.get_num_threads()} threads", flush=True)
    found, results = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in IMPLEMENTATIONS:
            result = Path(folder, "merged.pt")
            command = [sys.executable, __file__, "--child", name, "--result", str(result)]
            command += ["--vectors", str(arguments.vectors), "--size", str(arguments.size)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{name} ended with status {done.returncode} (−9: out of memory; try a smaller --size)")
                return 1
            found[name], results[name] = json.loads(done.stdout), torch.load(result)
            line = "{seconds:7.2f} s ({cpu:6.2f} s of CPU), {gib:6.2f} GiB beyond the inputs"
            print(f"{name:>15}: {line.format(**found[name])}", flush=True)
    slow, fast = found["stack-and-sort"], found["saftnb"]
    ratio, cpu_ratio = slow["seconds"] / fast["seconds"], slow["cpu"] / fast["cpu"]
    print(f"time ratio {ratio:.1f} (goal {GOAL_RATIO}); in CPU time, steadier under load: {cpu_ratio:.1f}")
    print(f"memory {fast['gib']:.2f} GiB beyond the inputs (goal under {GOAL_GIB})")
    equal = torch.equal(*results.values())
    print("results are equal" if equal else "RESULTS DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
