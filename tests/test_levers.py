"""Every lever proves that it engaged, counts right, is undone exactly, and leaves nothing behind for the next picture."""

import copy
import itertools
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from tiny import ONE_BLOCK, FluxBench, ModelBench, make_unet

from imagegen.catalog import embedded_folder
from imagegen.levers import LEVERS, Lever, Target, blocks, compute, kernels, steps
from imagegen.levers.lever import Patches, RunFacts
from imagegen.request import PlanError
from imagegen.speed import AppliedPlan, Plan, find_plan, make_lever

FLUX_CACHES = ["first-block-cache(threshold=1e9)", "taylorseer-cache", "mag-cache(ratios=(1.0, 1.0))", "step-cache(order=1)"]
UNET_CACHES = [
    "step-cache",
    "deep-cache",
    "guidance-cache(warmup=3)",
    "guidance-interval(stop=0.5)",
    "step-cache(interval=3, order=2) + deep-cache(warmup=1) + guidance-cache(warmup=2, order=1) + prompt-cache",
]


@pytest.fixture(scope="module")
def emoji(model):
    return ModelBench(model)


@pytest.fixture(scope="module")
def unet(model):
    return make_unet(model)


@pytest.fixture(scope="module")
def flux():
    return FluxBench()


@pytest.fixture(scope="module")
def benches(emoji, unet, flux):
    return {"emoji": emoji, "unet": unet, "flux": flux}


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory):
    """The folder of a small decoder with three upsamplings and random weights."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("tiny decoder (+ 'quotes')")  # a path that plans have to quote
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**widths, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture(autouse=True)
def exact_afterwards(benches):
    yield
    for bench in benches.values():
        bench.set_plan("exact")


@pytest.fixture
def kernels_allowed(monkeypatch):
    """Let the levers of our own kernels engage without CUDA: the ops compute by torch there."""
    monkeypatch.setattr(kernels, "why_not", lambda needed, device: None)


def linears(bench):
    found = (module for module in bench.denoiser.modules() if isinstance(module, torch.nn.Linear))
    return sum(min(module.in_features, module.out_features) >= 32 for module in found)


def convolutions(bench):
    found = (module for module in bench.denoiser.modules() if isinstance(module, torch.nn.Conv2d))
    return sum(module.kernel_size != (1, 1) for module in found)


def norms(bench, num_steps):
    """Return how often a norm with SiLU behind it and a norm alone are computed for a picture."""
    found = Counter()
    for part, calls in ((bench.denoiser, num_steps), (bench.pipeline.vae.decoder, 1)):
        for name, module in part.named_modules():
            if isinstance(module, torch.nn.GroupNorm):
                found["resnets" in name or name.endswith("conv_norm_out")] += calls
    return found


def int8_layers(bench):
    found = [name for name, module in bench.denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
    return len([name for name in found if not any(part in name for part in ("time_embedding", "time_emb_proj", "add_embedding"))])


# bench, plan, what to draw, and what the report must say, from counts made without the lever
CASES = {
    "threads": ("emoji", "threads(count=2)", {}, "1 runs on 2 threads instead of 1"),
    "fewer-steps": ("emoji", "fewer-steps(num_steps=4)", {"num_steps": None}, "1 runs of 4 steps"),
    "int8-dynamic": ("emoji", "int8-dynamic", {"num_steps": 4}, "{linears} layers quantised, 4 denoiser calls"),
    "int8-weight-only": ("emoji", "int8-weight-only", {"num_steps": 4}, "{linears} layers quantised, 4 denoiser calls"),
    "channels-last": ("emoji", "channels-last", {"num_steps": 4}, "{convolutions} weights laid out, 4 denoiser calls"),
    "int8-fused": (
        "emoji",
        "int8-fused(min_features=32)",
        {"num_steps": 4},
        "{int8_layers} layers quantised, 4 denoiser calls",
    ),
    "fused-norm": ("emoji", "fused-norm", {"num_steps": 4}, "{silu} norms with SiLU computed, {alone} norms computed"),
    "prompt-cache": ("emoji", "prompt-cache", {"num_steps": 2}, ""),
    "decode-slicing": ("emoji", "decode-slicing", {"num_images": 2, "num_steps": 2}, "1 batches decoded, 2 decoder calls"),
    "decode-tiling": ("emoji", "decode-tiling(tile_px=64)", {"size": 96, "num_steps": 2}, "1 batches decoded, 4 decoder calls"),
    "tiny-decoder": ("emoji", "tiny-decoder(folder={folder})", {"num_steps": 2}, "1 batches decoded small"),
    "deep-cache": ("emoji", "deep-cache", {}, "10 deep blocks skipped"),
    "guidance-cache": ("emoji", "guidance-cache(warmup=3)", {}, "2 half steps skipped"),
    "guidance-interval": ("emoji", "guidance-interval(stop=0.5)", {}, "4 half steps skipped"),
    "step-cache": ("emoji", "step-cache", {}, "6 steps computed, 2 steps skipped"),
    "first-block-cache": ("flux", "first-block-cache(threshold=1e9)", {}, "21 of 32 attentions skipped"),
    "taylorseer-cache": ("flux", "taylorseer-cache", {}, "12 of 32 attentions skipped"),
    "mag-cache": ("flux", "mag-cache(ratios=(1.0, 1.0))", {}, "20 of 32 attentions skipped"),
    "attention": ("flux", "attention(backend=_native_math)", {}, "4 processors changed, 8 denoiser calls"),
    "openvino": (
        "unet",
        "openvino",
        {"num_steps": 3},
        "1 denoiser compilations, 3 denoiser calls, 1 decoder compilations, 1 decoder calls",
    ),
}
# What does the work is `apply`, but for these.
MUTATIONS = {
    "threads": ("begin", lambda self, run: setattr(self, "before", torch.get_num_threads())),
    "fewer-steps": ("default_settings", lambda self, given: {}),
    **{name: ("begin", lambda self, run: None) for name in ("first-block-cache", "taylorseer-cache", "mag-cache")},
}


def prepare(name, benches, folder):
    kind, plan, settings, did = CASES[name]
    bench = benches[kind]
    plan = plan.replace("{folder}", repr(str(folder)))
    counts = {"linears": linears(bench), "convolutions": convolutions(bench), "int8_layers": int8_layers(bench)}
    silu = norms(bench, settings.get("num_steps") or 0)
    return bench, plan, settings, did.format(**counts, silu=silu[True], alone=silu[False])


@pytest.mark.parametrize("name", CASES)
def test_engages_with_the_right_counts_and_is_undone_exactly(benches, tiny_decoder, kernels_allowed, name):
    bench, plan, settings, did = prepare(name, benches, tiny_decoder)
    before, kept = bench.draw(**settings), bench.snapshot()
    bench.set_plan(plan)
    assert not bench.report()[0]["engaged"], "nothing was drawn yet"
    during = bench.draw(**settings)
    if name == "prompt-cache":  # the first picture fills it
        assert not bench.report()[0]["engaged"]
        bench.draw(**settings)
        did = "2 encodings reused"  # the prompt and the negative one
    report = bench.report()[0]
    assert report["engaged"] and report["did"] == did
    assert during.std() > 0 and np.isfinite(during).all()
    if LEVERS[name].exact:
        assert abs(during - before).max() <= 2
    elif name not in ("channels-last", "openvino", "attention", "decode-tiling", "fewer-steps", "fused-norm"):
        assert (during != before).any(), "it changed nothing"
    bench.set_plan("exact")
    assert bench.snapshot() == kept
    np.testing.assert_array_equal(bench.draw(**settings), before)


@pytest.mark.parametrize("name", CASES)
def test_a_lever_that_does_nothing_is_not_engaged(benches, tiny_decoder, kernels_allowed, name, monkeypatch):
    bench, plan, settings, _ = prepare(name, benches, tiny_decoder)
    method, nothing = MUTATIONS.get(name, ("apply", lambda self, target: None))
    monkeypatch.setattr(LEVERS[name], method, nothing)
    if method == "begin" and name != "threads":
        monkeypatch.setattr(LEVERS[name], "end", lambda self: None)
    bench.set_plan(plan)
    for _ in range(2 if name == "prompt-cache" else 1):
        bench.draw(**settings)
    assert bench.report()[0]["engaged"] is False


def test_every_lever_has_its_case():
    need_hardware = {"bf16", "fp16", "fp8", "model-offload", "group-offload", "layerwise-casting", "sea-cache"}
    elsewhere = {"cuda-graph", "step-graph", "text-offload", "context-parallel", "student"}  # each in a file of its own
    assert set(CASES) | need_hardware | elsewhere | {"compile"} == set(LEVERS)


@pytest.mark.parametrize(
    ("plan", "way_out"),
    [
        ("fp16", "use bf16"),
        ("fp8", "use int8-dynamic"),
        ("model-offload", "leave it out"),
        ("group-offload", "leave it out"),
        ("layerwise-casting", "leave it out"),
        ("sea-cache", "use first-block-cache or step-cache"),
        ("first-block-cache", "use step-cache"),
        ("taylorseer-cache", "use step-cache"),
        ("mag-cache", "calibrate"),
        ("mag-cache(ratios=(1.0,))", "use step-cache"),
        ("attention", "leave attention out"),
        ("attention(backend=magic)", "no attention backend 'magic'"),
        ("threads(count=0)", "from 1"),
        ("fewer-steps(num_steps=0)", "at least one"),
        ("fewer-steps(scheduler=magic)", "it takes"),
        ("prompt-cache(size=0)", "from 1"),
        ("deep-cache(depth=9)", "depth from 1"),
        ("deep-cache(order=1)", "order 0"),
        ("step-cache(interval=1)", "interval from 2"),
        ("step-cache(order=3)", "order 0, 1 or 2"),
        ("guidance-interval(start=0.9)", "start < stop"),
        ("decode-tiling(tile_px=8)", "at least 32"),
        ("tiny-decoder", "needs the folder"),
        ("tiny-decoder(folder=/nowhere)", "needs the folder"),
        ("openvino(precision=f8)", "f32 or bf16"),
        ("int8-dynamic(min_features=100000)", "none of 100000 features"),
        ("int8-fused(min_features=32)", "need a CUDA device, and the model is on cpu; use int8-dynamic"),
        ("int8-fused", "none of 512 features"),
        ("fused-norm", "need a CUDA device, and the model is on cpu; leave it out"),
    ],
)
def test_what_cannot_engage_says_the_way_out(unet, plan, way_out):
    kept = unet.snapshot()
    with pytest.raises(PlanError) as caught:
        unet.set_plan(plan)
    assert way_out in str(caught.value)
    assert unet.snapshot() == kept and unet.model.plan.name == "exact"


@pytest.mark.parametrize(
    ("plan", "way_out"),
    [
        ("deep-cache", "use step-cache"),
        ("guidance-cache", "as those with a UNet do"),
        ("guidance-interval", "as those with a UNet do"),
        ("channels-last", "leave it out"),
        ("prompt-cache", "no text encoder"),
        ("attention", "on a CPU"),
        ("sea-cache", "use first-block-cache"),
    ],
)
def test_what_a_transformer_cannot_do_says_the_way_out(flux, plan, way_out):
    with pytest.raises(PlanError) as caught:
        flux.set_plan(plan)
    assert way_out in str(caught.value)


def test_another_kind_of_decoder_is_no_tiny_one(unet):
    with pytest.raises(PlanError, match="AutoencoderTiny"):  # diffusers would fill one with random weights
        unet.set_plan(f"tiny-decoder(folder={str(embedded_folder() / 'vae')!r})")


def test_guidance_that_is_an_input_has_no_halves(model):
    distilled = make_unet(model, time_cond_proj_dim=8)
    with pytest.raises(PlanError, match="both halves"):
        distilled.set_plan("guidance-interval")


def test_conflicts_are_symmetric():
    for name, lever in LEVERS.items():
        assert name not in lever.conflicts and lever.conflicts <= set(LEVERS)
        for other in lever.conflicts:
            assert name in LEVERS[other].conflicts, f"{name} refuses {other}, which does not refuse it"


@pytest.mark.parametrize(
    ("one", "other"), [pair for pair in itertools.combinations(LEVERS, 2) if pair[1] in LEVERS[pair[0]].conflicts]
)
def test_conflicting_levers_are_refused(one, other):
    for plan in (f"{one} + {other}", f"{other} + {one}"):
        with pytest.raises(PlanError, match="cannot be combined"):
            find_plan(plan, "emoji")


# Which steps are computed, seen by the model's own layers and not by the lever.


def computed_steps(bench, layer, **settings):
    """Return the step of every call that reached a layer, and the batch it came with."""
    found, at = [], [0]
    handle = layer.register_forward_hook(lambda _module, inputs, _output: found.append((at[0], len(inputs[0]))))

    def on_step(*state):
        at[0] = (state[-1] if isinstance(state[-1], int) else state[-1].index) + 1

    try:
        bench.draw(on_step=on_step, **settings)
    finally:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("plan", "computed"),
    [
        ("step-cache", [0, 1, 2, 4, 6, 7]),
        ("step-cache(warmup=1, interval=3, order=2)", [0, 3, 6, 7]),
        ("step-cache(warmup=8)", [*range(8)]),
    ],
)
def test_step_cache_computes_these_steps(unet, plan, computed):
    before = unet.draw()
    unet.set_plan(plan)
    assert computed_steps(unet, unet.denoiser.conv_in) == [(step, 2) for step in computed]
    if len(computed) == 8:
        np.testing.assert_array_equal(unet.draw(), before)
        assert unet.report()[0]["engaged"] is False


def test_deep_cache_computes_the_outer_block_always(unet):
    unet.set_plan("deep-cache")
    assert [step for step, _ in computed_steps(unet, unet.denoiser.down_blocks[0].resnets[0])] == [*range(8)]
    assert [step for step, _ in computed_steps(unet, unet.denoiser.mid_block.resnets[0])] == [0, 1, 2, 4, 6, 7]


@pytest.mark.parametrize(
    ("plan", "rows"),
    [
        ("guidance-cache(warmup=3)", [4, 4, 4, 2, 4, 2, 4, 4]),
        ("guidance-interval(start=0.25, stop=0.75)", [2, 2, 4, 4, 4, 4, 2, 2]),
    ],
)
def test_guidance_is_computed_on_these_steps(unet, plan, rows):
    unet.set_plan(plan)
    assert computed_steps(unet, unet.denoiser.conv_in, num_images=2) == [*enumerate(rows)]


@pytest.mark.parametrize("plan", ["guidance-cache(warmup=1)", "guidance-interval(stop=0.1)"])
def test_without_guidance_there_is_nothing_to_leave_out(unet, plan):
    before = unet.draw(guidance=1.0, num_images=2)  # two rows, which are no halves
    unet.set_plan(plan)
    np.testing.assert_array_equal(unet.draw(guidance=1.0, num_images=2), before)
    assert unet.report()[0]["engaged"] is False


@pytest.mark.parametrize(
    ("plan", "computed"), [(FLUX_CACHES[0], [0]), (FLUX_CACHES[1], [0, 1, 2, 4, 7]), (FLUX_CACHES[2], [0, 1, 5])]
)
def test_transformer_caches_compute_these_steps(flux, plan, computed):
    flux.set_plan(plan)
    deep = flux.denoiser.transformer_blocks[1].attn.to_q
    assert [step for step, _ in computed_steps(flux, deep)] == computed


def test_attention_is_computed_by_the_backend_named(flux, monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    backends, called = dispatch._AttentionBackendRegistry._backends, []
    own = backends[dispatch.AttentionBackendName._NATIVE_MATH]
    monkeypatch.setitem(backends, dispatch.AttentionBackendName._NATIVE_MATH, lambda *a, **k: called.append(1) or own(*a, **k))
    flux.set_plan("attention(backend=_native_math)")
    flux.draw(num_steps=3)
    assert len(called) == 3 * 4
    flux.set_plan("exact")
    flux.draw(num_steps=3)
    assert len(called) == 3 * 4


@pytest.mark.parametrize("order", [0, 1, 2])
def test_extrapolation_continues_polynomials_exactly(order):
    series = {step: torch.tensor(float(sum((step + 1) ** power for power in range(order + 1)))) for step in (0, 1, 3, 7)}
    history = [(step, series[step]) for step in (0, 1, 3)[: order + 1]]
    expected = series[7] if order else series[0]
    assert float(steps.extrapolate(history, 7)) == pytest.approx(float(expected))


# What is kept between steps never reaches another picture.


def fresh(kind, model):
    return make_unet(model) if kind == "unet" else FluxBench()


@pytest.mark.parametrize("disturbance", ["exception", "stop", "size", "lora"])
@pytest.mark.parametrize(
    ("kind", "plan"),
    [("unet", plan) for plan in UNET_CACHES]
    + [("flux", plan) for plan in FLUX_CACHES]
    + [("flux", f"int8-weight-only + {FLUX_CACHES[0]}"), ("unet", "int8-dynamic + deep-cache + channels-last")],
)
def test_caches_are_clean_after_a_disturbance(model, kind, plan, disturbance):
    bench, reference = fresh(kind, model), fresh(kind, model)
    bench.set_plan(plan)
    if disturbance == "exception":
        bench.raise_in(4)
    elif disturbance == "stop":
        bench.stop_in(4)
    elif disturbance == "size":
        bench.draw(size=96)
    else:
        bench.draw()
        bench.add_lora()
        reference.add_lora()
    reference.set_plan(plan)
    np.testing.assert_array_equal(bench.draw(), reference.draw())
    assert all(lever["engaged"] for lever in bench.report() if not lever["lever"].startswith("prompt-cache"))
    kept = reference.snapshot()[0].values()
    reference.set_plan("exact")  # the last one first: the two share their text encoder
    bench.set_plan("exact")
    assert [*bench.snapshot()[0].values()] == [*reference.snapshot()[0].values()] != [*kept]


@pytest.mark.parametrize("plan", UNET_CACHES[:4])
def test_the_pipeline_alone_is_stock_between_runs(model, plan):
    """Whoever calls `model.pipeline` is in no run, so that no step counts."""
    bench = make_unet(model)

    def stock():
        settings = {"width": 64, "height": 64, "num_inference_steps": 6, "output_type": "np"}
        return bench.pipeline("a red heart", **settings, generator=torch.Generator().manual_seed(1)).images

    before = stock()
    bench.set_plan(plan)
    np.testing.assert_array_equal(stock(), before)
    bench.stop_in(4)
    np.testing.assert_array_equal(stock(), before)
    bench.draw()
    np.testing.assert_array_equal(stock(), before)


# Weights that change.


@pytest.mark.parametrize(
    "plan",
    ["int8-dynamic", "int8-weight-only", "int8-fused(min_features=32)", "fused-norm", "channels-last", "openvino"],
)
def test_the_picture_follows_the_weights(model, unet, kernels_allowed, plan):
    unet = make_unet(model, **ONE_BLOCK) if plan == "openvino" else unet  # the other takes long to trace
    weight = unet.denoiser.conv_in.weight
    kept = weight.detach().clone()
    unet.set_plan(plan)
    before = unet.draw(num_steps=3)
    try:
        with torch.no_grad():
            weight.add_(0.3)
        changed = unet.draw(num_steps=3)
        assert (changed != before).any()
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    np.testing.assert_array_equal(unet.draw(num_steps=3), before)
    unet.set_plan("exact")
    with torch.no_grad():
        weight.add_(0.3)
    followed = abs(unet.draw(num_steps=3) - changed)
    with torch.no_grad():
        weight.copy_(kept)
    assert np.median(followed) <= (4 if plan.startswith("int8") else 0)


@pytest.mark.parametrize("plan", ["int8-weight-only", "int8-fused(min_features=32)"])
def test_the_picture_follows_a_lora_as_it_is_switched_scaled_and_fused(model, kernels_allowed, plan):
    """None of these counts as a change of a weight in torch."""
    bench = make_unet(model)
    bench.set_plan(plan)
    without = bench.draw(num_steps=3)
    bench.add_lora()
    whole = bench.draw(num_steps=3)
    assert (whole != without).any()
    bench.denoiser.disable_adapters()
    np.testing.assert_array_equal(bench.draw(num_steps=3), without)
    bench.denoiser.enable_adapters()
    np.testing.assert_array_equal(bench.draw(num_steps=3), whole)
    bench.denoiser.set_adapters("default", 0.25)
    assert (bench.draw(num_steps=3) != whole).any()
    bench.denoiser.set_adapters("default", 1.0)
    bench.denoiser.fuse_lora()
    fused = bench.draw(num_steps=3)
    bench.set_plan("exact")
    bench.set_plan(plan)
    np.testing.assert_array_equal(fused, bench.draw(num_steps=3))


def test_the_prompt_cache_follows_the_text_encoder(emoji):
    emoji.set_plan("prompt-cache")
    before = emoji.draw(num_steps=2)
    weight = emoji.pipeline.text_encoder.embeddings.word_embeddings.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)))
        changed = emoji.draw(num_steps=2)
        emoji.set_plan("exact")
        np.testing.assert_array_equal(changed, emoji.draw(num_steps=2))
        assert (changed != before).any()
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_another_decoder_gets_the_plan_too(model):
    bench = make_unet(model)
    bench.set_plan("decode-slicing")
    bench.draw(num_steps=2)
    before, bench.pipeline.vae = bench.pipeline.vae, make_unet(model).pipeline.vae
    bench.draw(num_steps=2, num_images=2)
    assert bench.report()[0]["did"] == "1 batches decoded, 2 decoder calls"
    assert before.use_slicing is False and "decode" not in vars(before)


def test_weights_that_a_lever_moves_are_no_new_ones(unet, monkeypatch):
    applied = []

    class Wandering(Lever):
        name = "wandering"
        moves_weights = True

        def apply(self, target):
            applied.append(target.denoiser)

        def end(self):
            for weight in applied[-1].parameters():
                weight.data = weight.data.clone()

    monkeypatch.setitem(LEVERS, "wandering", Wandering)
    unet.set_plan(Plan("wandering", ("wandering",)))
    for _ in range(3):
        unet.draw(num_steps=1)
    assert len(applied) == 1


# OpenVINO, bfloat16 and compilers.


def test_openvino_computes_any_size_and_batch(model, unet):
    """A side of 9 latents cannot be halved, and the UNet takes another branch."""
    requests = [{"size": 64}, {"size": 72}, {"size": 72, "num_images": 2}]
    wanted = [unet.draw(num_steps=2, **request) for request in requests]
    unet.set_plan("openvino")
    for request, picture in zip(requests, wanted, strict=True):
        assert abs(unet.draw(num_steps=2, **request) - picture).max() <= 2
    assert "3 denoiser compilations" in unet.report()[0]["did"]


def test_openvino_reports_to_no_server(model, monkeypatch):
    from openvino_telemetry.main import Telemetry

    sent = []
    monkeypatch.setattr(Telemetry, "send_event", lambda self, *event, **settings: sent.append(event))
    bench = make_unet(model, **ONE_BLOCK)
    bench.set_plan("openvino")
    bench.draw(num_steps=1)
    assert bench.report()[0]["engaged"] and sent == []


def test_openvino_takes_float32_models(model):
    bench = make_unet(model)
    bench.denoiser.to(torch.bfloat16)
    with pytest.raises(PlanError, match="load it with dtype='float32'"):
        bench.set_plan("openvino")
    with pytest.raises(PlanError, match="in bfloat16 already"):
        bench.set_plan("bf16")


@pytest.mark.parametrize("plan", ["bf16", "openvino(precision=bf16)"])
def test_bf16_needs_its_instructions(unet, plan, monkeypatch):
    monkeypatch.setattr(compute, "has_fast_bf16", lambda device: False)
    with pytest.raises(PlanError, match="no bfloat16 instructions"):
        unet.set_plan(plan)


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_bf16_engages_and_is_undone(benches, kind, monkeypatch):
    monkeypatch.setattr(compute, "has_fast_bf16", lambda device: True)
    bench = benches[kind]
    before, kept = bench.draw(num_steps=2), bench.snapshot()
    bench.set_plan("bf16")
    during, seen = bench.draw(num_steps=2), {weight.dtype for weight in bench.denoiser.parameters()}
    assert bench.report()[0]["did"] == "2 denoiser calls" and seen == {torch.float32}
    assert (during != before).any()
    bench.set_plan("exact")
    assert bench.snapshot() == kept
    np.testing.assert_array_equal(bench.draw(num_steps=2), before)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler here")
def test_compiles_once_follows_the_weights_and_is_undone(model):
    """On a UNet of one block: the embedded model's takes a minute, and shows no more."""
    bench = make_unet(model, **ONE_BLOCK)
    before, kept = bench.draw(num_steps=4), bench.snapshot()
    bench.set_plan("compile")
    during = bench.draw(num_steps=4)
    bench.draw(num_steps=6, prompt="a green leaf on the moon")
    assert bench.report()[0]["did"] == "1 graphs compiled, 10 compiled calls"
    assert abs(during - before).max() <= 2

    weight = bench.denoiser.conv_in.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight.add_(0.3)
    changed = bench.draw(num_steps=4)
    with torch.no_grad():
        weight.copy_(original)
    assert (changed != during).any()
    np.testing.assert_array_equal(bench.draw(num_steps=4), during)
    bench.set_plan("exact")
    assert bench.snapshot() == kept
    np.testing.assert_array_equal(bench.draw(num_steps=4), before)
    with torch.no_grad():
        weight.add_(0.3)
    assert abs(bench.draw(num_steps=4) - changed).max() <= 2


