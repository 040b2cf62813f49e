"""Janus-Pro against what the reference, and transformers, compute with the same tiny weights.

The fixture's README says where the expected values come from; tolerances are its own.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from imagegen.families import janus, januspro

FOLDER = Path(__file__).parent / "fixtures" / "janus-pro-tiny"
EXPECTED = json.loads((FOLDER / "expected" / "expected.json").read_text())
TENSORS = load_file(FOLDER / "expected" / "expected.safetensors")
PROMPTS = [entry["prompt"] for entry in EXPECTED["prompts"]]
SEEDS = [entry["seed"] for entry in EXPECTED["prompts"]]


def load_pro(folder=FOLDER, dtype=torch.float32):
    return janus.load(janus.find(folder), None, torch.device("cpu"), dtype)[0]


@pytest.fixture(scope="module")
def pro():
    return load_pro()


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def write_converted(folder):
    """Write the fixture in transformers' layout, renamed by hand and saved by transformers; return the model."""
    from transformers import GenerationConfig, JanusConfig, JanusForConditionalGeneration

    config = json.loads((FOLDER / "config.json").read_text())
    ids = EXPECTED["special_ids"]
    made = JanusForConditionalGeneration(
        JanusConfig(
            text_config=config["language_config"] | {"bos_token_id": ids["<｜begin▁of▁sentence｜>"], "dtype": "float32"},
            vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 64,
                           "patch_size": 16, "projection_dim": 32, "num_image_tokens": 16},
            vq_config={"embed_dim": 8, "num_embeddings": 96, "latent_channels": 32, "base_channels": 32,
                       "channel_multiplier": [1, 2, 1, 1, 1], "num_res_blocks": 2, "projection_dim": 32,
                       "image_token_embed_dim": 32},
            image_token_id=ids["<image_placeholder>"],
            tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    state = made.state_dict()
    for name, tensor in load_file(FOLDER / "safetensors" / "model.safetensors").items():
        for old, new in (
            ("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"),
            ("gen_vision_model.", "model.vqmodel."), ("gen_aligner.layers.0", "model.generation_aligner.fc1"),
            ("gen_aligner.layers.2", "model.generation_aligner.hidden_layers.0"), ("gen_embed", "model.generation_embeddings"),
            ("gen_head.output_mlp_projector", "model.generation_head.proj_out"),
            ("gen_head.vision_head", "model.generation_head.vision_head"), ("decoder.conv_blocks", "decoder.up"),
            (".res.", ".block."), ("mid.0", "mid.block_1"), ("mid.1", "mid.attn_1"), ("mid.2", "mid.block_2"),
        ):  # fmt: skip
            name = name.replace(old, new)
        if name in state and not name.startswith(("model.vision_model", "model.aligner", "model.vqmodel.encoder")):
            assert state[name].shape == tensor.shape
            state[name] = tensor.float()
    made.load_state_dict(state)
    begin, pad = ids["<｜begin▁of▁sentence｜>"], ids["<｜▁pad▁｜>"]
    more = {"generation_kwargs": {"boi_token_id": ids["<begin_of_image>"]}}
    made.generation_config = GenerationConfig(bos_token_id=begin, pad_token_id=pad, eos_token_id=317, **more)
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((FOLDER / name).read_bytes())
    return made


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("janus") / "converted"
    return folder, write_converted(folder)


@pytest.fixture(scope="module", params=["pytorch_model.bin", "safetensors", "transformers' layout"])
def any_pro(request, pro, converted):
    if request.param == "pytorch_model.bin":
        return pro
    return load_pro(FOLDER / "safetensors" if request.param == "safetensors" else converted[0])


@pytest.mark.parametrize("case", EXPECTED["prompts"] + EXPECTED["tokenization_cases"], ids=lambda case: case["prompt"][:12])
def test_ids_of_prompts_are_the_references(pro, case):
    assert pro.encode_prompt([case["prompt"]]).ids.tolist() == [case["input_ids"]]


@pytest.mark.parametrize("index", [0, 1])
def test_greedy_codes_and_pixels_are_the_references(any_pro, index):
    codes = any_pro(PROMPTS[index], temperature=0.0, output_type="latent").images
    assert torch.equal(codes, TENSORS[f"p{index}.greedy_ids"])
    assert (any_pro.decode(codes) - TENSORS[f"p{index}.greedy_image_raw"]).abs().max() < 3e-5


@pytest.mark.parametrize("index", [0, 1])
def test_drawn_codes_and_pixels_are_the_references(any_pro, index):
    codes = any_pro(PROMPTS[index], generator=seeded(SEEDS[index]), output_type="latent").images
    assert torch.equal(codes, TENSORS[f"p{index}.sample_ids"])
    if index == 0:
        assert (any_pro.decode(codes) - TENSORS["p0.sample_image_raw"]).abs().max() < 3e-5


def test_draws_are_what_the_reference_drew():
    drawn = januspro._draw(seeded(SEEDS[0]), 16, 96, torch.device("cpu"))
    assert torch.equal(drawn[:, 0], TENSORS["p0.sample_draws"])


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_guided_logits_are_the_references(pro, index):
    writer = januspro.Writer(pro.transformer, pro.encode_prompt([PROMPTS[index]]), 16, 5.0, pro.tokenizer.pad_token_id)
    plain = januspro.Writer(pro.transformer, pro.encode_prompt([PROMPTS[index]]), 16, 1.0, pro.tokenizer.pad_token_id)
    for step in range(16):
        assert (writer.logits[0] - TENSORS[f"p{index}.greedy_logits"][step]).abs().max() < 5e-5
        assert (plain.logits[0] - TENSORS[f"p{index}.greedy_logits_cond"][step]).abs().max() < 1e-5
        writer.write(0.0, None)
        plain.logits = torch.nn.functional.one_hot(writer.codes[:, step], 96).float()  # go the guided way
        plain.write(0.0, None)


def test_codes_equal_transformers_own(pro, converted):
    """With every trap of its `generate` stepped around: sampling on, no top-k, a mask, the image mode."""
    theirs = converted[1]
    for index, prompt in enumerate(PROMPTS):
        ids = pro.encode_prompt([prompt]).ids
        settings = {"attention_mask": torch.ones_like(ids), "generation_mode": "image", "guidance_scale": 5.0}
        greedy = theirs.generate(ids, do_sample=False, **settings)
        assert torch.equal(pro(prompt, temperature=0.0, output_type="latent").images, greedy)
        torch.manual_seed(SEEDS[index])
        drawn = theirs.generate(ids, do_sample=True, top_k=0, temperature=1.0, **settings)
        ours = pro(prompt, generator=seeded(SEEDS[index]), output_type="latent").images
        assert torch.equal(ours, drawn)
        pixels = theirs.decode_image_tokens(drawn).permute(0, 3, 1, 2)
        assert torch.equal(pro.decode(ours), pixels)


def test_a_batch_of_two_lengths_is_each_alone(pro):
    greedy = pro(PROMPTS, temperature=0.0, output_type="latent").images
    assert torch.equal(greedy, torch.cat([TENSORS[f"p{index}.greedy_ids"] for index in (0, 1)]))
    drawn = pro(PROMPTS, generator=seeded(*SEEDS), output_type="latent").images
    assert torch.equal(drawn, torch.cat([TENSORS[f"p{index}.sample_ids"] for index in (0, 1)]))


def test_each_picture_has_its_own_generator(pro):
    drawn = pro(PROMPTS[0], num_images_per_prompt=3, generator=seeded(9, SEEDS[0], 10), output_type="latent").images
    assert torch.equal(drawn[1:2], TENSORS["p0.sample_ids"])
    assert torch.equal(drawn[2:], pro(PROMPTS[0], generator=seeded(10), output_type="latent").images)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 1), (5.0, 2)])
