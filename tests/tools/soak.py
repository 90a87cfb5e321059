"""A thousand short runs, while kernels, launchers and nodes are killed at random: `make soak`.

    python tests/tools/soak.py [--runs 1000] [--on-ray 100] [--measured 20] [--seed 0]

1. What a run costs beside plain papermill: `run_one` and papermill's command on one notebook, in turn.
2. A grid that nobody disturbs; the launcher's memory is watched.
3. The same grid in another folder. In the time of four runs a kernel, a process that executes a notebook, a launcher,
   or a launcher with all its processes (a machine that loses power) gets SIGKILL. Two launchers work side by side; one
   that is gone, or that ended with failed runs, is started again.
4. A part of the grid on Ray's two nodes, of which one is killed and replaced.

Every result is then that of the undisturbed grid, byte for byte, and nothing is left over: no process, no temporary
file, no run that is not done. Prints one line a fact; exits 1 where one of them is not so.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil

from saftnb.batch import load_grid, run_one
from saftnb.run_folder import CURRENT, OWNER

CELLS = (
    "from saftnb.batch import record\nrecord(started=number)",
    # some runs load torch and share ten checkpoints
    "values = [number * 0.1 + seed * i for i in range(200)]\n"
    "if number % 25 == 0:\n"
    "    from saftnb.finetune import store\n"
    "    inputs = {'name': f'soak-{number // 25 % 10}', 'number': number // 25 % 10}\n"
    "    def take(folder, manifest):\n"
    "        return (folder / 'value.txt').read_text()\n"
    "    with store.locked(inputs):\n"
    "        shared = store.read(inputs, take, ('value.txt',))\n"
    "        if shared is None:\n"
    "            store.write(inputs, lambda folder: (folder / 'value.txt').write_text(str(inputs['number'] / 7)))\n"
    "            shared = store.read(inputs, take, ('value.txt',))\n"
    "    record(shared=shared)",
    "import time\ntime.sleep(0.2)\nrecord(values=values, total=sum(values))",
)
MiB = 2**20


def desk(folder: Path, runs: int, jobs: int = 2) -> Path:
    """A folder with the notebook and a grid of so many runs."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "notebooks").mkdir(parents=True)
    parameters = nbformat.v4.new_code_cell("number: int = 0\nseed: int = 0", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, CELLS)])
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(notebook, folder / "notebooks" / "short.ipynb")
    sweep = f"{{number: [{', '.join(map(str, range(runs)))}]}}"
    (folder / "grid.yaml").write_text(f"jobs: {jobs}\nruns: [{{notebook: notebooks/short.ipynb, sweep: {sweep}}}]\n")
    return folder


def environment(folder: Path) -> dict[str, str]:
    (folder / "tmp").mkdir(exist_ok=True)
    return os.environ | {"SAFTNB_STORE": str(folder / "store"), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}


def launch(folder: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "saftnb", "grid", "grid.yaml", *options]
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def results(folder: Path) -> dict[int, bytes]:
    """What each run recorded, by its number; only of runs whose manifest says done."""
    found = {}
    for manifest in (folder / "runs").glob("*/short-*/manifest.json"):
        told = json.loads(manifest.read_text())
        if told["status"] == "done":
            found[told["parameters"]["number"]] = (manifest.parent / "results.json").read_bytes()
    return found


def overhead(folder: Path) -> tuple[float, float]:
    """Median seconds of a run by `run_one`, and of papermill's command, in turn."""
    os.environ.update(environment(folder))
    ours, plain = [], []
    for run in load_grid(folder / "grid.yaml", folder / "measured").runs:
        if run.parameters["number"] % 25 == 0:
            continue  # those load torch
        began = time.perf_counter()
        assert run_one(run)["status"] == "done"
        ours.append(time.perf_counter() - began)
        number = str(run.parameters["number"])
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", "-p", "number", number]
        began = time.perf_counter()
        subprocess.run(
            [*command, run.notebook.path, folder / "plain.ipynb"], cwd=folder, check=True, stderr=subprocess.DEVNULL
        )
        plain.append(time.perf_counter() - began)
    return statistics.median(ours), statistics.median(plain)


def watched(folder: Path) -> tuple[int, list[int]]:
    """Run the grid to its end; its exit code, and the launcher's resident memory once a second."""
    launcher, memory = launch(folder), []
    process = psutil.Process(launcher.pid)
    while launcher.poll() is None:
        try:
            memory.append(process.memory_info().rss)
        except psutil.Error:
            break
        time.sleep(1)
    return launcher.wait(), memory


def families(launchers: list[subprocess.Popen]) -> Iterator[tuple[str, psutil.Process]]:
    """What may be killed: launchers, and below them the processes that execute notebooks and their kernels."""
    for launcher in launchers:
        try:
            head = psutil.Process(launcher.pid)
            yield "launcher", head
            for child in head.children(recursive=True):
                words = " ".join(child.cmdline())
                if "saftnb.batch.execute" in words:
                    yield "executor", child
                elif "ipykernel" in words or "kernel.json" in words:
                    yield "kernel", child
        except psutil.Error:
            continue


