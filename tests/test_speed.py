"""Plans are read as they are written, applied in one order, undone whole, and never serve two runs at once."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FluxBench, ModelBench, make_unet

import imagegen
from imagegen.levers import LEVERS, compute
from imagegen.receipt import pixels_sha256
from imagegen.request import PlanError, RequestError
from imagegen.speed import EXACT, TIERS, AppliedPlan, Plan, find_plan, make_lever, native_attention


@pytest.fixture(scope="module")
def bench(model):
    return make_unet(model)


@pytest.fixture(autouse=True)
def exact_afterwards(model, bench):
    yield
    model.set_plan("exact")
    bench.set_plan("exact")


def draw_stream(bench, **changes):
    return bench.model.stream("a red heart", **({"seed": 1, "num_steps": 8, "width": 64, "height": 64} | changes))


def pixels(step):
    return np.asarray(step.result.images[0]).astype(int)[None]


# Reading.


def values(kind):
    """Return a strategy for values of a setting's kind."""
    numbers = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e299, max_value=1e299)
    if kind is int:
        return st.integers()
    if kind is float:
        return numbers
    if kind == tuple[float, ...]:
        return st.lists(numbers, max_size=4).map(tuple)
    text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20)
    plain = st.sampled_from(
        ["/a folder/with (1) bracket", "a+b", "a, b=c", "it's", "'", '"', "\\", "C:\\new", "None", "1", "(", ""]
    )
    return text | plain if kind is str else st.none() | text | plain


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_what_a_lever_writes_is_read_back(data):
    kind = LEVERS[data.draw(st.sampled_from(sorted(LEVERS)))]
    lever = kind(**{setting.name: data.draw(values(setting.type)) for setting in fields(kind)})
    again = make_lever(str(lever))
    assert again == lever and str(again) == str(lever)
    other = "threads" if kind.name != "threads" else "prompt-cache"
    try:
        plan = find_plan(f"{lever} + {other}", "emoji")
    except PlanError as error:
        assert "cannot be combined" in str(error)
    else:
        assert plan.levers == (str(lever), other)


@pytest.mark.parametrize("name", LEVERS)
def test_every_lever_has_a_plain_form(name):
    assert str(make_lever(name)) == str(make_lever(f" {name}() ")) == name


def test_plain_words_and_numbers_need_no_care():
    assert str(make_lever("openvino( precision = bf16 )")) == "openvino(precision=bf16)"
    assert str(make_lever("guidance-interval(start=0, stop=1)")) == "guidance-interval(stop=1.0)"
    assert make_lever("mag-cache(ratios=[1, 0.9])").ratios == (1, 0.9)
    assert make_lever("tiny-decoder(folder=/a/b c.d)").folder == "/a/b c.d"
    assert str(make_lever("fewer-steps(scheduler=None)")) == "fewer-steps"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warp-drive", "unknown lever 'warp-drive': there are threads, "),
        ("", "unknown lever ''"),
        ("step-cache(", "unknown lever"),
        ("step-cache)x(", "unknown lever"),
        ("step-cache(depth=1)", "no setting 'depth=1': it takes warmup, interval, late, order"),
        ("step-cache(3)", "no setting '3'"),
        ("step-cache(warmup=)", "no setting 'warmup='"),
        ("bf16(x=1)", "it takes none"),
        ("step-cache(warmup=3, warmup=4)", "names warmup twice"),
        ("step-cache(warmup=two)", "warmup must be of the kind int, got 'two'"),
        ("step-cache(warmup=2.5)", "kind int"),
        ("step-cache(warmup=True)", "kind int"),
        ("step-cache(warmup=1e400)", "kind int"),
        ("guidance-interval(stop=half)", "kind float"),
        ("guidance-interval(stop=nan)", "kind float"),
        ("guidance-interval(stop=1e400)", "kind float"),
        ("openvino(precision=16)", "kind str"),
        ("fewer-steps(scheduler=3)", r"str \| None"),
        ("mag-cache(ratios=abc)", "ratios must be"),
        ("mag-cache(ratios=(1, 'a'))", "ratios must be"),
        ("mag-cache(ratios={[]: 1})", "ratios must be"),
    ],
)
def test_levers_that_cannot_be_read(text, message):
    with pytest.raises(PlanError, match=message):
        make_lever(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warp", r"unknown plan 'warp': use exact, balanced, fast, turbo, a profile\.json, or levers joined by \+ \(threads, "),
        ("", "unknown plan ''"),
        ("step-cache + warp", "unknown lever 'warp'"),
        ("step-cache + ", "unknown lever ''"),
        ("warp(x=1)", r"unknown lever 'warp\(x=1\)'"),
        ("step-cache + step-cache(warmup=4)", "names step-cache twice"),
        ("compile + openvino", "cannot be combined with"),
    ],
)
def test_plans_that_cannot_be_read(bench, text, message):
    with pytest.raises(PlanError, match=message):
        find_plan(text, "emoji")
    with pytest.raises(PlanError, match=message):
        bench.set_plan(text)
    assert bench.model.plan == EXACT


