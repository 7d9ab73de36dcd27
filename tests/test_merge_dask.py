"""The merge on a Dask cluster of two processes, one of which is killed midway."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from checkpoints import write_adapter, write_model

from doraxp.checkpoint import Options, plan_merge, run_merge
from doraxp.cli import main


def read(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_merge_survives_a_worker_that_dies(distributed, tmp_path):
    write_model(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    plan = plan_merge(tmp_path / "base", tmp_path / "adapter", Options())
    run_merge(plan, tmp_path / "alone")
    died = tmp_path / "died"

    def die_once():
        with contextlib.suppress(FileExistsError):
            died.touch(exist_ok=False)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)

    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    )
    with cluster, distributed.Client(cluster) as client:
        executor = client.get_executor()
        submit = executor.submit
        executor.submit = lambda *args: submit(after(die_once), *args)
        run_merge(plan, tmp_path / "out", verify=True, executor=executor)
    assert died.exists()
    assert read(tmp_path / "out") == read(tmp_path / "alone")


WORKER = """
import asyncio, sys
from distributed import Worker
{change}

async def main():
    async with Worker(sys.argv[1], dashboard=False) as worker:
        await worker.finished()

asyncio.run(main())
"""


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sys.modules['doraxp'] = None", "has no doraxp: install doraxp[distributed]=="),
        ("sys.modules['safetensors'] = None", "has no safetensors: install doraxp[distributed]=="),
        ("import doraxp; doraxp.__version__ = '0.1'", "has doraxp 0.1, but here it is "),
    ],
)
def test_a_real_worker_that_lacks_something_is_named(
    distributed, tmp_path, capsys, change, message
):
    write_model(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    cluster = distributed.LocalCluster(
        n_workers=0, processes=False, protocol="tcp", dashboard_address=None
    )
    command = [sys.executable, "-c", WORKER.format(change=change), cluster.scheduler_address]
    with cluster, subprocess.Popen(command, stderr=subprocess.DEVNULL) as worker:
        try:
            with distributed.Client(cluster) as client:
                client.wait_for_workers(1, timeout=60)
            paths = [str(tmp_path / name) for name in ("base", "adapter", "out")]
            options = ["--scheduler", cluster.scheduler_address]
            assert main(["merge", *paths[:2], "--out", paths[2], *options]) == 2
        finally:
            worker.kill()
    problem = capsys.readouterr().err
    assert message in problem
    assert problem.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def after(first):
    def run(function, *args):
        first()
        return function(*args)

    return run
