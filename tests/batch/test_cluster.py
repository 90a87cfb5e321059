"""The Ray engine on a real cluster of two nodes on this machine: a node dies, the launcher is stopped or killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from saftnb.batch import load_grid, run_grid
from saftnb.batch.grid import GridError, Resources
from saftnb.run_folder import find_runs

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from saftnb.batch import cluster  # noqa: E402
from tests.tools.waiting import gone, until  # noqa: E402

SLOW = """
import os, time
from pathlib import Path
from saftnb.batch import record
with open(f"began-{seed}", "a") as file:
    file.write(f"{os.getpid()}\\n")
while not Path("go").exists():
    time.sleep(0.05)
record(value=0.1 + seed)
"""
SEES = """
import os
from saftnb.batch import record
record(gpus=os.environ["CUDA_VISIBLE_DEVICES"], threads=os.environ["OMP_NUM_THREADS"], store=os.environ["SAFTNB_STORE"])
"""
GRID = "runs: [{notebook: slow, sweep: {seed: [1, 2, 3, 4]}}]"


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_health_check_period_ms", "500")
        patch.setenv("RAY_health_check_timeout_ms", "1000")
        patch.setenv("RAY_health_check_failure_threshold", "2")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def office(desk: Path, write_notebook, two_nodes: Cluster) -> Iterator[Path]:
    write_notebook(desk / "notebooks" / "slow.ipynb", SLOW, parameters="seed: int = 0")
    (desk / "grid.yaml").write_text(GRID)
    yield desk
    (desk / "notebooks" / "go").touch()


def manifests(runs: Path) -> list[dict]:
    return [run.manifest for run in find_runs(runs)]


def launch(desk: Path, address: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "saftnb", "grid", "grid.yaml", "--engine", "ray", "--address", address, *options]
    with open(desk / "output.txt", "w") as output:
        return subprocess.Popen(
            command, cwd=desk, stdout=output, stderr=subprocess.STDOUT, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip


def ended(process: subprocess.Popen[str], desk: Path, code: int) -> list[str]:
    try:
        assert process.wait(timeout=150) == code, (desk / "output.txt").read_text()
    finally:
        process.kill()
    return (desk / "output.txt").read_text().splitlines()


def kernels(desk: Path, count: int) -> dict[int, psutil.Process]:
    """The kernels of the runs that have begun, by seed, once there are so many that live."""

    def living() -> dict[int, psutil.Process]:
        found = {}
        for file in (desk / "notebooks").glob("began-*"):
            written = file.read_text().split()
            if not written:  # it has just been opened
                continue
            pid = int(written[-1])
            if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found[int(file.name.partition("-")[2])] = psutil.Process(pid)
        return found

    until(lambda: len(living()) == count)
    return living()


def test_a_node_that_is_killed_loses_no_run(office: Path, two_nodes: Cluster) -> None:
    launcher = launch(office, two_nodes.address)
    running = kernels(office, 2)
    second = two_nodes.worker_nodes and next(iter(two_nodes.worker_nodes))
    raylet = second.all_processes["raylet"][0].process.pid
    on_second = [seed for seed, kernel in running.items() if raylet in {p.pid for p in kernel.parents()}]
    assert len(on_second) == 1, "one run on each node"
    two_nodes.remove_node(second, allow_graceful=False)
    until(lambda: gone(running[on_second[0]]), seconds=60)
    assert not any(run.done for run in find_runs(office / "runs"))
    two_nodes.add_node(num_cpus=1)
    (office / "notebooks" / "go").touch()
    lines = ended(launcher, office, 0)
    assert "2 nodes with 2 cores" in lines[0]
    said = [line for line in lines if line.split(" ")[0] in ("start", "again", "done", "grid")]  # between Ray's own
    assert said[-1].startswith("grid grid: 4 runs: 4 done")
    assert [line.split()[0] for line in said[1:-1]].count("start") == 4
    assert [line for line in said if line.endswith(": its node was lost")]
    began = {seed: len((office / "notebooks" / f"began-{seed}").read_text().split()) for seed in (1, 2, 3, 4)}
    assert began == {seed: 2 if seed in on_second else 1 for seed in (1, 2, 3, 4)}
    assert all(run.done for run in find_runs(office / "runs"))
    assert not list((office / "runs").rglob(".seen-*"))
    # what came out is what the local engine gives
    run_grid(load_grid("grid.yaml", "elsewhere"), 2, say=lambda _: None)
    hashes = [{m["seed"]: m["results_sha256"] for m in manifests(office / place)} for place in ("runs", "elsewhere")]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0].values())) == 4


def test_ctrl_c_ends_the_runs_wherever_they_are(office: Path, two_nodes: Cluster) -> None:
    launcher = launch(office, two_nodes.address)
    running = kernels(office, 2)
    launcher.send_signal(signal.SIGINT)
    lines = ended(launcher, office, 130)
    assert "2 interrupted, 2 not started" in lines[-1]
    assert all(map(gone, running.values()))
    assert {m["status"] for m in manifests(office / "runs")} == {"interrupted"}
    assert {m["reason"] for m in manifests(office / "runs")} == {"stopped by the user"}


def test_a_launcher_that_is_killed_leaves_no_kernel_and_no_claim(office: Path, two_nodes: Cluster) -> None:
    launcher = launch(office, two_nodes.address)
    running = kernels(office, 2)
    launcher.kill()
    launcher.wait()
    until(lambda: all(map(gone, running.values())), seconds=60)
    assert not any(run.done for run in find_runs(office / "runs"))


def test_resources_are_rays_business_and_a_run_sees_what_it_asked_for(
    desk: Path, write_notebook, two_nodes: Cluster
) -> None:
    node = two_nodes.add_node(num_cpus=3, num_gpus=2)
    write_notebook(desk / "notebooks" / "sees.ipynb", SEES, parameters="seed: int = 0")
    (desk / "grid.yaml").write_text(
        "runs:\n"
        "- {notebook: sees}\n"
        "- {notebook: sees, parameters: {seed: 1}, resources: {cpus: 3, gpus: 2}}\n"
        "- {notebook: sees, parameters: {seed: 2}, resources: {gpus: 0}}\n"
    )
    try:
        lines = ended(launch(desk, two_nodes.address), desk, 0)
        allowed = len(os.sched_getaffinity(0))
        told = f"Ray counts 3 cores and its processes may use {allowed} (under Slurm give srun --cpus-per-task)"
        assert (told in lines[0]) == (allowed < 3)
        seen = {run.manifest["seed"]: run.results for run in find_runs(desk / "runs")}
        assert seen[0]["gpus"] in ("0", "1"), "one GPU where the grid does not say and there are some"
        assert (seen[1]["gpus"], seen[1]["threads"]) == ("0,1", "3")
        assert (seen[2]["gpus"], seen[2]["threads"]) == ("", "1")
        assert {value["store"] for value in seen.values()} == {os.environ["SAFTNB_STORE"]}
    finally:
        two_nodes.remove_node(node)


def test_what_no_node_has_and_a_node_that_does_not_see_the_folders_are_named(
    office: Path, two_nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = list(load_grid("grid.yaml").runs)
    engine = cluster.OnRay(two_nodes.address)
    try:
        engine.check(runs)
        greedy = replace(runs[0], resources=Resources(gpus=3))
        with pytest.raises(GridError, match=r"^grid\.yaml:1: slow needs 1 cores, 3 GPUs, which no node has$"):
            engine.check([greedy])
        marks = cluster._marks

        def lost(folders):  # as on a node where the folder is another one
            with marks(folders) as made:
                return marks_of({path + "x": value for path, value in made.items()})

        from contextlib import nullcontext as marks_of

        with monkeypatch.context() as patch:
            patch.setattr(cluster, "_marks", lost)
            with pytest.raises(GridError, match=r"^node [\d.]+ \(.+\) does not see .+: it must be on a file system"):
                engine.check(runs)
        with monkeypatch.context() as patch:
            patch.setattr(cluster, "library_sha256", lambda: "another")
            with pytest.raises(GridError, match=r"^node .* has another version of the project installed$"):
                engine.check(runs)
    finally:
        engine.close()


def test_no_cluster_is_one_line(desk: Path, write_notebook) -> None:
    write_notebook(desk / "notebooks" / "slow.ipynb", SLOW, parameters="seed: int = 0")
    (desk / "grid.yaml").write_text(GRID)
    lines = ended(launch(desk, "127.0.0.1:1"), desk, 2)
    assert lines[-1].startswith("saftnb: no Ray cluster at 127.0.0.1:1: ")
    assert not (desk / "runs").exists()