def test_plans_are_found():
    assert find_plan("exact", "flux") is EXACT
    assert find_plan(" balanced ", "emoji") is TIERS["emoji"]["balanced"]
    assert find_plan("fast", "emoji").named is False
    named = find_plan("threads(count=2)+step-cache", "flux")
    assert named == Plan("threads(count=2)+step-cache", ("threads(count=2)", "step-cache")) and named.named
    assert find_plan(named, "emoji") is named
    with pytest.raises(PlanError, match="nothing was measured for 'flux'"):
        find_plan("fast", "flux")
    with pytest.raises(PlanError, match="names threads twice"):
        find_plan(Plan("own", ("threads", "threads")), "emoji")


@pytest.mark.parametrize("family", TIERS)
def test_every_tier_can_be_built(family):
    for name, plan in TIERS[family].items():
        assert plan.name == name and not plan.named
        assert [str(lever) for lever in plan.build()]


def test_levers_apply_in_one_order_whatever_the_order_named():
    names = ["step-cache", "deep-cache", "int8-weight-only", "channels-last", "threads", "prompt-cache"]
    for plan in (Plan("one", tuple(names)), Plan("other", tuple(reversed(names)))):
        stages = [lever.stage for lever in plan.build()]
        assert stages == sorted(stages)


@pytest.mark.parametrize(
    "levers",
    [
        ["step-cache(warmup=2)", "deep-cache(warmup=1)"],
        ["int8-weight-only", "channels-last", "guidance-cache(warmup=2)"],
        ["prompt-cache", "guidance-interval(stop=0.5)", "decode-slicing"],
    ],
)
def test_pictures_do_not_depend_on_the_order_named(bench, levers):
    pictures = []
    for named in (levers, levers[::-1]):
        bench.set_plan(" + ".join(named))
        pictures.append(bench.draw())
    np.testing.assert_array_equal(*pictures)


# What cannot engage.


def test_a_tier_records_what_cannot_engage_and_a_name_is_an_error(bench, monkeypatch):
    monkeypatch.setattr(compute, "find_spec", lambda name: None)
    bench.set_plan("balanced")
    picture = bench.model("a red heart", seed=1, num_steps=2, width=64, height=64).pictures[0]
    left_out = {
        "lever": "openvino",
        "engaged": False,
        "why_not": "openvino is not installed: pip install 'imagegen-diffusion[fast]'",
    }
    assert left_out in bench.report() and left_out in picture.receipt.plan["levers"]
    assert picture.receipt.plan["name"] == "balanced"
    for plan, needed in (("openvino + prompt-cache", "openvino"), ("int8-dynamic", "torchao")):
        with pytest.raises(PlanError, match=f"{needed}.*pip install"):
            bench.set_plan(plan)
        assert bench.model.plan.name == "balanced", "the old plan is kept"
    np.testing.assert_array_equal(bench.draw(num_steps=2), np.asarray(picture.image)[None])


