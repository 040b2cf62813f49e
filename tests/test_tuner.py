"""The tuner: which plan it takes, what it claims, and what an interruption costs."""

import json
from dataclasses import replace

import pytest

import imagegen
from imagegen import PlanError, RequestError, tuner
from imagegen.comparison import Trial
from imagegen.profile import read_profile
from imagegen.weights import cache_folder

FAST = {"num_steps": 5, "prompts": ["a red apple", "a rocket", "an owl", "a pizza"]}


@pytest.fixture(autouse=True)
def small(monkeypatch, model):
    """Small pictures, two prompts to search on, and few levers: what is found is not the point here."""
    monkeypatch.setattr(model, "family", replace(model.family, size_px=64))
    monkeypatch.setattr(tuner, "SEARCH_PICTURES", 2)
    groups = (("bf16", "threads(count=3)"), ("step-cache(warmup=2)", "step-cache(warmup=3)"), ("guidance-cache(warmup=2)",))
    monkeypatch.setattr(tuner, "GROUPS", groups)
    monkeypatch.setattr("imagegen.levers.compute.has_fast_bf16", lambda device: False)


def test_a_profile_says_what_was_measured(model, tmp_path):
    profile = imagegen.tune(model, min_psnr_db=20.0, **FAST)
    assert profile.evidence["n"] == 2 and profile.evidence["failure_rate_below"] == 1.0
    assert profile.evidence["worst"] is None or profile.evidence["worst"] >= 20
    assert profile.request == {"num_steps": 5, "guidance": 4.0, "num_images": 1, "width": 64, "height": 64}
    assert any("bf16" in note for note in profile.notes)
    assert model.plan.name == "exact"
    path = profile.save(tmp_path / "p.json")
    again = imagegen.load(plan=path)
    assert [lever["lever"] for lever in again.applied] == read_profile(path).plan == profile.plan
    assert "data:image/png" in profile.save_report(tmp_path / "report").read_text()
    assert not list((cache_folder() / "tune").glob("*.jsonl"))


def test_a_budget_that_no_lever_keeps_gives_the_exact_plan(model):
    profile = imagegen.tune(model, min_psnr_db=120.0, **FAST)
    assert profile.plan in ([], ["prompt-cache"]) and profile.evidence["worst"] is None


def test_an_interrupted_search_goes_on(model, monkeypatch):
    def tell(what, done, total):
        if what.startswith("alone: step-cache(warmup=3)"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imagegen.tune(model, min_psnr_db=20.0, progress=tell, **FAST)
    assert model.plan.name == "exact"
    (log,) = (cache_folder() / "tune").glob("*.jsonl")
    assert [json.loads(line)["plan"] for line in log.read_text().splitlines()] == [
        "exact",
        "prompt-cache",
        "threads(count=3)",
        "step-cache(warmup=2)",
    ]
    with log.open("a") as file:
        file.write('{"plan": "cut sh')
    tried = []
    measure = tuner.try_plan
    monkeypatch.setattr(tuner, "try_plan", lambda model, plan, *rest: tried.append(plan.name) or measure(model, plan, *rest))
    monkeypatch.setattr(tuner, "SAME_PACE", float("inf"))
    imagegen.tune(model, min_psnr_db=20.0, **FAST)
    assert "step-cache(warmup=2)" not in tried and "step-cache(warmup=3)" in tried


def test_times_of_a_busier_machine_are_not_believed(model, monkeypatch):
    facts = {"plan": "exact", "seconds": [999.0, 999.0], "measured": [{"psnr_db": None}] * 2}
    stale = {
        "plan": "step-cache(warmup=2)",
        "seconds": [0.0, 0.0],
        "measured": [{"psnr_db": None}] * 2,
        "levers": [{"engaged": True}],
    }
    monkeypatch.setattr(tuner, "_read_log", lambda path: ((row["plan"], Trial(**row)) for row in (facts, stale)))
    profile = imagegen.tune(model, min_psnr_db=20.0, **FAST)
    assert profile.speed["median_s"] > 0


def test_a_search_begins_nothing_after_its_time(model, monkeypatch):
    tried = []
    measure = tuner.try_plan
    monkeypatch.setattr(tuner, "try_plan", lambda model, plan, *rest: tried.append(plan.name) or measure(model, plan, *rest))
    profile = imagegen.tune(model, min_psnr_db=20.0, minutes=1e-6, **FAST)
    assert tried == ["exact", "prompt-cache"] and profile.plan == []
    assert "step-cache(warmup=2): no time was left to try it: give more minutes" in profile.notes


def test_no_time_to_confirm_is_said(model, monkeypatch):
    monkeypatch.setattr(tuner, "SEARCH_SHARE", float("inf"))
    profile = imagegen.tune(model, min_psnr_db=20.0, minutes=1e-6, **FAST)
    assert profile.plan == [] and any("no time was left" in note for note in profile.notes)


def test_a_plan_that_leaves_the_budget_on_an_unseen_picture_is_dropped(model, monkeypatch):
    whole = tuner.add_case

    def add_case(trial, result, references):
        whole(trial, result, references)
        if trial.levers == [] and trial.plan not in ("exact", "prompt-cache"):
            trial.measured[-1]["psnr_db"] = 1.0

    monkeypatch.setattr(tuner, "add_case", add_case)  # the search measures through comparison's own
    profile = imagegen.tune(model, min_psnr_db=20.0, **FAST)
    assert profile.plan in ([], ["prompt-cache"])


@pytest.mark.parametrize(
    ("given", "says"),
    [({}, "one budget"), ({"min_psnr_db": 30, "max_flip": 0.1}, "one budget"), ({"min_ssim": 2}, "from 0 to 1"),
     ({"min_psnr_db": 30, "minutes": 0}, "minutes"), ({"min_psnr_db": 30, "prompts": ["a"]}, "more than"),
     ({"min_psnr_db": 30, "max_memory_gib": 0}, "max_memory_gib")],
)  # fmt: skip
def test_wrong_budgets(model, given, says):
    with pytest.raises(RequestError, match=says):
        imagegen.tune(model, **given)


@pytest.mark.parametrize(("metric", "inside", "outside"), [("psnr_db", 30, 29.9), ("ssim", 0.95, 0.94), ("flip", 0.05, 0.06)])
def test_budgets(metric, inside, outside):
    budget = tuner.Budget(metric, {"psnr_db": 30, "ssim": 0.95, "flip": 0.05}[metric])
    assert budget.keeps(inside) and not budget.keeps(outside) and not budget.keeps(inside, margin=0.001)


def test_a_profile_of_other_weights_is_refused(model, tmp_path):
    profile = imagegen.tune(model, min_psnr_db=120.0, **FAST)
    object.__setattr__(profile, "model", profile.model | {"sha256": {"unet": "0"}})
    path = profile.save(tmp_path / "p.json")
    with pytest.raises(PlanError, match="other weights"):
        imagegen.load(plan=path)
