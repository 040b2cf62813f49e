"""A profile is read as it was written, and refused where it does not hold."""

import json
from dataclasses import asdict, replace

import pytest

import imagegen
from imagegen.measure import machine_of
from imagegen.profile import VERSION, Profile, read_profile
from imagegen.request import PlanError

PROFILE = Profile(
    version=VERSION,
    model={"source": "emoji", "family": "emoji", "sha256": {"unet/model.safetensors": "0" * 64}},
    machine={"device": "cpu (a processor)", "cores": 2, "kind": "x86_64"},
    environment={"torch": "2.13.0"},
    budget={"metric": "psnr_db", "bound": 40.0},
    request={"num_steps": 20, "guidance": 4.0, "width": 128, "height": 128, "num_images": 1},
    plan=["prompt-cache", "step-cache(interval=3)"],
    evidence={"n": 300, "worst": 41.5, "mean": 50.2, "failure_rate_below": 0.01, "margin": 1.5},
    speed={"plan_s": 0.5, "stock_s": 1.0, "ratio": 2.0},
    frontier=[{"plan": ["openvino"], "worst": 60.0}],
)


@pytest.fixture
def stored(tmp_path):
    return PROFILE.save(tmp_path / "new folder" / "profile.json")


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_is_read_as_it_was_written(stored):
    assert read_profile(stored) == read_profile(str(stored)) == PROFILE
    assert [path.name for path in stored.parent.iterdir()] == ["profile.json"]


def test_what_was_not_measured_may_be_missing(stored):
    data = asdict(PROFILE)
    for name in ("environment", "speed", "frontier"):
        del data[name]
    stored.write_text(json.dumps(data))
    assert read_profile(stored) == replace(PROFILE, environment={}, speed={}, frontier=[])


def test_infinite_numbers_become_null(tmp_path):
    endless = {"worst": float("inf"), "mean": [float("nan"), (float("-inf"), 1.5)], 7: True}
    path = replace(PROFILE, evidence=endless).save(tmp_path / "profile.json")
    assert read_profile(path).evidence == {"worst": None, "mean": [None, [None, 1.5]], "7": True}
    assert "Infinity" not in path.read_text() and "NaN" not in path.read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": VERSION + 1}, "newer than"),
        ({"version": "1"}, "no profile"),
        ({"plan": "step-cache"}, "no usable 'plan'"),
        ({"plan": [1]}, "damaged"),
        ({"model": None}, "no usable 'model'"),
        ({"model": {"source": "emoji"}}, "no hashes"),
        ({"machine": []}, "no usable 'machine'"),
        ({"evidence": None}, "no usable 'evidence'"),
    ],
)
def test_damaged_and_newer_ones_are_refused(stored, changes, message):
    change(stored, **changes)
    with pytest.raises(PlanError, match=message):
        read_profile(stored)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"profile"', "\x00\x01"])
def test_what_is_no_profile_is_refused(stored, text):
    stored.write_text(text)
    with pytest.raises(PlanError, match=r"profile\.json"):
        read_profile(stored)


def test_missing_ones_and_folders_are_refused(tmp_path):
    with pytest.raises(PlanError, match="imagegen tune writes one"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(PlanError, match="cannot be read"):
        read_profile(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"version": 1, "x": "\xe9"}')
    with pytest.raises(PlanError, match="cannot be read"):
        read_profile(tmp_path / "latin.json")


def test_other_weights_and_machines_are_refused():
    hashes, machine = PROFILE.model["sha256"], PROFILE.machine
    PROFILE.check_fits(hashes, machine)
    with pytest.raises(PlanError, match=r"other weights \(emoji\)"):
        PROFILE.check_fits(hashes | {"vae/model.safetensors": "1" * 64}, machine)
    with pytest.raises(PlanError, match="cores 2, here 64"):
        PROFILE.check_fits(hashes, machine | {"cores": 64})
    with pytest.raises(PlanError, match="another machine"):
        PROFILE.check_fits(hashes, {})


def test_a_write_that_fails_leaves_no_file_and_keeps_the_old_one(stored, monkeypatch, tmp_path):
    before = stored.read_text()

    def full(*_paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(PlanError, match="No space left on device; choose another path"):
        patched.setattr("imagegen.profile.os.replace", full)
        replace(PROFILE, plan=[]).save(stored)
    assert stored.read_text() == before and len([*stored.parent.iterdir()]) == 1
    with pytest.raises(PlanError, match="cannot write"):
        PROFILE.save(stored / "below a file.json")


def test_a_model_takes_its_own_profile_only(model, stored, tmp_path):
    with pytest.raises(imagegen.PlanError, match="other weights"):
        model.set_plan(stored)
    own = replace(PROFILE, model=PROFILE.model | {"sha256": model.hashes}, machine=machine_of(model.device))
    path = own.save(tmp_path / "own.json")
    try:
        for given in (path, str(path)):
            model.set_plan(given)
            assert model.plan.name == "profile own.json" and list(model.plan.levers) == PROFILE.plan
    finally:
        model.set_plan("exact")
    replace(own, plan=["no-such-lever"]).save(path)
    with pytest.raises(imagegen.PlanError, match="unknown lever 'no-such-lever'"):
        model.set_plan(path)
    assert model.plan.name == "exact"