def test_compile_that_does_nothing_is_not_engaged(unet, monkeypatch):
    monkeypatch.setattr(compute.shutil, "which", lambda name: "/usr/bin/c++")
    monkeypatch.setattr(compute.Compile, "apply", lambda self, target: None)
    unet.set_plan("compile")
    unet.draw(num_steps=1)
    assert unet.report()[0]["engaged"] is False


def test_compile_needs_a_compiler(unet, monkeypatch):
    monkeypatch.setattr(compute.shutil, "which", lambda name: None)
    with pytest.raises(PlanError, match="install g"):
        unet.set_plan("compile")


# Our own kernels, computed by torch here: the wiring is what these show. `test_kernels` has the kernels.


NORM_BOUND = 5e-6  # of a whole network: one norm is within 1e-6, and convolutions add up in another order


def denoise(bench):
    draw = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 16, 16, generator=draw)
    with torch.no_grad():
        return bench.denoiser(latents, torch.tensor(500), torch.randn(2, 77, 384, generator=draw), return_dict=False)[0]


def denoise_flux(bench):
    draw = torch.Generator().manual_seed(5)
    inputs = {
        "hidden_states": torch.randn(1, 16, 16, generator=draw),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=draw),
        "pooled_projections": torch.randn(1, 32, generator=draw),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    with torch.no_grad():
        return bench.denoiser(**inputs, return_dict=False)[0]