def strike(launchers: list[subprocess.Popen], dice: random.Random) -> str:
    """Kill one of what runs; what it was."""
    kind = dice.choice(("kernel", "kernel", "executor", "launcher", "node"))
    there = list(families(launchers))
    fitting = [process for name, process in there if name == ("launcher" if kind == "node" else kind)]
    if not fitting:
        return "nothing"
    victim = dice.choice(fitting)
    try:
        below = victim.children(recursive=True) if kind == "node" else []
        for process in [victim, *below]:
            process.send_signal(signal.SIGKILL)
    except psutil.Error:
        return "nothing"
    return kind


def disturbed(folder: Path, dice: random.Random, pause: float) -> Counter[str]:
    """Run the grid to its end, while something is killed every `pause` seconds or so; how often what was."""
    struck: Counter[str] = Counter()
    launchers: list[subprocess.Popen] = []
    finished, strikes_at = False, time.monotonic() + pause
    try:
        while not finished or launchers:
            for launcher in [one for one in launchers if one.poll() is not None]:
                launchers.remove(launcher)
                finished = finished or launcher.returncode == 0
            while not finished and len(launchers) < 2:
                launchers.append(launch(folder, "--jobs", "1"))
                struck["launched"] += 1
            time.sleep(0.2)
            if not finished and time.monotonic() > strikes_at:
                struck[strike(launchers, dice)] += 1
                strikes_at = time.monotonic() + dice.uniform(0.2, 1.8) * pause
        return struck
    finally:
        for launcher in launchers:
            launcher.kill()


def on_ray(folder: Path, dice: random.Random) -> Counter[str]:
    """The grid on Ray's two nodes; the second is killed and replaced, until the grid is done."""
    os.environ.update(environment(folder) | {"RAY_USAGE_STATS_ENABLED": "0"})
    for name, value in (("period_ms", 500), ("timeout_ms", 1000), ("failure_threshold", 2)):
        os.environ[f"RAY_health_check_{name}"] = str(value)
    from ray.cluster_utils import Cluster

    struck: Counter[str] = Counter()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        while True:
            node = cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            launcher = launch(folder, "--engine", "ray", "--address", cluster.address)
            struck["launched"] += 1
            wait_until = time.monotonic() + dice.uniform(20, 40)
            while launcher.poll() is None and time.monotonic() < wait_until:
                time.sleep(0.5)
            cluster.remove_node(node, allow_graceful=False)
            struck["node"] += launcher.poll() is None
            if launcher.wait() == 0:
                return struck
    finally:
        cluster.shutdown()


def leftovers(folder: Path, nodes: int) -> list[str]:
    """Temporary files and processes that outlived their grid; a machine without power leaves its folder of sockets."""
    time.sleep(3)  # what was killed a moment ago may still be on its way out
    own = {CURRENT, OWNER}
    files = [path for path in (folder / "runs").rglob(".*") if path.is_file() and path.name not in own]
    files += [path for path in (folder / "store").rglob("*") if ".partial" in path.parts and path.is_file()]
    files += sorted(path for path in (folder / "tmp").iterdir() if not path.name.startswith("ray"))[nodes:]
    found = [path.relative_to(folder).as_posix() for path in files]
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = " ".join(process.info["cmdline"] or [])
        if (process.info["cwd"] or "").startswith(str(folder)) and ("saftnb" in words or "kernel" in words):
            found.append(words[:100])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--on-ray", type=int, default=100)
    parser.add_argument("--measured", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    dice, failed = random.Random(given.seed), 0
    root = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))  # a short name: the paths of sockets are limited

    def fact(true: bool, line: str) -> None:
        nonlocal failed
        failed += not true
        print(line if true else f"NOT SO: {line}", flush=True)

    ours, plain = overhead(desk(root / "overhead", given.measured))
    print(f"a run takes {ours:.2f} s, papermill's command {plain:.2f} s: {ours - plain:+.2f} s (goal: below 0.5)")

    calm = desk(root / "calm", given.runs)
    began = time.monotonic()
    code, memory = watched(calm)
    wanted = results(calm)
    fact(
        code == 0 and len(wanted) == given.runs, f"undisturbed: {len(wanted)} runs in {time.monotonic() - began:.0f} s"
    )
    early, late = (statistics.median(part) / MiB for part in (memory[len(memory) // 10 :][:30], memory[-30:]))
    fact(late < early + 20, f"the launcher's memory: {early:.1f} MiB at the beginning, {late:.1f} MiB at the end")

    wild = desk(root / "wild", given.runs)
    began = time.monotonic()
    struck = disturbed(wild, dice, 4 * ours)
    got = results(wild)
    print(f"disturbed: {dict(struck)}, {time.monotonic() - began:.0f} s")
    fact(got == wanted, f"equal to the undisturbed grid: {sum(got.get(n) == w for n, w in wanted.items())} runs")
    left = leftovers(wild, struck["node"])
    fact(not left, f"left over: {len(left)} {left[:5]}")

    if given.on_ray:
        nodes = desk(root / "ray", given.on_ray)
        struck = on_ray(nodes, dice)
        got = results(nodes)
        same = sum(got.get(number) == wanted[number] for number in range(given.on_ray))
        fact(same == given.on_ray, f"on Ray: {dict(struck)}, equal to the undisturbed grid: {same} runs")
        left = leftovers(nodes, struck["node"])
        fact(not left, f"left over: {len(left)} {left[:5]}")
    if failed:
        print(f"kept for a look: {root}")
    else:
        shutil.rmtree(root)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
