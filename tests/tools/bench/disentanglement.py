"""A disentanglement map with and without reuse: python tests/tools/bench/disentanglement.py [--cells 7]

Without: four models a cell, each set up and run on the pictures, as the definition is written. With:
`disentanglement_map`. CPU time of one process, one thread, random task vectors.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from saftnb.analysis import disentanglement_map
from saftnb.suites import Suite, load_suite
from saftnb.task_vector import TaskVector


@torch.no_grad()
def plainly(
    suite: Suite, vectors: dict[str, TaskVector], alphas: list[float], pictures: int, tangent: bool
) -> list[float]:
    one, two = vectors
    found = []
    for a in alphas:
        for b in alphas:
            total = 0.0
            for task, alone in ((one, a * vectors[one]), (two, b * vectors[two])):
                images = suite.tasks[task].test.images[:pictures]
                both = a * vectors[one] + b * vectors[two]
                shown = [
                    suite.classifier(task, suite.tower(move, tangent=tangent))(images).argmax(1)
                    for move in (alone, both)
                ]
                total += (shown[0] != shown[1]).double().mean().item()
            found.append(total)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    suite = load_suite("thimble")
    shapes = {name: p.shape for name, p in suite.tower().named_parameters()}
    generator = torch.Generator().manual_seed(0)
    vectors = {
        task: TaskVector({n: 0.02 * torch.randn(s, generator=generator) for n, s in shapes.items()})
        for task in suite.tasks
    }
    alphas = [2 * i / (arguments.cells - 1) - 1 for i in range(arguments.cells)]
    print(f"disentanglement map, {arguments.cells}² cells, {arguments.pictures} pictures a task, one thread, CPU time")
    far = 0.0
    for tangent in (False, True):
        start = time.process_time()
        slow = plainly(suite, vectors, alphas, arguments.pictures, tangent)
        middle = time.process_time()
        fast = disentanglement_map(
            suite, vectors, alphas, pictures=arguments.pictures, tangent=tangent, device="cpu", progress=False
        )
        end = time.process_time()
        far = max(far, max(abs(x - y) for x, y in zip(slow, fast["xi"], strict=True)))
        kind = "tangent" if tangent else "plain"
        without, reusing = middle - start, end - middle
        print(f"{kind:>8}: without reuse {without:6.1f} s, with {reusing:5.1f} s, ratio {without / reusing:.1f}")
    print(f"largest difference of a cell: {far:.3f}")
    return 0 if far <= 0.05 else 1


if __name__ == "__main__":
    sys.exit(main())