def decode(bench):
    with torch.no_grad():
        return bench.pipeline.vae.decode(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))).sample


def relative_error(output, wanted):
    return float((output - wanted).norm() / wanted.norm())


def assert_plan_keeps(bench, plan, compute, bound):
    """Assert that a plan's output is within a relative error of the exact one, and that undoing brings this back."""
    wanted = compute(bench)
    bench.set_plan(plan)
    found = compute(bench)
    bench.set_plan("exact")
    assert torch.equal(compute(bench), wanted)
    print(f"{plan}: relative error {relative_error(found, wanted):.2g}")
    assert relative_error(found, wanted) < bound
    return found


@pytest.mark.parametrize("compute", [denoise, decode])
def test_fused_norms_compute_the_same(unet, kernels_allowed, compute):
    assert_plan_keeps(unet, "fused-norm", compute, NORM_BOUND)
    assert_plan_keeps(unet, "channels-last + fused-norm", compute, NORM_BOUND)


@pytest.mark.parametrize("compute", [denoise, decode])
@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("norm", lambda x, *settings: x.clone()),
        ("norm", lambda x, groups, weight, bias, eps, silu: torch.nn.functional.group_norm(x, groups, weight, bias, eps)),
        ("_pass_on", lambda compute, passed: compute),
    ],
    ids=["no norm", "no SiLU", "SiLU twice"],
)
def test_wrong_norms_are_found_out(unet, kernels_allowed, monkeypatch, name, mutant, compute):
    monkeypatch.setattr(kernels, name, mutant)
    with pytest.raises(AssertionError):
        assert_plan_keeps(unet, "fused-norm", compute, NORM_BOUND)


