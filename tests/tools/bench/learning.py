"""A learning step over a plain training step of each task, in time and memory: python tests/tools/bench/learning.py

Both see as many pictures of each task. Times are medians of steps taken in turn in one process; memory is that of a
process of its own for each.
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
from saftnb.merging.coefficients import Values
from saftnb.merging.learning_loop import Learning, Plan
from saftnb.suites import Suite, load_suite
from saftnb.task_vector import TaskVector

KINDS = ("channel", "parameter", "task", "weights")
PICTURES = 64  # of each task in a step
GOAL = 1.5  # times the plain steps


def trainings(suite: Suite) -> list[Training]:
    plan = recipe("sgd", suite, batch_size=PICTURES)
    return [Training(suite.classifier(name), task, plan, 0, torch.device("cpu")) for name, task in suite.tasks.items()]


def learning(suite: Suite, by: str) -> Learning:
    shapes = {name: p.shape for name, p in suite.tower().named_parameters()}
    draw = torch.Generator().manual_seed(0)
    vectors = {
        task: TaskVector({name: 0.01 * torch.randn(shape, generator=draw) for name, shape in shapes.items()})
        for task in suite.tasks
    }
    plan = Plan(
        objective="distillation", by=by, rho=None, steps=100, examples=PICTURES, views=0, batch_size=PICTURES, lr=1e-3,
        start=1 / len(vectors), temperature=1.0, optimizer="adam", momentum=0.0, weight_decay=0.0, perturbation="sam",
        clamp=None, schedule="constant",
    )  # fmt: skip
    values = Values(list(vectors.values()), by, plan.start, torch.device("cpu"))
    return Learning(suite, vectors, values, plan, 0, False, torch.device("cpu"))


def memory(kind: str) -> None:
    """Peak memory of a few steps, beyond what was there before the first, in MiB, as JSON."""
    suite = load_suite("pocket")
    steppers = trainings(suite)[:1] if kind == "plain" else [learning(suite, kind)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    for _ in range(4):
        for one in steppers:
            one.step()
    print(json.dumps((resident("VmHWM") - before) * 1024))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--child", choices=("plain", *KINDS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        memory(arguments.child)
        return 0
    suite = load_suite("pocket")
    running = {"plain": trainings(suite)} | {by: [learning(suite, by)] for by in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in running}
    for _ in range(arguments.steps + 2):
        for kind, steppers in running.items():
            start = time.process_time()
            for one in steppers:
                one.step()
            times[kind].append(time.process_time() - start)
    seconds = {kind: statistics.median(values[2:]) for kind, values in times.items()}
    print(f"a learning step on pocket-0, {PICTURES} pictures of each of {len(suite.tasks)} tasks, one thread, CPU time")
    for kind in running:
        command = [sys.executable, __file__, "--child", kind]
        peak = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        name = "one plain step a task" if kind == "plain" else f"learning by {kind}"
        ratio = f"{seconds[kind] / seconds['plain']:.2f} × plain (goal at most {GOAL})" if kind != "plain" else ""
        print(f"{name:>22}: {1000 * seconds[kind]:6.0f} ms {ratio:36} peak memory {peak:6.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
