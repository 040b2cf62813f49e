"""The recipe's own promises: a resumed training is the same training, whitening changes no picture."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

RECIPE = Path(__file__).parent.parent / "weights" / "emoji" / "recipe"


@pytest.fixture(autouse=True)
def recipe_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and RECIPE.as_posix() in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture
def work(tmp_path):
    """A work folder with three drawn pictures and what the denoiser reads."""
    chance = np.random.default_rng(0)
    np.save(tmp_path / "pictures.npy", chance.integers(0, 255, (3, 112, 112, 4), dtype=np.uint8))
    rows = [{"set": "noto", "label": name, "name": name, "tags": [], "split": "concept"} for name in ("apple", "owl", "grapes")]
    (tmp_path / "pictures.json").write_text(json.dumps(rows))
    torch.manual_seed(0)
    torch.save(torch.randn(33, 4, 16, 16).half(), tmp_path / "latents.pt")
    torch.save({"embeddings": torch.randn(9, 32, 384).half(), "rows": torch.randint(8, (33, 2))}, tmp_path / "captions.pt")
    return tmp_path


def test_denoiser_stopped_and_resumed_equals_one_run(work, monkeypatch):
    import train_denoiser

    monkeypatch.setattr(train_denoiser, "BATCH", 2)
    monkeypatch.setattr(train_denoiser.signal, "signal", lambda *_: None)
    monkeypatch.setattr(train_denoiser, "learning_rate", lambda *_: 1e-3)

    def weights():
        return torch.load(work / "denoiser.pt", weights_only=True)

    train_denoiser.train(work, 4)
    whole = weights()
    (work / "denoiser.pt").unlink()
    train_denoiser.train(work, 2)
    train_denoiser.train(work, 4)
    resumed = weights()
    for kind in ("model", "ema"):
        assert all(torch.equal(whole[kind][name], resumed[kind][name]) for name in whole[kind])
    assert (work / "denoiser" / "diffusion_pytorch_model.safetensors").exists()
    assert json.loads((work / "denoiser.json").read_text())["num_pictures"] == 8


def test_whitening_changes_no_picture(work):
    import train_autoencoder
    from pictures import Pictures

    torch.manual_seed(0)
    model = train_autoencoder.new_autoencoder().eval()
    pictures = Pictures(work, ("concept",))
    batch = train_autoencoder.draw_batch(pictures, 0, 64)
    with torch.no_grad():
        before = model.decode(model.encode(batch).latent_dist.mean).sample
        train_autoencoder.whiten(model, pictures)
        after = model.decode(model.encode(batch).latent_dist.mean).sample
        many = [model.encode(train_autoencoder.draw_batch(pictures, 10_000_000 + k, 128)).latent_dist.mean for k in range(40)]
    torch.testing.assert_close(after, before, atol=2e-3, rtol=0)
    flat = torch.cat(many).permute(1, 0, 2, 3).flatten(1).double()
    torch.testing.assert_close(flat.mean(1), torch.zeros(4).double(), atol=2e-2, rtol=0)
    torch.testing.assert_close(flat.cov(), torch.eye(4).double(), atol=3e-2, rtol=0)


@pytest.mark.parametrize(
    ("name", "said"), [("red apple", "a red apple"), ("owl", "an owl"), ("grapes", "grapes"), ("unicorn", "a unicorn")]
)
def test_articles(name, said):
    from captions import with_article

    assert with_article(name) == said


def test_a_caption_names_the_background(work):
    import random

    from captions import caption, telling_tags
    from pictures import BACKGROUNDS, Pictures

    rows = Pictures(work, ("concept",)).rows
    chance = random.Random(0)
    texts = [caption(row, colour, telling_tags(rows), chance) for row in rows for colour in BACKGROUNDS for _ in range(20)]
    for text, colour in zip(texts, [c for _ in rows for c in BACKGROUNDS for _ in range(20)], strict=True):
        assert colour == "white" or colour in text
    assert len(set(texts)) > 100


def test_canvas_is_the_background_with_the_icon_on_it(work):
    from pictures import BACKGROUNDS, Pictures, psnr_db

    pictures = Pictures(work, ("concept",))
    pictures.rgba[0] = 0
    pictures.rgba[0, 0, 0] = torch.tensor([10, 20, 30, 255])
    canvas = ((pictures.canvas(0, "blue", (2, -3)) + 1) * 127.5).round().byte()
    assert canvas[:, 0, 0].tolist() == list(BACKGROUNDS["blue"])
    assert canvas[:, 10, 5].tolist() == [10, 20, 30]
    same = pictures.canvas(1)[None]
    assert psnr_db(same, same).item() == pytest.approx(100)
    assert psnr_db(torch.ones(1, 3, 2, 2), -torch.ones(1, 3, 2, 2)).item() == 0


def test_every_concept_is_written_once():
    from build_data import read_concepts, slug

    concepts = read_concepts()
    assert len(concepts) == 369
    assert len(set(concepts.values())) == len(concepts)
    assert slug("kiwi fruit") == "kiwi-fruit"