def test_every_token_is_read_once_and_guidance_one_is_off(pro, monkeypatch, guidance, rows):
    shapes, layer = [], pro.transformer.language_model.layers[0]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, *a, **k: (shapes.append(tuple(x.shape[:2])), forward(x, *a, **k))[1])
    pro(PROMPTS[0], guidance_scale=guidance, temperature=0.0, output_type="latent")
    assert shapes == [(rows, EXPECTED["prompts"][0]["length"])] + [(rows, 1)] * 15


def test_codes_are_aligned_once_and_again_for_other_weights(pro, monkeypatch):
    pro.transformer._table = None
    aligned, aligner = [], pro.transformer.generation_aligner
    forward = aligner.forward
    monkeypatch.setattr(aligner, "forward", lambda x: (aligned.append(len(x)), forward(x))[1])
    codes = [pro(PROMPTS[0], temperature=0.0, output_type="latent").images for _ in range(2)]
    assert aligned == [96] and torch.equal(*codes)
    weight = pro.transformer.generation_embeddings.weight
    before = weight.clone()
    with torch.no_grad():
        weight.mul_(-1)
    try:
        assert not torch.equal(pro(PROMPTS[0], temperature=0.0, output_type="latent").images, codes[0])
        assert aligned == [96, 96]
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_temperature_sharpens_towards_the_most_likely(pro):
    greedy = TENSORS["p0.greedy_ids"]
    agreeing = {}
    for temperature in (0.02, 1.0, 50.0):
        drawn = pro(
            PROMPTS[0], num_images_per_prompt=8, generator=seeded(*range(8)), temperature=temperature, output_type="latent"
        )
        agreeing[temperature] = (drawn.images[:, 0] == greedy[0, 0]).sum().item()
    assert agreeing[0.02] == 8 > agreeing[1.0] >= agreeing[50.0]