def test_the_other_inputs_of_an_activation_are_not_passed_on(unet, kernels_allowed, monkeypatch):
    monkeypatch.setattr(kernels, "_pass_on", lambda compute, passed: lambda x: x)
    with pytest.raises(AssertionError):  # the embedding of the time step lacks its SiLU
        assert_plan_keeps(unet, "fused-norm", denoise, NORM_BOUND)


def test_norms_before_a_scale_and_shift_are_no_pairs(model, kernels_allowed):
    bench = make_unet(model, resnet_time_scale_shift="scale_shift")
    assert_plan_keeps(bench, "fused-norm", denoise, NORM_BOUND)


@pytest.mark.parametrize(
    ("kind", "compute", "epilogues"),
    [("unet", denoise, {"none", "geglu"}), ("flux", denoise_flux, {"none", "gelu-tanh"})],
)
def test_int8_layers_stay_close(benches, kernels_allowed, monkeypatch, kind, compute, epilogues):
    seen = set()
    own = kernels.multiply
    monkeypatch.setattr(kernels, "multiply", lambda *args: seen.add(args[5]) or own(*args))
    bench = benches[kind]
    exact = compute(bench)
    assert not torch.equal(assert_plan_keeps(bench, "int8-fused(min_features=32)", compute, 0.02), exact)
    assert seen == epilogues


