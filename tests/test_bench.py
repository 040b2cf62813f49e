"""The bench: its stages run alone, its log survives a kill, its report keeps its schema; its figures are not the point."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import torch

from imagegen import PlanError, bench
from imagegen.bench import crowd, denoiser, gpu, janusflow, pictures
from imagegen.families.denoisers import ARCHITECTURES

SCHEMA = json.loads((Path(bench.__file__).parent / "bench.schema.json").read_text())


def check_report(folder):
    report = json.loads((folder / "bench.json").read_text())
    jsonschema.validate(report, SCHEMA)
    return report


def stages_in(folder):
    return [bench.label_of(row["stage"]) for row in bench.read_log(folder)]


@pytest.mark.slow
def test_a_tiny_bench_completes_after_a_kill(tmp_path):
    command = [sys.executable, "-m", "imagegen", "bench", "--tiny", "--device", "cpu", "--plan", "step-cache(warmup=1)"]
    started = subprocess.Popen([*command, "--out", str(tmp_path)], start_new_session=True, stderr=subprocess.DEVNULL)
    while len(bench.read_log(tmp_path)) < 2:
        assert started.poll() is None
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    before = (tmp_path / bench.LOG).read_text()
    with (tmp_path / bench.LOG).open("a") as file:
        file.write('{"key": "cut sho')
    done = subprocess.run([*command, "--out", str(tmp_path), "--json"], capture_output=True, text=True, check=True)
    assert (tmp_path / bench.LOG).read_text().startswith(before), "what was measured stands"
    denoisers = [f"denoiser {name}" for name in ARCHITECTURES]
    assert stages_in(tmp_path) == [
        "machine",
        "parts",
        "pictures step-cache(warmup=1)",
        "training",
        "kernels",
        "janusflow",
        "crowd",
        "workers",
        *denoisers,
    ]
    assert not any("failed" in row for row in json.loads(done.stdout)["stages"])
    report = check_report(tmp_path)
    assert report["tiny"] and {figure["kind"] for figure in report["figures"]} == {"measured", "skipped"}
    assert "nothing here is worth reading" in (tmp_path / "bench.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "step-cache(warmup=1)" in page and "relative error" in page


def test_what_is_in_the_log_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_in_a_process", lambda stage, source: {"failed": "made up"})
    bench.run(tmp_path, tiny=True, device="cpu")
    monkeypatch.setattr(bench, "_in_a_process", lambda *_: pytest.fail("it is in the log"))
    bench.run(tmp_path, tiny=True, device="cpu")
    figures = json.loads((tmp_path / "bench.json").read_text())["figures"]
    assert {figure["note"] for figure in figures} == {"made up"}


def test_a_stage_that_fails_is_said_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "stages", lambda *_, **__: [
        {"stage": "pictures", "plan": "attention(backend=sage)", "device": "cpu", "tiny": True},
        {"stage": "machine", "device": "cpu", "tiny": True},
    ])  # fmt: skip
    bench.run(tmp_path, device="cpu")
    rows = bench.read_log(tmp_path)
    assert "attention" in rows[0]["failed"] and "failed" not in rows[1]
    figures = check_report(tmp_path)["figures"]
    assert figures[0]["kind"] == "skipped" and "attention" in figures[0]["note"]


def test_an_unknown_plan_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(PlanError, match="unknown"):
        bench.run(tmp_path, plans=["warp"], tiny=True, device="cpu")
    assert not (tmp_path / bench.LOG).exists()


def test_a_budget_of_no_time_measures_nothing_and_says_why(tmp_path):
    bench.run(tmp_path, tiny=True, budget_min=-1, device="cpu")
    assert bench.read_log(tmp_path) == []
    figures = json.loads((tmp_path / "bench.json").read_text())["figures"]
    assert len(figures) > 5 and all("budget" in figure["note"] for figure in figures)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_denoiser_plan_is_measured_or_refused(name, monkeypatch):
    monkeypatch.setattr(denoiser, "CPU_PLANS", ("channels-last", "bf16", "int8-weight-only", "cuda-graph"))
    monkeypatch.setattr("imagegen.levers.compute.has_fast_bf16", lambda device: False)
    found = denoiser.measure_denoiser("emoji", tiny=True, device="cpu", architecture=name)
    rows, refused = found["rows"], found["refused"]
    assert set(rows) | set(refused) == {"eager", "channels-last", "bf16", "int8-weight-only", "cuda-graph"}
    assert rows["eager"]["error"] == 0 and rows["eager"]["eager_median_s"] == rows["eager"]["median_s"]
    assert 1e-6 < rows["int8-weight-only"]["error"] < 0.1
    assert "bfloat16" in refused["bf16"] and "CUDA" in refused["cuda-graph"]
    assert ("channels-last" in rows) == ("UNet" in ARCHITECTURES[name].kind) or rows["channels-last"]["error"] < 1e-5
    assert found["estimated_s"] is None, "there is no data sheet of a CPU"


def test_kernels_on_a_cpu_are_skipped_with_the_reason():
    found = gpu.measure_kernels("emoji", tiny=True, device="cpu")
    assert found["kernels"] and all("CUDA" in kernel["skipped"] for kernel in found["kernels"].values())


def test_kernels_that_may_run_are_timed_in_turn_with_torch(monkeypatch):
    monkeypatch.setattr(gpu, "may_run", lambda kernel, device: (True, "forced: torch computes the op here"))
    for name, kernel in gpu.measure_kernels("emoji", tiny=True, device="cpu")["kernels"].items():
        assert set(gpu.SHAPES) == set(gpu.CALLS) == set(gpu.KERNELS)
        (case,) = kernel["cases"]
        assert case["p10_s"] <= case["median_s"] <= case["p90_s"] and case["ratio"] > 0, name
        ours, torchs, _, moved = gpu.CALLS[name](gpu.SHAPES[name][-1], torch.device("cpu"))
        mine, others = ours(), torchs()
        mine = mine[0] if isinstance(mine, tuple) else mine
        tolerance = 1 if mine.dtype == torch.int8 else 0.05 * others.abs().max()
        assert moved > 0 and (mine.float() - others.float()).abs().max() <= tolerance, name


def test_a_kept_prompt_gives_the_velocity_of_one_read_anew():
    found = janusflow.measure_janusflow("emoji", tiny=True, device="cpu")
    for row in found["rows"].values():
        assert 0 < row["error"] < 1e-4 and min(row["seconds"].values()) > 0 < row["ratio"]


def test_a_crowd_sees_no_error_and_every_picture_is_the_one_made_alone():
    found = crowd.measure_crowd("emoji", tiny=True, device="cpu")
    assert found["batched"]["errors"] == found["single"]["errors"] == []
    assert found["batched"]["finished"] == found["compared"] > 0
    assert found["batched"]["left"] > 0
    assert found["worst_psnr_db"] >= 60 and found["largest_difference"] <= 1


def test_a_report_that_breaks_its_schema_is_found_out():
    figure = {"stage": "a", "what": "b", "value": None, "unit": "s", "kind": "measured", "note": ""}
    report = {"version": 1, "about": {"cpu": "x", "torch": "y"}, "tiny": False, "figures": [figure]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, SCHEMA)
    jsonschema.validate(report | {"figures": [figure | {"value": 1.0}]}, SCHEMA)


def test_the_machine_is_described():
    found = pictures.measure_machine("emoji", tiny=True, device="cpu")
    assert found["gpu"] == {} and found["threads"] == torch.get_num_threads() and min(found["gflops"].values()) > 0