def test_previews_are_the_rows_so_far_and_grey_below(pro):
    whole = pro(PROMPTS[0], temperature=0.0, output_type="latent").images
    seen = []

    def callback(_pipeline, index, _time, tensors):
        seen.append((index, tensors["latents"].clone()))
        return {}

    image = pro(PROMPTS[0], temperature=0.0, callback_on_step_end=callback).images[0]
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    for index, codes in seen:
        assert torch.equal(codes, whole[:, : 4 * (index + 1)])
    assert np.array_equal(np.asarray(pro.preview(seen[-1][1][0], (64, 64))), np.asarray(image))
    half = np.asarray(pro.preview(seen[1][1][0], (64, 64)))
    assert (half[32:] == 128).all()
    drawn = pro.image_processor.postprocess(pro.decode(whole[:, :8]), output_type="pil")[0]
    assert np.array_equal(half[:32], np.asarray(drawn))
    assert (np.asarray(pro.preview(seen[0][1][0][:3], (32, 32))) == 128).all()


def test_a_run_that_is_interrupted_writes_no_further_row(pro):
    def callback(pipeline, index, _time, _tensors):
        pipeline._interrupt = index == 1
        return {}

    codes = pro(PROMPTS[0], temperature=0.0, output_type="latent", callback_on_step_end=callback).images
    assert torch.equal(codes[:, :8], TENSORS["p0.greedy_ids"][:, :8]) and not codes[:, 8:].any()


def test_decoding_a_batch_in_slices_is_the_same(pro):
    codes = torch.cat([TENSORS["p0.greedy_ids"], TENSORS["p1.greedy_ids"]])
    together = pro.decode(codes)
    pro.vae.use_slicing = True
    try:
        assert (pro.decode(codes) - together).abs().max() < 3e-5
    finally:
        pro.vae.use_slicing = False


def test_bfloat16_draws_from_float32_probabilities():
    rounded = load_pro(dtype=torch.bfloat16)
    codes = rounded(PROMPTS[0], generator=seeded(1), output_type="latent").images
    assert codes.shape == (1, 16) and codes.min() >= 0 and codes.max() < 96
    prompts = rounded.encode_prompt([PROMPTS[0]])
    with torch.no_grad():
        logits = januspro.Writer(rounded.transformer, prompts, 16, 5.0, rounded.tokenizer.pad_token_id).logits
    assert logits.dtype == torch.float32
    assert (logits[0] - TENSORS["p0.greedy_logits"][0]).abs().max() < 0.5


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"width": 512}, "64x64 only"),
        ({"num_inference_steps": 30}, "4 rows of codes in as many steps, got 30"),
        ({"temperature": -0.5}, "temperature is from 0, got -0.5"),
        ({"temperature": float("nan")}, "temperature is from 0, got nan"),
        ({"prompt": "a ball " * 300}, "this model reads 496: shorten it"),
    ],
)
def test_what_it_cannot_do(pro, settings, says):
    with pytest.raises(ValueError, match=says):
        pro(**({"prompt": "a ball"} | settings))


def test_roles_are_words_where_the_tokenizer_has_no_tokens_for_them(pro, monkeypatch):
    """Janus-1.3B, whose vocabulary lacks them."""
    monkeypatch.setattr(pro.tokenizer, "get_vocab", dict)
    found = pro.tokenizer.decode(pro.encode_prompt(["a red ball"]).ids[0, 1:])
    assert found == "User: a red ball\n\nAssistant:<begin_of_image>"


def test_sharded_pickles_are_read(pro, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    whole = load_file(FOLDER / "safetensors" / "model.safetensors")
    names = sorted(whole)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        torch.save({name: whole[name] for name in part}, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    sharded = load_pro(tmp_path)
    assert torch.equal(sharded(PROMPTS[0], temperature=0.0, output_type="latent").images, TENSORS["p0.greedy_ids"])
    save_file(whole, tmp_path / "model.safetensors")
    assert [file.name for file in janus.find(tmp_path).weights()] == ["model.safetensors"]