def without_epilogue(*args):
    return own_multiply(*args[:5], "none", None, None, args[8])


def without_scales(x, x_scale, *args):
    return own_multiply(x, torch.ones_like(x_scale), *args)


own_multiply = kernels.multiply


@pytest.mark.parametrize("mutant", [lambda x, s, w, *_: x.new_zeros(len(x), len(w), dtype=torch.float32), without_epilogue,
                                    without_scales], ids=["nothing", "no epilogue", "no scales"])  # fmt: skip
@pytest.mark.parametrize(("kind", "compute"), [("unet", denoise), ("flux", denoise_flux)])
def test_wrong_int8_layers_are_found_out(benches, kernels_allowed, monkeypatch, kind, compute, mutant):
    monkeypatch.setattr(kernels, "multiply", mutant)
    with pytest.raises(AssertionError):
        assert_plan_keeps(benches[kind], "int8-fused(min_features=32)", compute, 0.02)


def test_a_kernel_that_failed_its_check_refuses_the_lever(unet, monkeypatch):
    monkeypatch.setattr(kernels, "may_run", lambda kernel, device: (kernel.name != "int8_linear", "it computes wrongly"))
    with pytest.raises(PlanError, match="it computes wrongly; use int8-dynamic"):
        unet.set_plan("int8-fused(min_features=32)")