def test_a_plan_that_fails_when_it_is_made_anew_fails_again(bench, monkeypatch):
    """The weights changed, and the lever cannot follow: every run says so, none goes on without it."""
    bench.set_plan("int8-weight-only")
    bench.draw(num_steps=1)
    weight = bench.denoiser.conv_in.weight
    with monkeypatch.context() as patched, torch.no_grad():
        weight.mul_(1.0)
        patched.setattr(compute, "find_spec", lambda name: None)
        for _ in range(2):
            with pytest.raises(PlanError, match="needs torchao"):
                bench.draw(num_steps=1)
    bench.draw(num_steps=1)
    assert bench.report()[0]["engaged"]


# The request.


@pytest.mark.parametrize(
    "plan",
    [
        "exact",
        "fewer-steps(num_steps=3)",
        "step-cache",
        "deep-cache + guidance-cache",
        "guidance-interval",
        "fewer-steps + step-cache",
    ],
)
def test_explicit_steps_win_in_every_plan(bench, plan):
    bench.set_plan(plan)
    steps = [*draw_stream(bench, num_steps=5)]
    assert len(steps) == 5 and steps[-1].result.pictures[0].receipt.request["num_steps"] == 5
    if "fewer-steps" in plan:
        assert bench.report()[0]["engaged"] is False


@pytest.mark.parametrize("unsaid", [{}, {"num_steps": None, "scheduler": None}])
def test_fewer_steps_are_recorded_in_the_request(bench, unsaid):
    bench.set_plan("fewer-steps(num_steps=3, scheduler=euler)")
    result = bench.model("a red heart", seed=1, width=64, height=64, **unsaid)
    request = result.pictures[0].receipt.request
    assert (request["num_steps"], request["scheduler"]) == (3, "euler")
    bench.set_plan("exact")
    np.testing.assert_array_equal(bench.draw(num_steps=3, scheduler="euler")[0], np.asarray(result.images[0]))


def test_an_explicit_scheduler_keeps_the_models_steps(bench):
    bench.set_plan("fewer-steps(num_steps=3, scheduler=euler)")
    request = bench.model("a red heart", seed=1, width=64, height=64, scheduler="unipc").pictures[0].receipt.request
    assert (request["num_steps"], request["scheduler"]) == (bench.model.family.num_steps, "unipc")


# Runs that overlap.


def test_a_plan_serves_one_run_at_a_time(bench):
    bench.set_plan("step-cache")
    alone = bench.draw()
    first, second = draw_stream(bench), draw_stream(bench, seed=2)
    for _ in range(4):
        next(first)
    with pytest.raises(RequestError, match="serves one run at a time"):
        next(second)
    with pytest.raises(RequestError, match="finish or close the other stream"):
        bench.draw()
    np.testing.assert_array_equal(pixels([*first][-1]), alone)
    np.testing.assert_array_equal(bench.draw(), alone)


def test_exact_runs_may_interleave(bench):
    alone = [bench.draw(seed=seed) for seed in (1, 2)]
    streams = [draw_stream(bench, seed=seed) for seed in (1, 2)]
    steps = [*zip(*streams, strict=True)]
    for step, picture in zip(steps[-1], alone, strict=True):
        np.testing.assert_array_equal(pixels(step), picture)


@pytest.mark.parametrize(
    ("running", "wanted"), [("exact", "step-cache"), ("step-cache", "exact"), ("step-cache", "int8-dynamic")]
)
def test_the_plan_stays_while_a_stream_runs(bench, running, wanted):
    bench.set_plan(running)
    alone = bench.draw()
    stream = draw_stream(bench)
    for _ in range(3):
        next(stream)
    with pytest.raises(PlanError, match="a run is still going"):
        bench.set_plan(wanted)
    assert bench.model.plan.name == running
    np.testing.assert_array_equal(pixels([*stream][-1]), alone)
    np.testing.assert_array_equal(bench.draw(), alone)
    stream = draw_stream(bench)
    next(stream)
    stream.close()
    bench.set_plan(wanted)
    assert bench.model.plan.name == wanted


