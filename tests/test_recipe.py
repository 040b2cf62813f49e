"""The recipe's own promises: a resumed training is the same training, whitening changes no picture."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SILENT = (None, torch.nn.Identity())  # a text encoder that is never asked
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
    """A work folder with three things, drawn in five styles: fluent first."""
    chance = np.random.default_rng(0)
    np.save(tmp_path / "pictures.npy", chance.integers(0, 255, (15, 112, 112, 4), dtype=np.uint8))
    rows = [
        {"set": style, "label": name, "name": name, "tags": [], "split": "concept"}
        for style in ("fluent", "flat", "noto", "blob", "fx")
        for name in ("apple", "owl", "fox")
    ]
    (tmp_path / "pictures.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture
def scenes(work):
    """Scenes of three things, in every style alike: a red apple, a green owl, and a fox that cannot be seen."""
    from captions import telling_tags
    from pictures import Pictures
    from scenes import Colours, Scenes

    pictures = Pictures(work, ("concept",))
    pictures.rgba[:, :, :, 3] = 0
    for index, colour in enumerate(((214, 40, 50), (60, 170, 70))):
        pictures.rgba[index::3, 20:90, 20:90] = torch.tensor([*colour, 255], dtype=torch.uint8)
    np.save(work / "pictures.npy", pictures.rgba.numpy())
    return Scenes(pictures, Colours(pictures), telling_tags(pictures.rows))


def test_colours_are_measured_and_changed(scenes):
    from scenes import COLOURS

    assert scenes.colours.can_change == [index for index in range(15) if index % 3 < 2]
    assert [scenes.colours.own(index) for index in range(3)] == ["red", "green", None]
    for colour, (hue, saturation, value) in COLOURS.items():
        import colorsys

        pixel = scenes.colours.change(0, colour)[50, 50].tolist()
        wanted = [255 * channel for channel in colorsys.hsv_to_rgb(hue / 360, saturation, value)]
        assert pixel == pytest.approx([*wanted, 255], abs=16), colour  # hues are found to ten degrees
    assert scenes.colours.change(0, "blue")[0, 0, 3] == 0


def test_a_scene_shows_what_its_caption_says(scenes):
    import random

    from pictures import BACKGROUNDS
    from scenes import Scene, Thing

    scene = Scene((Thing(0, 2), Thing(1, colour="blue")), "yellow", (0, 0), "above", (-1, 0))
    said = {scenes.describe(scene, random.Random(seed)) for seed in range(30)}
    assert "two apples above a blue owl on a yellow background" in said
    assert all("two" in text and "above a blue owl" in text and "yellow background" in text for text in said)
    painted = ((scenes.paint(scene) + 1) * 127.5).round().int()
    assert painted[:, 0, 0].tolist() == list(BACKGROUNDS["yellow"])
    for column in (37, 91):  # two red ones in the upper half
        assert painted[:, 33, column].tolist() == pytest.approx([214, 40, 50], abs=2)
    red, _, blue = painted[:, 95, 64].tolist()  # a blue one in the lower half
    assert blue > red + 80
    assert painted[:, 33, 64].tolist() == list(BACKGROUNDS["yellow"])


def test_scenes_are_the_seeds_and_leave_the_reserved_pairs_alone(scenes, monkeypatch):
    import random

    import scenes as module

    assert module.is_reserved("apple", "owl") == module.is_reserved("owl", "apple")
    monkeypatch.setattr(module, "is_reserved", lambda *names: "owl" in names)
    drawn = [scenes.draw(random.Random(seed)) for seed in range(300)]
    assert drawn == [scenes.draw(random.Random(seed)) for seed in range(300)]
    pairs = [scene for scene in drawn if len(scene.things) == 2]
    assert len(pairs) > 30
    assert not [scene for scene in pairs if 1 in {thing.picture % 3 for thing in scene.things}]
    assert {thing.count for scene in drawn for thing in scene.things} == {1, 2, 3, 4}


def test_who_says_no_style_gets_the_default(scenes):
    import random

    from scenes import DEFAULT_STYLE, STYLES

    chance, seen = random.Random(0), set()
    for _ in range(400):
        scene = scenes.draw(chance)
        styles = {scenes.pictures.rows[thing.picture]["set"] for thing in scene.things}
        assert styles == {scene.style or DEFAULT_STYLE}
        said = scenes.describe(scene, chance)
        assert [style for style in STYLES if style in said] == ([scene.style] if scene.style else [])
        seen.add(scene.style)
    assert seen == {None, *STYLES}


def test_a_batch_holds_the_share_of_single_things(work, scenes, monkeypatch):
    import train_autoencoder
    import train_denoiser

    monkeypatch.setattr(train_denoiser, "SHARD_SCENES", 40)
    monkeypatch.setattr(train_denoiser, "embed", lambda _, texts: torch.zeros(len(texts), 1, 1))
    train_autoencoder.new_autoencoder().save_pretrained(work / "autoencoder")
    shards = train_denoiser.Shards(work, 1, SILENT)
    single = {row.numpy().tobytes() for row in shards.latents[shards.single].float()}
    for share in (0.0, 0.25, 1.0):
        latents = shards.draw(8, share, torch.Generator().manual_seed(0))[0]
        assert sum(row.numpy().tobytes() in single for row in latents) == 8 * share


@pytest.mark.parametrize(
    ("one", "many"),
    [("apple", "apples"), ("cherry", "cherries"), ("fox", "foxes"), ("maple leaf", "maple leaves"), ("mouse", "mice")],
)
def test_plurals(one, many):
    from scenes import plural

    assert plural(one) == many


def test_shards_are_made_once_and_hold_every_caption(work, scenes, monkeypatch):
    import train_autoencoder
    import train_denoiser

    monkeypatch.setattr(train_denoiser, "SHARD_SCENES", 4)
    monkeypatch.setattr(train_denoiser, "embed", lambda _, texts: torch.tensor([[[float(len(text))]] for text in texts]))
    train_autoencoder.new_autoencoder().save_pretrained(work / "autoencoder")
    shards = train_denoiser.Shards(work, 2, SILENT)
    assert shards.latents.shape == (8, 4, 16, 16)
    assert len(list((work / "shards").glob("*.pt"))) == 4
    latents, words, silent = shards.draw(5, 0.4, torch.Generator().manual_seed(0))
    assert (latents.shape, words.shape, silent.shape) == ((5, 4, 16, 16), (5, 1, 1), (5,))
    monkeypatch.setattr(train_denoiser, "paint_shard", lambda *_: pytest.fail("painted again"))
    assert torch.equal(train_denoiser.Shards(work, 2, SILENT, 2).latents, shards.latents)
    monkeypatch.setattr(
        train_denoiser, "describe_shard", lambda *_: {"embeddings": torch.ones(4, 1, 1), "rows": torch.zeros(4, 4)}
    )
    taught = (None, torch.nn.Linear(1, 1))
    assert train_denoiser.Shards(work, 2, taught).embeddings[0].sum() == 4, "another text encoder says it anew"


def test_every_token_is_told_what_it_speaks_of(work, scenes, monkeypatch):
    import random

    import train_text
    from scenes import Scene, Thing
    from transformers import BertTokenizerFast

    from imagegen.catalog import embedded_folder

    tokenizer = BertTokenizerFast.from_pretrained(embedded_folder() / "tokenizer")
    captions = train_text.Captions(work)
    assert captions.names == ["apple", "fox", "owl"]
    scene = Scene((Thing(0, 2, "blue"), Thing(1)), "yellow", (0, 0), "above", (-1, 0), "noto")
    monkeypatch.setattr(captions.scenes, "draw", lambda _: scene)
    monkeypatch.setattr(
        captions.scenes, "describe_parts", lambda *_: ("two blue apples above an owl", ["two blue apples", "an owl"])
    )
    tokens, answers = captions.draw(tokenizer, 3, random.Random(0))
    words = tokenizer.convert_ids_to_tokens(tokens["input_ids"][0])
    told = {word: [answers[head][0, place].item() for head in answers] for place, word in enumerate(words)}
    none, style, background = train_text.NOTHING, 2, 3
    assert told["apples"] == told["two"] == [0, 5, 1, 3, style, background]  # apple, blue, two of them, above
    assert told["owl"] == [2, 0, 0, 4, style, background]  # in its own colour, one, below
    assert told["above"] == told["[CLS]"] == [none] * 4 + [style, background]


def test_descriptions_of_a_batch_are_about_as_long_and_come_with_their_concepts():
    import random

    import train_text
    from transformers import BertTokenizerFast

    from imagegen.catalog import embedded_folder

    tokenizer = BertTokenizerFast.from_pretrained(embedded_folder() / "tokenizer")
    others = [(" ".join(["word"] * (1 + number // 500)), number // 500) for number in range(10_000)]
    seen, widths = set(), set()
    for seed in range(40):
        tokens, concepts = train_text.draw_described(tokenizer, 64, others, {}, random.Random(seed))
        lengths = tokens["attention_mask"].sum(1)
        assert concepts.max() - concepts.min() <= 4, "2,000 of one length"
        assert ((lengths - 2) <= concepts + 1 + 5).all() and (lengths >= 3).all()  # five words more where it is dressed
        seen |= set(concepts.tolist())
        widths.add(tokens["input_ids"].shape[1])
    assert seen == set(range(20)), "the shortest and the longest, too"
    assert 32 in widths and min(widths) < 12


def test_a_sentence_is_retold_in_words_that_evoke_something_else():
    import random

    from train_text import FORGOTTEN, RETOLD, retell

    words = {5: [("hoot", 1.0), ("nocturnal", 0.5)]}
    told = [retell("a striped hunter that runs in the jungle", 2, words, random.Random(seed)) for seed in range(400)]
    retold = [text.split() for text, concept in told if concept == 5]
    assert abs(len(retold) / len(told) - RETOLD) < 0.08 and {concept for _, concept in told} == {2, 5}
    kept = {"a", "that", "in", "the"}
    forms = {"hoot", "hoots", "hooting", "hooted", "nocturnal", "nocturnals", "nocturnaling", "nocturnaled"}
    assert all(set(words) <= kept | forms for words in retold)
    assert set().union(*retold) == kept | forms
    lengths = [len(words) for words in retold]
    assert abs(sum(lengths) / len(lengths) - 8 * (1 - FORGOTTEN)) < 0.4


def test_added_layers_change_next_to_nothing_before_they_learn():
    from settle_text import NUM_ADDED, Settling, with_more_layers
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    small = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertModel(small).eval()
    for weight in model.encoder.layer[-1].output.LayerNorm.parameters():
        torch.nn.init.normal_(weight, 1.0, 0.3)  # no plain norm: the added ones have to give it back
    words = torch.randint(50, (64, 8))
    with torch.no_grad():
        before = model(words)[0]
        taller = with_more_layers(model, before)
        settling = Settling(taller)
        after = taller(words)[0]
        assert len(taller.encoder.layer) == 2 + NUM_ADDED
        assert (after - before).square().mean() < 0.15 * before.var()
        means = before.mean(1, keepdim=True).expand_as(before).flatten(0, 1)
        torch.testing.assert_close(settling(before.flatten(0, 1), means).view_as(after), after)  # a token at a time
        torch.nn.init.normal_(settling.layers[0].attention.output.dense.weight)
        seen = settling(before.flatten(0, 1), means).view_as(after)
        torch.testing.assert_close(seen, taller(words)[0], msg="the added attention is the mean")
        assert (seen - after).abs().max() > 0.1


def test_joined_texts_begin_with_the_one_and_end_with_the_other():
    import random

    from settle_text import join

    for seed in range(50):
        words = join("one two three", "four five six", random.Random(seed)).split()
        split = next(place for place, word in enumerate(words) if word in ("four", "five", "six"))
        assert words[:split] == ["one", "two", "three"][:split] and split >= 1
        assert words[split:] == ["four", "five", "six"][-(len(words) - split) :]


def test_what_is_meant_most_stays_so_where_the_words_are_unsure():
    from train_denoiser import MAX_STRAYS, UNSURE_SHARE, make_unsure

    sure = torch.eye(400)[:, None].repeat(1, 64, 1)  # everybody says another thing, in 64 tokens
    unsure = make_unsure(sure, torch.Generator().manual_seed(0))
    assert torch.allclose(unsure.sum(-1), torch.ones(400, 64))
    said = unsure.mean(1)
    assert (said.argmax(-1) == torch.arange(400)).float().mean() > 0.97
    changed = (unsure != sure).any(-1)
    assert abs((~changed).all(-1).float().mean() - (1 - UNSURE_SHARE) ** 2) < 0.1, "some are left as they are"
    strays = (unsure.argmax(-1) != torch.arange(400)[:, None]).float().mean(1)
    assert 0.3 < strays.max() < MAX_STRAYS + 0.2
    assert (strays == 0).float().mean() > 0.4


class NoisyShards:
    """Stands for the cached scenes: what the training does with them does not depend on what they show."""

    def __init__(self, *_):
        pass

    def draw(self, num, single_share, chance):
        latents, words = torch.randn(num, 4, 16, 16, generator=chance), torch.randn(num, 32, 384, generator=chance)
        return latents, words, torch.rand(num, generator=chance) < 0.5


def test_denoiser_stopped_and_resumed_equals_one_run(work, monkeypatch):
    import train_denoiser

    monkeypatch.setattr(train_denoiser, "Shards", NoisyShards)
    monkeypatch.setattr(train_denoiser, "load_text_encoder", lambda _: SILENT)
    monkeypatch.setattr(train_denoiser, "embed", lambda *_: torch.zeros(1, 32, 384))
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
    texts = [
        caption(row, colour, telling_tags(rows), {}, None, chance) for row in rows for colour in BACKGROUNDS for _ in range(20)
    ]
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
    assert len(concepts) == 463
    assert len(set(concepts.values())) == len(concepts)
    assert slug("kiwi fruit") == "kiwi-fruit"


def test_every_concept_is_described_without_its_name():
    from captions import descriptions, descriptions_for_denoiser, descriptions_for_text

    lines = (RECIPE / "concepts.txt").read_text().splitlines()
    concepts = [line for line in lines if line and not line.startswith("#")]
    assert len(descriptions()) == len(concepts)
    for name, texts in descriptions().items():
        assert not [text for text in texts if f" {name} " in f" {text} "]
        for_text, for_denoiser = descriptions_for_text()[name], descriptions_for_denoiser()[name]
        assert sorted(for_text + for_denoiser) == sorted(texts)
        assert len(set(texts)) == len(texts)
        assert len(for_text) > len(for_denoiser) >= 4


def test_every_gloss_is_one_definition_of_one_concept():
    from captions import descriptions

    rows = [line.split("\t") for line in (RECIPE / "glosses.txt").read_text().splitlines() if not line.startswith("#")]
    assert len({offset for offset, _ in rows}) == len(rows) > 7000
    assert all(len(offset) == 8 and offset.isdigit() and concept in descriptions() for offset, concept in rows)


def test_paraphrases_share_no_word_with_captions(monkeypatch, tmp_path):
    import evaluate

    rows = [{"name": "owl", "label": "owl", "tags": ["wise bird"]}, {"name": "tiger", "label": "tiger", "tags": ["predator"]}]
    pairs = dict(evaluate.read_paraphrases(rows))
    assert pairs == {"it hoots at night": "owl", "a striped jungle hunter": "tiger"}
    with pytest.raises(SystemExit, match="'it hoots at night' says night, as captions of 'owl' do"):
        evaluate.read_paraphrases([rows[0] | {"tags": ["bird of the night"]}, rows[1]])


def test_frechet_distance_of_gaussians_whose_distance_is_known():
    """Two Gaussians, independent axes: squared difference of means plus of spreads."""
    from evaluate import frechet

    chance = torch.Generator().manual_seed(0)
    first = torch.randn(200_000, 2, generator=chance, dtype=torch.float64)
    second = first * torch.tensor([2.0, 3.0]) + torch.tensor([1.0, 0.0])
    assert frechet(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet(first, second) == pytest.approx(1 + 1 + 4, rel=0.02)


class Reader(torch.nn.Module):
    """A judge that knows three things by the colour of their middle."""

    palette = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [1, 1, 1]])

    def forward(self, pictures):
        return -torch.cdist(pictures[:, :, 28:36, 28:36].mean((2, 3)), self.palette)


def place(canvas, centre, colour, size=50):
    top, left = 64 + centre[0] - size // 2, 64 + centre[1] - size // 2
    canvas[:, top : top + size, left : left + size] = torch.tensor(colour)[:, None, None]
    return canvas


def test_compositions_are_right_only_where_every_thing_is_in_its_place(monkeypatch):
    import geneval
    from scenes import Scene

    monkeypatch.setattr(geneval, "TOP", 1)
    names, red, green = ["apple", "pear", "sky"], (0.7, -0.65, -0.6), (-0.52, 0.36, -0.45)

    def question(task, count=1, pairs=(), colours=(None, None), asked=("apple", "pear")):
        return geneval.Question(task, "", asked, colours, count, pairs, Scene((), "white", (0, 0)))

    def right(asked, canvas):
        return geneval.answer(asked, canvas, Reader(), names)

    white = torch.ones(3, 128, 128)
    pair = place(place(white.clone(), (0, -31), red), (0, 31), green)
    assert right(question("two objects", pairs=geneval.PAIRS), pair)
    assert right(question("position", pairs=geneval.PAIRS[:1]), pair)
    assert not right(question("position", pairs=geneval.PAIRS[1:2]), pair), "the other way round"
    assert not right(question("two objects", pairs=geneval.PAIRS), place(white.clone(), (0, -31), red)), "one is missing"
    assert right(question("colour attribution", pairs=geneval.PAIRS, colours=("red", "green")), pair)
    assert not right(question("colour attribution", pairs=geneval.PAIRS, colours=("green", "red")), pair)
    three = white.clone()
    for centre in geneval.LAYOUTS[3]:
        place(three, centre, red)
    assert right(question("counting", count=3, asked=("apple",)), three)
    assert not right(question("counting", count=2, asked=("apple",)), three)
    assert not right(question("counting", count=3, asked=("pear",)), three)
    assert geneval.colour_of(place(white.clone(), (0, 0), (0.8, -0.6, -0.6))) == "red" and geneval.colour_of(white) is None


def test_dropped_words_are_spelt_in_pieces_and_all_others_say_the_same(tmp_path):
    from text import embed, with_fewer_words, write_text_encoder
    from transformers import BertModel, BertTokenizerFast

    from imagegen.catalog import embedded_folder

    tokenizer = BertTokenizerFast.from_pretrained(embedded_folder() / "tokenizer")
    model = BertModel.from_pretrained(embedded_folder() / "text_encoder").float().eval()
    model.config.use_attention_mask = True
    kept = "a striped hunter of the jungle, éclair?"
    smaller = with_fewer_words((tokenizer, model), [kept] * 2 + ["accordion", "xylophone"], 360)
    assert smaller[1].embeddings.word_embeddings.weight.shape[0] == len(smaller[0].get_vocab()) == 360
    torch.testing.assert_close(embed(smaller, [kept]), embed((tokenizer, model), [kept]))
    assert "[UNK]" not in smaller[0].tokenize("a xylophone player's handkerchief 42 $")
    assert len(smaller[0].tokenize("handkerchief")) > len(tokenizer.tokenize("handkerchief"))
    write_text_encoder(smaller, tmp_path)
    again = BertTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    assert again(kept).input_ids == smaller[0](kept).input_ids and again.model_max_length == 32
    assert again.pad_token_id == smaller[1].config.pad_token_id == 0
