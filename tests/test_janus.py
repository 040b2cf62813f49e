"""Both kinds of Janus as models like any other: loaded, asked, followed, stopped, remade, refused."""

import json
import os
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hub_cache import COMMIT, fill_cache
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend

import imagegen
from imagegen.catalog import embedded_folder
from imagegen.families import janus, janusflow
from imagegen.fidelity import max_difference, psnr_db

FIXTURES = Path(__file__).parent / "fixtures"
FLOW, PRO = FIXTURES / "janusflow-tiny", FIXTURES / "janus-pro-tiny"
PROMPT, LONGER = "a red ball", "a photo of a small blue house on 2 green hills, by the river"
SETTINGS = {"janusflow": {"num_steps": 6}, "janus-pro": {}}


@pytest.fixture(scope="module")
def flow():
    return imagegen.load(FLOW)


@pytest.fixture(scope="module")
def pro():
    return imagegen.load(PRO)


@pytest.fixture(params=["janusflow", "janus-pro"])
def either(request, flow, pro):
    return flow if request.param == "janusflow" else pro


def draw(model, prompt=PROMPT, **settings):
    return model(prompt, **(SETTINGS[model.family.name] | {"seed": 3} | settings))


def same(picture, other):
    return np.array_equal(np.asarray(picture), np.asarray(other))


@pytest.fixture
def copied(tmp_path):
    """Return a function that copies a fixture's own files, to be broken."""

    def copy(folder, *without):
        to = tmp_path / folder.name
        shutil.copytree(folder, to, ignore=shutil.ignore_patterns("expected", "safetensors", *without))
        return to

    return copy


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_given_noise_gives_the_references_picture(flow, guidance):
    tensors = load_file(FLOW / "expected" / "expected.safetensors")
    for index, prompt in enumerate((PROMPT, LONGER)):
        noise = tensors["z0"][index : index + 1]
        picture = flow(prompt, noise=noise, num_steps=6, guidance=guidance).images[0]
        expected = 127.5 * (tensors[f"p{index}.g{guidance:g}.image"][0].permute(1, 2, 0).numpy() + 1)
        assert np.abs(np.asarray(picture) - expected).max() < 0.51


def test_the_most_likely_codes_give_the_references_picture(pro):
    raw = load_file(PRO / "expected" / "expected.safetensors")["p0.greedy_image_raw"][0].clamp(-1, 1)
    picture = pro(PROMPT, temperature=0, seed=1).images[0]
    assert np.abs(np.asarray(picture) - 127.5 * (raw.permute(1, 2, 0).numpy() + 1)).max() < 0.51


def test_a_seed_is_what_a_generator_of_it_draws(flow, pro):
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    assert same(draw(flow, seed=7).images[0], draw(flow, noise=noise).images[0])
    expected = json.loads((PRO / "expected" / "expected.json").read_text())["prompts"][0]
    *_, last = pro.stream(expected["prompt"], seed=expected["seed"])
    assert last.latents.tolist() == [expected["sample_ids"]]


def test_defaults_are_the_familys(flow, pro):
    sizes = ("size_px", "min_px", "max_px", "num_steps", "guidance", "temperature")
    assert [getattr(flow.family, name) for name in sizes] == [64, 64, 64, 30, 2.0, None]
    assert [getattr(pro.family, name) for name in sizes] == [64, 64, 64, 4, 5.0, 1.0]
    assert draw(pro).pictures[0].receipt.request["temperature"] == 1.0


def test_streams_every_step_with_previews(either):
    steps = list(either.stream(PROMPT, seed=3, **SETTINGS[either.family.name]))
    count = {"janusflow": 6, "janus-pro": 4}[either.family.name]
    assert [(step.index, step.num_steps) for step in steps] == [(index, count) for index in range(count)]
    shapes = {"janusflow": [(1, 4, 8, 8)] * 6, "janus-pro": [(1, 4), (1, 8), (1, 12), (1, 16)]}
    assert [tuple(step.latents.shape) for step in steps] == shapes[either.family.name]
    assert {step.preview(0).size for step in steps} == {(64, 64)}
    assert same(steps[-1].result.images[0], draw(either).images[0])
    closeness = [psnr_db(step.preview(0), steps[-1].preview(0)) for step in steps[:-1]]
    assert closeness[-1] > closeness[0]