def test_diffusers_gelu_takes_its_epilogue():
    from diffusers.models.attention import FeedForward

    torch.manual_seed(0)
    for activation, approximate in (("gelu", "gelu-erf"), ("gelu-approximate", "gelu-tanh")):
        stock = torch.nn.Sequential(FeedForward(64, activation_fn=activation)).eval()
        changed = copy.deepcopy(stock)
        kernels.Int8Fused(min_features=32).change(changed)
        assert changed[0].net[0].epilogue == approximate
        x = torch.randn(3, 5, 64)
        with torch.no_grad():
            assert relative_error(changed(x), stock(x)) < 0.05


# The parts.


def test_patches_put_back_what_was_there_and_what_was_not():
    class Thing:
        pass

    thing, patches = Thing(), Patches()
    thing.own = 1
    patches.set(thing, "own", 2)
    patches.set(thing, "new", 3)
    patches.set(thing, "own", 4)
    patches.keep(thing, "later")
    thing.later = 5
    patches.undo()
    assert vars(thing) == {"own": 1}
    patches.undo()
    assert vars(thing) == {"own": 1}


def test_a_failing_lever_leaves_nothing(unet, monkeypatch):
    def fail(self, target):
        self.patches.set(target.denoiser, "forward", None)
        raise RuntimeError("half done")

    before, kept = unet.draw(num_steps=2), unet.snapshot()
    monkeypatch.setattr(steps.StepCache, "apply", fail)
    with pytest.raises(RuntimeError, match="half done"):
        unet.set_plan("int8-weight-only + deep-cache + step-cache")
    assert unet.snapshot() == kept
    np.testing.assert_array_equal(unet.draw(num_steps=2), before)


def test_mag_cache_knows_flux_and_needs_ratios_of_others(flux, unet):
    assert make_lever("mag-cache").requires(Target(flux.pipeline)) is None
    assert "calibrate" in make_lever("mag-cache").requires(Target(unet.pipeline))
    assert isinstance(AppliedPlan(find_plan("mag-cache", "flux"), FluxBench().pipeline).levers[0], blocks.MagCache)


@pytest.mark.parametrize(
    ("settings", "computed"),
    [({"warmup": 3}, [0, 1, 2, 4, 6, 8, 10, 11]), ({"warmup": 3, "late": 3}, [0, 1, 2, 4, 6, 9, 11]),
     ({"warmup": 2, "interval": 3, "late": 4}, [0, 1, 4, 7, 11])],
)  # fmt: skip
def test_the_schedule_grows_in_the_second_half(settings, computed):
    cache = LEVERS["step-cache"](**settings)
    cache.begin(RunFacts(True, 12))
    due = []
    for index in range(12):
        due += [index] if cache.is_due() else []
        cache.advance(index, 12)
    assert due == computed
