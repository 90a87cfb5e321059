"""A sharpness-aware step over a plain one, in time and peak memory: python tests/tools/bench/steps.py [--steps 15]

Times are medians of steps taken in turn in one process; memory is that of a process of its own for each kind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from ties import resident

from saftnb.finetune import recipe
from saftnb.finetune.train import Training
from saftnb.suites import load_suite

KINDS = {"adamw": "sgd", "sam": "sam", "asam": "saft", "asam-kwon": "asam-kwon"}
FLOOR = 2.0  # two gradients against one


def training(kind: str) -> Training:
    suite = load_suite("pocket")
    plan = recipe(KINDS[kind], suite)
    return Training(suite.classifier("patterns"), suite.tasks["patterns"], plan, 0, torch.device("cpu"))


def memory(kind: str) -> None:
    """Peak memory of a few steps, beyond what was there before the first, in MiB, as JSON."""
    one = training(kind)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    for _ in range(4):
        one.step()
    print(json.dumps((resident("VmHWM") - before) * 1024))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        memory(arguments.child)
        return 0
    running = {kind: training(kind) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.steps + 2):
        for kind, one in running.items():
            start = time.process_time()
            one.step()
            times[kind].append(time.process_time() - start)
    peaks = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--child", kind]
        peaks[kind] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    print(f"a step on pocket-0, batch {running['adamw'].recipe.batch_size}, one thread, CPU time")
    for kind in KINDS:
        seconds = {k: statistics.median(values[2:]) for k, values in times.items()}
        ratio = seconds[kind] / seconds["adamw"]
        more = f"{ratio:.2f} × adamw (floor {FLOOR})" if kind != "adamw" else ""
        share = f"{peaks[kind] / peaks['adamw']:.2f} ×" if kind != "adamw" else ""
        print(f"{kind:>10}: {1000 * seconds[kind]:6.1f} ms {more:24} peak memory {peaks[kind]:6.1f} MiB {share}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
