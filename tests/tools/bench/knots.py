"""KnOTS from LoRA factors, against the dense SVD: time, split into decomposition and merge, peak memory, scaling.

python tests/tools/bench/knots.py             ViT-B/32, scaling, Llama-3-8B's shapes
python tests/tools/bench/knots.py llama       the last alone, in a process of its own for its peak
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from saftnb.merging import LowRank, TaskVector, represent
from saftnb.merging.bases import joint_svd

VIT = {f"{block}.{part}.weight": (768, 768) for block in range(12) for part in "qkvo"}
LLAMA = {
    f"{block}.{part}.weight": (1024 if part in "kv" else 4096, 4096) for block in range(32) for part in "qkvo"
}  # fmt: skip


def adapters(shapes: dict[str, tuple[int, int]], tasks: int, rank: int) -> list[TaskVector]:
    generator = torch.Generator().manual_seed(0)
    return [
        TaskVector(
            {
                name: LowRank(
                    torch.randn(o, rank, generator=generator) / o**0.5,
                    torch.randn(rank, i, generator=generator) / i**0.5,
                )
                for name, (o, i) in shapes.items()
            }
        )
        for _ in range(tasks)
    ]


def peak_memory() -> float:
    """The largest resident memory so far of this program alone, GiB; `ru_maxrss` begins at that of the caller."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def timed(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def best(work, times=3):
    return min((timed(work) for _ in range(times)), key=lambda pair: pair[0])


def dense(deltas: list[LowRank]) -> torch.Tensor:
    """U [R_1 … R_n] by the definition: the SVD of the dense matrix in float64."""
    wide = torch.cat([delta.dense().double() for delta in deltas], dim=1)
    u, values, vt = torch.linalg.svd(wide, full_matrices=False)
    kept = values > 1e-5
    return u[:, kept], values[kept, None] * vt[kept]


def vit() -> None:
    vectors = adapters(VIT, 8, 16)
    decompose, there = best(lambda: represent(vectors, "knots"))
    whole, _ = best(lambda: represent(vectors, "knots").merge("ties", keep=0.2))
    layers = list(VIT)[:3]
    slow, found = timed(lambda: [dense([v[name] for v in vectors]) for name in layers])
    slow *= len(VIT) / len(layers)
    gaps = []
    for name, (u, r) in zip(layers, found, strict=True):
        ours, parts = joint_svd([v[name] for v in vectors])
        gaps.append(float((ours.double() @ torch.cat(parts, dim=1).double() - u @ r).norm() / (u @ r).norm()))
    rest, _ = timed(lambda: there.merge("ties", keep=0.2))
    print("KnOTS-TIES, 8 adapters of rank 16, ViT-B/32's 48 matrices")
    print(
        f"  decomposition   {decompose:7.2f} s    dense float64 {slow:6.1f} s (3 matrices, times 16): "
        f"{slow / decompose:.0f} times"
    )
    print(
        f"  whole merge     {whole:7.2f} s    dense and our merge {slow + rest:6.1f} s: "
        f"{(slow + rest) / whole:.0f} times"
    )
    print(f"  of that trim, elect and back {rest:.2f} s; largest relative difference of U R: {max(gaps):.1e}")


def scaling() -> None:
    print("seconds for the whole merge, ViT-B/32's 48 matrices")
    for label, cases in (
        ("tasks of rank 16", [(tasks, 16) for tasks in (2, 4, 8, 16, 32)]),
        ("ranks of 8 tasks", [(8, rank) for rank in (4, 16, 64, 256)]),
    ):
        cells = []
        for tasks, rank in cases:
            vectors = adapters(VIT, tasks, rank)
            seconds, _ = timed(lambda given=vectors: represent(given, "knots").merge("ties", keep=0.2))
            cells.append(f"{tasks if 'tasks of' in label else rank}: {seconds:.2f}")
        print(f"  {label:18} " + "   ".join(cells))


def llama() -> None:
    vectors = adapters(LLAMA, 6, 16)
    held = peak_memory()
    decompose, there = timed(lambda: represent(vectors, "knots"))
    rest, merged = timed(lambda: there.merge("ties", keep=0.2))
    peak = peak_memory()
    most = max(delta.B.shape[1] for delta in merged.values())
    print("KnOTS-TIES, 6 adapters of rank 16, Llama-3-8B's q, k, v, o × 32 layers")
    print(
        f"  {decompose + rest:.1f} s: decomposition {decompose:.1f}, trim, elect and back {rest:.1f}; "
        f"rank of the merged ≤ {most}"
    )
    print(f"  peak memory of the process {peak:.2f} GiB, of which {held:.2f} before the merge")


def main() -> None:
    print(f"{torch.get_num_threads()} threads")
    vit()
    scaling()
    print(
        subprocess.run([sys.executable, __file__, "llama"], capture_output=True, text=True, check=True).stdout, end=""
    )
    name = "0.q.weight"
    vectors = adapters({name: LLAMA[name]}, 6, 16)
    slow, _ = timed(lambda: dense([v[name] for v in vectors]))
    count = sum(1 for part in LLAMA if part.split(".")[1] in "qo")
    fast, _ = best(lambda: joint_svd([v[name] for v in vectors]))
    print(
        f"  one q matrix: dense float64 SVD {slow:.1f} s, factored {fast:.3f} s; "
        f"{count} q and o matrices dense: {count * slow / 60:.0f} min"
    )


if __name__ == "__main__":
    llama() if sys.argv[1:] == ["llama"] else main()
