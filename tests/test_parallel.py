"""Context parallelism: two processes on the CPU draw the picture of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import FluxBench, make_unet

from imagegen.request import PlanError


@pytest.mark.skipif(
    torch.backends.cuda.is_built() and not torch.cuda.is_available(),
    reason="diffusers gathers on CUDA wherever torch was built for it, and here is no device",
)
def test_two_processes_draw_the_picture_of_one():
    script = Path(__file__).parent / "two_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(script.parent), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(row["rank"] for row in found) == [0, 1]
    for row in found:
        assert row["picture back"] and row["parts back"]
        assert row["difference"] <= 1e-4 * row["range"]
        assert row["report"] == [{"lever": "context-parallel", "engaged": True, "did": "3 denoiser calls over 2 processes"}]


def test_a_model_or_a_start_that_cannot_is_said(model):
    with pytest.raises(PlanError, match="UNet2DConditionModel"):
        make_unet(model).set_plan("context-parallel")
    with pytest.raises(PlanError, match="torchrun"):
        FluxBench().set_plan("context-parallel")
    with pytest.raises(PlanError, match="ulysses or ring"):
        FluxBench().set_plan("context-parallel(kind=star)")
