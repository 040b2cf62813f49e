"""Replay says yes to what it can make again, and no when the receipt or the weights were changed."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import jsonschema
import pytest
import torch
from needs import need
from PIL import Image

import imagegen
from imagegen.receipt import parse_receipt, read_receipt
from imagegen.reference import plan_of, stock_request
from imagegen.result import Picture


def tampered(path, change):
    """Write the picture again with a changed receipt."""
    picture = Image.open(path).convert("RGB")
    data = asdict(imagegen.read_receipt(path))
    change(data)
    return Picture(picture, parse_receipt(json.dumps(data))).save(path.parent)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    return model("a red apple", seed=7, num_steps=8).save(tmp_path_factory.mktemp("made"))[0]


@pytest.fixture(scope="module")
def start():
    return Image.linear_gradient("L").resize((128, 128)).convert("RGB")


def test_text_to_image_is_made_again(model, made):
    verdict = imagegen.replay(made, model=model)
    assert verdict.same, verdict.reasons
    assert verdict.image.tobytes() == Image.open(made).convert("RGB").tobytes()


def test_loads_the_receipts_own_model(made):
    assert imagegen.replay(made).same


def test_a_picture_of_a_batch_is_made_again_alone(model, tmp_path):
    paths = model("a cat", seed=3, num_images=3, num_steps=4).save(tmp_path)
    assert all(imagegen.replay(path, model=model).same for path in paths)


def test_image_to_image_and_inpainting(model, start, tmp_path):
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (0, 0, 64, 128))
    (from_image,) = model("a sun", seed=1, image=start, strength=0.7, num_steps=6).save(tmp_path)
    (masked,) = model("a sun", seed=1, image=start, mask=mask, num_steps=6).save(tmp_path)
    assert imagegen.replay(from_image, image=start, model=model).same
    assert imagegen.replay(masked, image=start, mask=mask, model=model).same
    other = start.rotate(180)
    verdict = imagegen.replay(from_image, image=other, model=model)
    assert not verdict.same
    assert "the image given is not the one that was used" in verdict.reasons
    with pytest.raises(imagegen.ReceiptError, match="made with mask=: give that picture again"):
        imagegen.replay(masked, image=start, model=model)
    with pytest.raises(imagegen.ReceiptError, match="made without mask="):
        imagegen.replay(from_image, image=start, mask=mask, model=model)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 8), ("prompt", "a green apple"), ("num_steps", 9), ("guidance", 5.0), ("negative_prompt", "red"), ("width", 136)],
)
def test_changed_request(model, made, name, value):
    verdict = imagegen.replay(tampered(made, lambda data: data["request"].update({name: value})), model=model)
    assert not verdict.same
    assert verdict.reasons


def test_changed_weight_hash(model, made):
    def change(data):
        name = next(iter(data["model"]["sha256"]))
        data["model"]["sha256"][name] = "0" * 64

    verdict = imagegen.replay(tampered(made, change), model=model)
    assert not verdict.same
    assert "other weights than recorded" in verdict.reasons[0]


def test_changed_pixels(model, made, tmp_path):
    picture = Image.open(made).convert("RGB")
    picture.putpixel((3, 3), (1, 2, 3))
    verdict = imagegen.replay(Picture(picture, imagegen.read_receipt(made)).save(tmp_path), model=model)
    assert not verdict.same
    assert "the file's pixels are not those" in verdict.reasons[0]


def test_given_noise_cannot_be_replayed(model, tmp_path):
    (path,) = model("a star", noise=torch.zeros(1, 4, 16, 16), num_steps=2).save(tmp_path)
    with pytest.raises(imagegen.ReceiptError, match="noise given by the caller"):
        imagegen.replay(path, model=model)


def test_levers_that_only_made_it_fit_are_not_needed_again(model):
    receipt = model.generate("a red apple", seed=1, num_steps=1).pictures[0].receipt
    levers = [{"lever": "decode-slicing", "engaged": True}, {"lever": "text-offload", "engaged": True}]
    assert plan_of(replace(receipt, plan={"name": "exact", "levers": levers})).levers == ()
    cache = {"lever": "step-cache(warmup=1)", "engaged": True}
    assert plan_of(replace(receipt, plan={"name": "fast", "levers": [*levers, cache]})).levers == ("step-cache(warmup=1)",)


def test_stock_reference_is_refused_where_there_is_none(model):
    receipt = model.generate("a red apple", seed=1, num_steps=1).pictures[0].receipt
    assert stock_request(model, receipt).seed == 1
    for wrong in (
        replace(receipt, request=receipt.request | {"mode": "image-to-image"}),
        replace(receipt, request=receipt.request | {"noise": True}),
        replace(receipt, loras=[{"source": "style.safetensors"}]),
        replace(receipt, model=receipt.model | {"sha256": {}}),
    ):
        with pytest.raises(imagegen.ReceiptError, match="reference of your own"):
            stock_request(model, wrong)
    with pytest.raises(imagegen.RequestError, match="num_steps"):
        stock_request(model, replace(receipt, request=receipt.request | {"num_steps": 10**6}))


def test_a_mismatch_names_what_changed_since(model, made):
    def change(data):
        data["request"]["seed"] += 1
        data["environment"] |= {"torch": "2.0.0", "device": "cuda (NVIDIA L4)", "dtype": "float16"}

    reasons = imagegen.replay(tampered(made, change), model=model).reasons
    assert any(reason.startswith("the pixels differ by up to") for reason in reasons)
    now = read_receipt(made).environment
    for name, then in (("torch", "2.0.0"), ("device", "cuda (NVIDIA L4)"), ("dtype", "float16")):
        assert f"made with {name} {then}, now {now[name]}" in reasons
    assert len(reasons) == 4, "what did not change explains nothing"


@pytest.mark.parametrize("by_lever", [True, False])
def test_a_mismatch_says_whether_the_levers_explain_it(model, tmp_path, by_lever):
    """A picture of the exact plan whose receipt names a lever that changes much; and one of another seed."""
    (path,) = model("a red apple", seed=7, num_steps=8).save(tmp_path)

    def change(data):
        data["plan"] = {"name": "fast", "levers": [{"lever": "guidance-interval(stop=0.3)", "engaged": True}]}
        data["request"]["seed"] += not by_lever

    verdict = imagegen.replay(tampered(path, change), model=model)
    assert not verdict.same
    said = next(reason for reason in verdict.reasons if reason.startswith("without its levers"))
    assert said.endswith("they explain it" if by_lever else "they are not what explains it")


def test_another_program_reads_what_made_the_picture(made):
    """sd-parsers is written by others, for the text that AUTOMATIC1111 writes."""
    need("sd_parsers")
    from sd_parsers import ParserManager

    found = ParserManager().parse(made)
    request = read_receipt(made).request
    assert found.generator.name == "AUTOMATIC1111"
    (sampler,) = found.samplers
    assert [prompt.value for prompt in sampler.prompts] == [request["prompt"]]
    assert {name: float(value) for name, value in sampler.parameters.items()} == {
        "seed": request["seed"],
        "steps": request["num_steps"],
        "cfg_scale": request["guidance"],
    }
    denoiser = read_receipt(made).model["sha256"]["unet/diffusion_pytorch_model.safetensors"]
    assert (sampler.model.name, sampler.model.hash) == ("emoji", denoiser[:10])


def test_the_first_receipt_of_all_is_read_and_replayed(model):
    """Written on the package's first day, by the first weights: it lacks what was added to the format since."""
    first = Path(__file__).parent / "fixtures" / "receipts" / "first-version-1.png"
    receipt = read_receipt(first)
    schema = json.loads((Path(imagegen.__file__).parent / "receipt.schema.json").read_text())
    jsonschema.validate(json.loads(receipt.to_json()), schema)
    assert "temperature" not in receipt.request
    assert (receipt.request["prompt"], receipt.request["seed"], receipt.plan) == ("a frog", 7, {"levers": [], "name": "exact"})
    verdict = imagegen.replay(first, model=model)
    assert verdict.reasons[0].startswith("other weights than recorded: text_encoder/")
    assert verdict.image.size == (128, 128)
