"""The bench: its stages run alone, its log resumes, its report stands alone; its figures are not the point here."""

import json

import pytest

from imagegen import PlanError, bench


def test_a_tiny_bench_runs_and_goes_on(tmp_path, monkeypatch):
    page = bench.run(tmp_path, plans=["exact", "step-cache(warmup=1)"], tiny=True)
    rows = [json.loads(line) for line in (tmp_path / bench.LOG).read_text().splitlines()]
    assert [row["stage"]["stage"] for row in rows] == ["machine", "parts", "pictures"]
    trial = rows[2]["trial"]
    assert trial["n"] == 2 and rows[2]["stock_median_s"] > 0 and trial["fidelity"]["psnr_db"]["worst"] is None
    assert set(rows[1]["seconds"]) == {"text encoder", "denoiser", "decoder", "everything else"}
    assert "step-cache(warmup=1)" in page.read_text() and "not worth reading" not in page.read_text()
    monkeypatch.setattr(bench, "_in_a_process", lambda *_: pytest.fail("what is in the log is not measured again"))
    bench.run(tmp_path, plans=["exact", "step-cache(warmup=1)"], tiny=True)


def test_a_stage_that_fails_is_said_and_the_others_go_on(tmp_path):
    page = bench.run(tmp_path, plans=["bf16" if not bench.torch.cpu._is_avx512_bf16_supported() else "attention"], tiny=True)
    rows = bench.read_log(tmp_path)
    assert "failed" in rows[-1] and "failed" not in rows[0]
    assert "failed" in page.read_text()


def test_an_unknown_plan_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(PlanError, match="unknown"):
        bench.run(tmp_path, plans=["warp"], tiny=True)
    assert not (tmp_path / bench.LOG).exists()


def test_a_budget_of_no_time_measures_nothing(tmp_path):
    bench.run(tmp_path, tiny=True, budget_min=-1)
    assert bench.read_log(tmp_path) == []


def test_every_denoiser_plan_is_measured_or_refused(monkeypatch):
    monkeypatch.setattr(bench, "DENOISER_PLANS", ("eager", "channels-last", "bf16", "int8-weight-only"))
    monkeypatch.setattr("imagegen.levers.compute.has_fast_bf16", lambda device: False)
    threads = bench.torch.get_num_threads()
    try:
        found = bench.measure_denoiser("emoji", True, 256, 1)
    finally:
        bench.torch.set_num_threads(threads)
    assert found["rows"]["eager"]["error"] == 0 and found["rows"]["channels-last"]["error"] < 1e-5
    assert 1e-5 < found["rows"]["int8-weight-only"]["error"] < 0.1
    assert "bf16" in found["refused"]