def test_a_stream_takes_the_plan_under_which_it_begins(bench):
    waiting = draw_stream(bench)
    bench.set_plan("step-cache")
    step = [*waiting][-1]
    assert bench.report()[0]["did"] == "6 steps computed, 2 steps skipped"
    assert step.result.pictures[0].receipt.plan["levers"][0]["engaged"]
    np.testing.assert_array_equal(bench.draw(), pixels(step))
    waiting = draw_stream(bench)
    bench.set_plan("exact")
    np.testing.assert_array_equal(pixels([*waiting][-1]), bench.draw())


def test_a_plan_that_cannot_be_applied_leaves_the_old_one(bench):
    bench.set_plan("step-cache")
    before = bench.draw()
    with pytest.raises(PlanError, match="float16"):
        bench.set_plan("deep-cache + fp16")
    assert bench.model.plan.name == "step-cache"
    np.testing.assert_array_equal(bench.draw(), before)


# The reference.

REFERENCE = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
import imagegen
from imagegen.receipt import pixels_sha256
from tiny import FluxBench
picture = imagegen.load()("a red heart", seed=1, num_steps=4, width=64, height=64).images[0]
print(pixels_sha256(picture), hashlib.sha256(FluxBench().draw(num_steps=4).tobytes()).hexdigest())
"""


def test_a_reference_does_not_depend_on_what_the_process_did_before(model):
    """Levers of every kind, and another user of diffusers who changed attention for the whole process."""
    import hashlib

    from diffusers.models import attention_dispatch as dispatch

    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    command = [sys.executable, "-W", "ignore", "-c", REFERENCE, str(torch.get_num_threads())]
    fresh = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    emoji, flux = ModelBench(model), FluxBench()
    for plan in ("openvino + step-cache + prompt-cache", "channels-last + deep-cache + guidance-cache", "int8-dynamic"):
        emoji.set_plan(plan)
        emoji.draw(num_steps=4)
    emoji.set_plan("exact")
    for plan in ("first-block-cache(threshold=1e9)", "taylorseer-cache", "attention(backend=_native_math)", "exact"):
        flux.set_plan(plan)
        flux.draw(num_steps=4)
    registry, before = dispatch._AttentionBackendRegistry, dispatch._AttentionBackendRegistry._active_backend
    try:
        FluxBench().denoiser.set_attention_backend("_native_math")
        assert registry._active_backend.value == "_native_math", "diffusers changes it for all models"
        picture = model("a red heart", seed=1, num_steps=4, width=64, height=64).images[0]
        drawn = hashlib.sha256(flux.draw(num_steps=4).tobytes()).hexdigest()
        assert registry._active_backend.value == "_native_math", "and it is another's to change back"
    finally:
        registry._active_backend = before
    assert fresh.communicate()[0].split() == [pixels_sha256(picture), drawn] and fresh.returncode == 0


def test_native_attention_lasts_until_the_last_run_leaves():
    from diffusers.models import attention_dispatch as dispatch

    def active():
        return dispatch._AttentionBackendRegistry._active_backend.value

    with dispatch.attention_backend("_native_math"):
        native_attention.__enter__()
        native_attention.__enter__()
        native_attention.__exit__()
        assert active() == "native"
        native_attention.__exit__()
        assert active() == "_native_math"


def test_an_applied_plan_says_what_it_did(bench):
    applied = AppliedPlan(EXACT, bench.pipeline)
    assert applied.report() == [] and applied.default_settings() == {}
    assert imagegen.PlanError is PlanError