def test_leaving_the_stream_stops_the_work(either, monkeypatch):
    expected, calls = draw(either).images[0], []
    forward = either.pipeline.transformer.forward
    monkeypatch.setattr(either.pipeline.transformer, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    for step in either.stream(PROMPT, seed=3, **SETTINGS[either.family.name]):
        if step.index == 1:
            break
    del step
    assert len(calls) <= {"janusflow": 4, "janus-pro": 13}[either.family.name]
    assert same(draw(either).images[0], expected)


def test_a_picture_does_not_depend_on_its_batch(either):
    batch = draw(either, num_images=3).images
    for index in range(3):
        assert max_difference(draw(either, seed=3 + index).images[0], batch[index]) <= 2


def test_receipts_remake_their_pictures(either, tmp_path):
    result = draw(either, num_images=2, guidance=3.0)
    schema = json.loads((Path(imagegen.__file__).parent / "receipt.schema.json").read_text())
    for picture in result.pictures:
        jsonschema.validate(json.loads(picture.receipt.to_json()), schema)
    path = result.save(tmp_path)[1]
    verdict = imagegen.replay(path)
    assert verdict.same, verdict.reasons
    names = {"janusflow": {"model.safetensors", "vae/diffusion_pytorch_model.safetensors"}, "janus-pro": {"pytorch_model.bin"}}
    assert set(result.pictures[0].receipt.model["sha256"]) == names[either.family.name]


def test_temperature_is_replayed(pro, tmp_path):
    cold = draw(pro, temperature=0.0)
    assert not same(cold.images[0], draw(pro).images[0])
    assert imagegen.replay(cold.save(tmp_path)[0], model=pro).same
    assert "Temperature: 0" in cold.pictures[0].receipt.to_parameters()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"width": 512}, "makes pictures of 64x64 only, got width=512"),
        ({"height": 32, "width": 32}, "makes pictures of 64x64 only"),
        ({"scheduler": "euler"}, "takes no scheduler, got 'euler'"),
        ({"negative_prompt": "green"}, "takes no negative_prompt"),
        ({"image": "in.png"}, "image: no file"),
        ({"image": FLOW / "none.png"}, "image: no file"),
    ],
)
def test_settings_that_neither_can_do(either, settings, says):
    with pytest.raises(imagegen.RequestError, match=says):
        either(PROMPT, **settings)


def test_pictures_to_start_from_are_refused(either):
    picture = draw(either).images[0]
    with pytest.raises(imagegen.RequestError, match="does text-to-image: it has no image-to-image"):
        either(PROMPT, image=picture)
    with pytest.raises(imagegen.RequestError, match="it has no inpainting"):
        either(PROMPT, image=picture, mask=picture)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_steps": 30}, "takes no num_steps, got 30: it draws one row of codes in each step"),
        ({"noise": torch.zeros(1, 4, 8, 8)}, "janus-pro takes no noise"),
        ({"temperature": -1}, "temperature must be from 0"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
    ],
)
def test_settings_that_codes_cannot_do(pro, settings, says):
    with pytest.raises(imagegen.RequestError, match=says):
        pro(PROMPT, **settings)
    assert pro.family.num_steps == 4 and draw(pro, num_steps=4, width=64)  # what it does anyway may be said


def test_temperature_is_for_codes_only(flow, model):
    for other in (flow, model):
        with pytest.raises(imagegen.RequestError, match="temperature is for models that draw one token after the other"):
            other(PROMPT, temperature=1.0)
    with pytest.raises(imagegen.RequestError, match=r"noise must have the shape \(1, 4, 8, 8\)"):
        flow(PROMPT, noise=torch.zeros(1, 4, 16, 16))


def test_a_prompt_that_is_too_long_is_refused_before_anything_runs(either):
    with pytest.raises(imagegen.RequestError, match="tokens, and this model reads 49"):
        either.stream("a red ball " * 200)


LEVERS = {
    "janusflow": ["threads(count=2)", "int8-weight-only", "channels-last", "decode-slicing", "step-cache(warmup=2)"],
    "janus-pro": ["threads(count=2)", "int8-weight-only", "decode-slicing"],
}


@pytest.mark.parametrize(("kind", "lever"), [(kind, lever) for kind, levers in LEVERS.items() for lever in levers])
def test_levers_that_fit_engage_and_are_undone(flow, pro, kind, lever, threads):
    threads(1)
    model = flow if kind == "janusflow" else pro
    before = draw(model, num_images=2)
    with model.plan_for_a_while(lever):
        faster = draw(model, num_images=2)
        assert [entry["engaged"] for entry in model.applied] == [True]
    if kind == "janusflow" or lever != "int8-weight-only":  # rounded weights may draw another code
        assert psnr_db(before.images[0], faster.images[0]) > 30
    assert same(draw(model, num_images=2).images[0], before.images[0])


