"""The merge on a Dask cluster of two processes, one of which is killed midway."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest
from checkpoints import write_adapter, write_model

from doraxp.checkpoint import Options, plan_merge, run_merge


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


def after(first):
    def run(function, *args):
        first()
        return function(*args)

    return run
