"""Plans against a reference: what is measured, who is blamed, what is said."""

import json
import math

import pytest

import imagegen
from imagegen import DataError, PlanError
from imagegen.comparison import Trial, decibels, judge, mean_square
from imagegen.profile import Profile
from imagegen.reference_set import ReferenceSet


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("references") / "set"
    return imagegen.record_reference(model, ["a red apple", "a rocket"], folder, num_steps=6)


@pytest.fixture(scope="module")
def report(model, recorded):
    return imagegen.compare(recorded.folder, model, ["exact", "prompt-cache + step-cache(warmup=2)"], min_psnr_db=20)


def test_exact_is_identical_and_a_cache_drifts(report):
    exact, cached = report.trials
    assert exact.worst() == math.inf and "identical" in exact.verdict
    assert 15 < cached.worst() < 60 and "against float32" in cached.verdict and "noise floor" in cached.verdict
    assert all(lever["engaged"] for lever in cached.levers)


def test_the_lever_that_drifts_is_blamed(report):
    exact_one, cache = report.trials[1].blame
    assert (exact_one["lever"], cache["lever"]) == ("prompt-cache", "step-cache(warmup=2)")
    assert exact_one["share_of_drift"] == 0 and cache["share_of_drift"] == 1
    assert cache["psnr_db_after"] == pytest.approx(report.trials[1].mean())


def test_a_budget_is_kept_or_not(report, model, recorded):
    worst = report.trials[1].worst()
    assert report.holds == (worst >= 20)
    assert not imagegen.compare(recorded, model, ["step-cache(warmup=2)"], min_psnr_db=worst + 1).holds


def test_the_report_is_one_page_with_the_pictures(report, tmp_path):
    page = report.save(tmp_path / "report").read_text()
    assert page.count("data:image/png;base64") == 2 * 3  # two references, each beside two plans
    assert "http" not in page.replace("http://www.w3.org", "")
    data = json.loads((tmp_path / "report/report.json").read_text())
    assert data["plans"][0]["fidelity"]["psnr_db"] == {"worst": None, "mean": None} and data["holds"] is True


def test_a_profile_of_another_machine_is_compared_all_the_same(model, recorded, tmp_path):
    profile = Profile(1, {"source": "x", "sha256": {}}, {"device": "another"}, {}, {}, {}, ["step-cache(warmup=2)"], {}, {}, [])
    path = profile.save(tmp_path / "p.json")
    with pytest.raises(PlanError, match="other weights"):
        model.set_plan(path)
    assert imagegen.compare(recorded, model, [path]).trials[0].levers[0]["engaged"]


def test_other_weights_are_noted(model, recorded):
    facts = {name: getattr(recorded, name) for name in ReferenceSet.__dataclass_fields__}
    other = ReferenceSet(**(facts | {"model": {"sha256": {"unet": "0"}}, "environment": {"torch": "1.0"}}))
    notes = " ".join(imagegen.compare(other, model).notes)
    assert "other weights" in notes and "recorded with torch 1.0" in notes


def test_an_empty_set_is_refused(model, tmp_path):
    with pytest.raises(DataError, match="holds no pictures"):
        imagegen.compare(ReferenceSet(tmp_path, "imagegen", {}, None, {}, None, []), model)


def trial_of(*values):
    return Trial("p", measured=[{"psnr_db": value} for value in values])


def test_the_mean_is_that_of_the_squared_errors():
    assert decibels(mean_square(37.5)) == pytest.approx(37.5)
    assert trial_of(math.inf, 30.0).mean() == pytest.approx(30 + 10 * math.log10(2))


@pytest.mark.parametrize(
    ("worst", "budget", "says"),
    [(math.inf, None, "identical"), (86.0, None, "within the noise floor"), (55.0, None, "no difference to the eye"),
     (35.0, None, "small differences"), (20.0, None, "another picture"), (35.0, 30, "inside the budget"),
     (29.0, 30, "outside the budget")],
)  # fmt: skip
def test_verdicts_in_words(worst, budget, says):
    assert says in judge(trial_of(worst), 90.0, "float32", budget)