@pytest.mark.parametrize(
    ("kind", "lever", "says"),
    [
        ("janus-pro", "step-cache", "draws its codes one by one"),
        ("janus-pro", "fewer-steps", "draws its codes one by one"),
        ("janus-pro", "tiny-decoder", "this model has codes"),
        ("janus-pro", "openvino", "writes into its cache at every call"),
        ("janus-pro", "cuda-graph", "writes into its cache at every call"),
        ("janusflow", "openvino", "OpenVINO cannot read this model's network"),
        ("janusflow", "prompt-cache", "no text encoder"),
        ("janusflow", "guidance-interval", "both halves of guidance as one batch"),
        ("janusflow", "balanced", "nothing was measured"),
    ],
)
def test_levers_that_do_not_fit_say_why(flow, pro, kind, lever, says):
    with pytest.raises(imagegen.PlanError, match=says):
        (flow if kind == "janusflow" else pro).set_plan(lever)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "graphs"), [("janusflow", 1), ("janus-pro", 2)])
def test_steps_never_compile_again(flow, pro, kind, graphs, monkeypatch):
    """One graph of a step; codes need one more, for the prompt."""
    torch.compiler.reset()
    model, counter = flow if kind == "janusflow" else pro, CompileCounterWithBackend("eager")
    network = model.pipeline.transformer
    before = draw(model).images[0]
    monkeypatch.setattr(network, "forward", torch.compile(network.forward, fullgraph=True, backend=counter, dynamic=False))
    assert max_difference(draw(model).images[0], before) <= 1
    assert counter.frame_count == graphs
    draw(model, seed=4)
    assert counter.frame_count == graphs
    torch.compiler.reset()


def test_a_lower_precision_on_a_copy_reaches_the_cache(pro, monkeypatch):
    monkeypatch.setattr("imagegen.levers.compute.has_fast_bf16", lambda device: True)
    before = draw(pro, temperature=0.0).images[0]
    with pro.plan_for_a_while("bf16"):
        assert draw(pro, temperature=0.0).images[0].size == (64, 64)
        assert pro.applied[0]["did"] == "16 denoiser calls"
    assert same(draw(pro, temperature=0.0).images[0], before)


def test_what_needs_stock_diffusers_is_refused(either, tmp_path):
    with pytest.raises(imagegen.ModelError, match="diffusers has no pipeline for"):
        imagegen.tune(either, min_psnr_db=30.0)
    with pytest.raises(imagegen.ModelError, match="takes no LoRAs"):
        either.add_lora(tmp_path)
    with pytest.raises(imagegen.ModelError, match="memory_gib= has no estimate for Janus"):
        imagegen.load(either.folder, memory_gib=4)


def test_a_decoder_from_elsewhere(flow, copied, tmp_path):
    folder = copied(FLOW)
    shutil.move(folder / "vae", tmp_path / "decoder")
    with pytest.raises(imagegen.ModelError, match=r"needs a decoder beside its own weights.*pass vae="):
        imagegen.load(folder)
    (tmp_path / "other" / "vae").mkdir(parents=True)
    with pytest.raises(imagegen.ModelError, match="give the folder of a decoder"):
        imagegen.load(folder, vae=tmp_path / "other")
    (decoder,) = (tmp_path / "decoder").glob("*.safetensors")
    with pytest.raises(imagegen.ModelError, match="is one file: for JanusFlow give the folder"):
        imagegen.load(folder, vae=decoder)
    apart = imagegen.load(folder, vae=tmp_path / "decoder")
    assert same(draw(apart).images[0], draw(flow).images[0])
    assert apart.hashes == flow.hashes
    path = draw(apart).save(tmp_path)[0]
    assert imagegen.replay(path).same  # finds the decoder again
    assert same(draw(imagegen.load(folder, vae=FLOW)).images[0], draw(flow).images[0])  # a folder that holds one as vae/


def test_from_the_hub_the_decoder_too(either, copied, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = copied(FLOW if either.family.name == "janusflow" else PRO)
    if either.family.name == "janusflow":
        fill_cache(tmp_path / "hub", "stabilityai/sdxl-vae", folder / "vae")
        shutil.rmtree(folder / "vae")
    fill_cache(tmp_path / "hub", "deepseek-ai/a-janus", folder)
    where = {"vae": "stabilityai/sdxl-vae"} if either.family.name == "janusflow" else {}
    found = imagegen.load("deepseek-ai/a-janus", local_files_only=True, **where)
    made = draw(found)
    assert same(made.images[0], draw(either).images[0])
    assert made.pictures[0].receipt.model["revision"] == COMMIT


def test_the_file_of_weights_stands_for_its_folder(flow):
    assert same(draw(imagegen.load(FLOW / "model.safetensors")).images[0], draw(flow).images[0])


def test_both_layouts_of_files_are_the_same_model(pro):
    assert same(draw(imagegen.load(PRO / "safetensors")).images[0], draw(pro).images[0])


def test_wrong_ways_to_load():
    with pytest.raises(imagegen.ModelError, match="holds its own decoder: leave vae= out"):
        imagegen.load(PRO, vae=FLOW / "vae")
    with pytest.raises(imagegen.ModelError, match="overflows in float16"):
        janusflow.load(janus.find(FLOW), FLOW / "vae", torch.device("cpu"), torch.float16)


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_damaged_folders_say_what_is_wrong(copied, tmp_path, monkeypatch):
    folder = copied(FLOW)
    file = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is overwritten below

    def refused(says):
        with pytest.raises(imagegen.ModelError, match=says):
            imagegen.load(folder)

    file.write_bytes(file.read_bytes()[:5000])
    refused("model.safetensors.*cannot be read")
    save_file({name: tensor for name, tensor in weights.items() if "in_conv" not in name}, file)
    refused("lacks 2 tensors, 'vision_gen_enc_model.in_conv.weight'")
    save_file(weights | {"vision_gen_enc_aligner.bias": torch.zeros(3)}, file)
    refused("size mismatch for vision_gen_enc_aligner.bias")
    file.unlink()
    refused("holds no weights: a Janus folder has model.safetensors or pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    refused("holds more than tensors, and is not opened")
    assert not Path("owned").exists()
    config = json.loads((folder / "config.json").read_text())
    save_file(weights, file)
    for wrong in ({"vision_gen_dec_config": {}}, {"language_config": config["language_config"] | {"hidden_size": "wide"}}):
        (folder / "config.json").write_text(json.dumps(config | wrong))
        refused("describes no Janus model that can be made")
    (folder / "config.json").write_text(json.dumps(config | {"language_config": {"model_type": "mamba"}}))
    refused("language model is a Llama")


@pytest.mark.parametrize(("what", "token"), [("padding", "<｜▁pad▁｜>"), ("beginning of a text", "<｜begin▁of▁sentence｜>")])
def test_a_tokenizer_without_its_special_tokens_is_refused(copied, what, token):
    """The libraries would add a token that the model has never seen, and say nothing."""
    folder = copied(FLOW)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != token]
    content["model"]["vocab"].pop(token, None)
    file.write_text(json.dumps(content))
    with pytest.raises(imagegen.ModelError, match=f"has no token for the {what}"):
        imagegen.load(folder)


def test_a_tokenizer_that_names_no_pad_token_still_has_it(copied, flow):
    folder = copied(FLOW, "special_tokens_map.json")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": None}))
    assert imagegen.load(folder).pipeline.tokenizer.pad_token_id == flow.pipeline.tokenizer.pad_token_id


def test_a_folder_of_diffusers_layout_that_names_our_pipeline_is_refused(tmp_path):
    shutil.copytree(embedded_folder(), tmp_path / "model", ignore=shutil.ignore_patterns("recipe", "samples", "references"))
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "JanusFlowPipeline"}')
    with pytest.raises(imagegen.ModelError, match="JanusFlowPipeline, which this diffusers has not"):
        imagegen.load(tmp_path / "model")


def test_the_shell_knows_temperature_and_vae(tmp_path, capsys):
    from imagegen import cli

    def run(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        return code, capsys.readouterr()

    shell = ("generate", PROMPT, "--seed", 1, "--out", tmp_path, "--json", "--model")
    code, said = run(*shell, PRO, "--temperature", 0)
    assert code == 0
    made = json.loads(said.out)["pictures"][0]["file"]
    assert imagegen.replay(made).same and imagegen.receipt.read_receipt(made).request["temperature"] == 0
    code, said = run(*shell, FLOW / "model.safetensors", "--steps", 2, "--vae", FLOW / "vae")
    assert code == 0
    code, said = run("replay", json.loads(said.out)["pictures"][0]["file"])
    assert code == 0 and "the same picture" in said.out
    code, said = run(*shell, PRO, "--size", "128x128")
    assert code == 2 and "makes pictures of 64x64 only" in said.err


def test_other_folders_are_not_taken_for_janus(tmp_path):
    assert janus.find(embedded_folder()) is None and janus.find(tmp_path) is None
    for content in ("{", "[]", '{"model_type": "multi_modality"}', '{"model_type": "llama"}'):
        (tmp_path / "config.json").write_text(content)
        assert janus.find(tmp_path) is None


def test_another_model_that_lies_in_a_janus_folder_is_not_taken_for_it(copied):
    folder = copied(PRO / "safetensors")
    save_file({"lora_unet_a.lora_up.weight": torch.zeros(4, 4)}, folder / "style.safetensors")
    with pytest.raises(imagegen.ModelError, match="is a LoRA"):
        imagegen.load(folder / "style.safetensors")
    (folder / "config.json").write_text("[" * 10**5)
    assert janus.find(folder) is None
