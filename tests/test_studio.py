"""The studio, in a browser and without one; what the pictures show does not matter here."""

import http.server
import io
import json
import os
import re
import shutil
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from bomb import bomb
from needs import need
from PIL import Image

import imagegen
from imagegen import server, studio
from imagegen.catalog import FAMILIES
from imagegen.engine import Engine
from imagegen.finetune.data import find_faults
from imagegen.studio import named
from imagegen.studio.contest import Contest, chance_of, default_floor, hold_models, tally
from imagegen.studio.enhance import Writer, enhance
from imagegen.studio.figures import figures_of, keep_figures, kept_figures, measure_tiers, say
from imagegen.studio.flags import flags_of, read_flags, without_flags
from imagegen.studio.making import painted
from imagegen.studio.training import gather, write_captions
from imagegen.studio.visitors import Visitors, folder_name


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    need("gradio")
    folder = tmp_path_factory.mktemp("studio") / "pictures"
    with server.launch(model, port=0, output_dir=folder, background=True) as running:
        running.page.server = running.server
        yield SimpleNamespace(url=running.url, port=running.port, folder=folder, blocks=running.page, engine=running.engine)


@pytest.fixture
def page(browser, served):
    opened = browser.new_page()
    opened.set_default_timeout(15_000)
    opened.hosts = set()
    opened.on("request", lambda request: opened.hosts.add(urllib.parse.urlsplit(request.url).netloc))
    opened.goto(served.url)
    opened.get_by_role("button", name="Generate").wait_for()
    opened.get_by_role("button", name="Steps, guidance").click()
    yield opened
    assert opened.hosts <= {f"127.0.0.1:{served.port}", ""}, "the page fetched something from elsewhere"
    opened.close()


def fill(page, **fields):
    for label, value in fields.items():
        text = label in ("Prompt", "Seed")
        page.get_by_label(label if text else f"number input for {label}", exact=text).fill(str(value))


def generate(page, **fields):
    """Press Generate and wait for the finished pictures; return their addresses."""
    fill(page, **fields)
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("button", name="Download PNG").wait_for()
    pictures = page.locator(".result .thumbnail-lg img")
    pictures.nth(fields.get("Pictures", 1) - 1).wait_for()  # the gallery draws them a moment after the buttons
    return [picture.get_attribute("src") for picture in pictures.all()]


def made(served, name):
    """Return a visitor's finished pictures of a name; every page of these tests is another visitor."""
    return sorted(served.folder.glob(f"visitor-*/{name}"))


def get(address):
    with urllib.request.urlopen(address) as answer:
        return answer.read()


def wait_until_idle(served):
    """Wait for the model's next turn: the run before, also one that nobody waits for any more, has ended by then."""
    with served.engine.alone():
        pass


def test_page_shows_previews_then_the_files(page, served, model):
    fill(page, Prompt="a red apple", Steps=12, Pictures=2, Seed=7)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile(r"^Step \d+ of 12 · about \d+ s left$")).wait_for()
    assert page.locator(".stage img").count() == 2
    assert not made(served, "7-*.png"), "the preview came before the end"
    page.get_by_role("button", name="Download PNG").wait_for()
    page.get_by_text("12 steps in").wait_for()
    files = [*made(served, "7-a-red-apple.png"), *made(served, "8-a-red-apple.png")]
    pictures = page.locator(".result .thumbnail-lg img")
    pictures.nth(1).wait_for()  # the gallery draws them a moment after the buttons
    shown = [get(picture.get_attribute("src")) for picture in pictures.all()]
    assert shown == [file.read_bytes() for file in files]
    assert [imagegen.read_receipt(file).request["seed"] for file in files] == [7, 8]
    alone = model.generate("a red apple", seed=7, num_steps=12, num_images=2)
    assert Image.open(io.BytesIO(shown[0])).tobytes() == alone.images[0].tobytes()
    page.get_by_role("button", name="Receipt").click()
    page.get_by_text('"seed": 7').wait_for()
    pictures.nth(1).click()  # the receipt follows the choice
    page.get_by_text('"seed": 8').wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").click()
    assert Path(download.value.path()).read_bytes() == files[1].read_bytes()


def test_stop_really_stops_and_the_next_one_works(page, steps_run, served):
    fill(page, Prompt="a blue heart", Steps=100, Seed=11)
    page.get_by_role("button", name="Generate").click()
    page.locator(".stage img").first.wait_for()
    page.get_by_role("button", name="Stop").first.click()
    page.get_by_text(re.compile(r"^Stopped after step \d+ of 100$")).wait_for()
    wait_until_idle(served)
    done = len(steps_run)
    assert 0 < done < 90
    assert not made(served, "11-*")
    generate(page, Steps=2, Seed=12)
    assert len(steps_run) == done + 2, "the stopped run went on"
    assert made(served, "12-a-blue-heart.png")


def test_leaving_the_page_stops_the_work(page, steps_run, served):
    fill(page, Prompt="a blue heart", Steps=100)
    page.get_by_role("button", name="Generate").click()
    page.locator(".stage img").first.wait_for()
    page.goto("about:blank")
    wait_until_idle(served)
    assert len(steps_run) < 90


def test_models_to_compare_with_are_told_apart(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    one, other, alone = tmp_path / "a/same.gguf", tmp_path / "b/same.gguf", tmp_path / "c/alone.gguf"
    for file in (one, other, alone):
        file.touch()
    assert named([one, other, alone, "org/name"]) == {
        str(one): str(one),
        str(other): str(other),
        "alone": str(alone),
        "org/name": "org/name",
    }


def test_compare_with_stock_diffusers(page):
    generate(page, Prompt="a smiling sun", Steps=3, Seed=5)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).last.click()
    page.get_by_text("identical", exact=True).first.wait_for()
    assert page.get_by_text("0 of 255").first.is_visible()
    page.get_by_text("stock diffusers in float32 with seed 5").first.wait_for()
    handle, reference = page.get_by_test_id("slider"), page.get_by_test_id("imageslider-image").last
    handle.scroll_into_view_if_needed()
    before, clipped = handle.bounding_box(), reference.get_attribute("style")
    page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    page.mouse.down()
    page.mouse.move(before["x"] + 80, before["y"] + before["height"] / 2, steps=4)
    page.mouse.up()
    assert handle.bounding_box()["x"] > before["x"] + 30
    assert reference.get_attribute("style") != clipped


def test_compare_with_an_uploaded_picture(page, served, tmp_path):
    file = urllib.parse.unquote(generate(page, Prompt="a green leaf", Steps=2, Seed=3)[0].rsplit("/", 1)[1])
    changed = Image.open(made(served, file)[0]).convert("RGB")
    red, green, blue = changed.getpixel((0, 0))
    changed.putpixel((0, 0), (red + 10 if red < 128 else red - 10, green, blue))
    changed.save(tmp_path / "changed.png")
    Image.new("RGB", (40, 24)).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "bomb.png").write_bytes(bomb(12_000))
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("A picture of your own").check()
    reference = page.locator(".block.fill", has_text="Its reference")

    def give(name, message):
        reference.locator("input[type=file]").set_input_files(tmp_path / name)
        reference.get_by_role("button", name="Remove Image").wait_for()
        page.get_by_role("button", name="Compare", exact=True).last.click()
        page.get_by_text(message).first.wait_for()
        reference.get_by_role("button", name="Remove Image").click()

    give("broken.png", "the file cannot be read as a picture")
    give("small.png", "pictures of two sizes cannot be compared: 40x24 and 128x128")
    give("bomb.png", "the picture has 12000x12000 pixels, more than 16,777,216: make it smaller")
    give("changed.png", "10 of 255")
    assert page.get_by_text("this picture, against the picture you gave:").is_visible()


def test_a_long_prompt_that_scrolls_takes_no_focus(page):
    prompt, seed = page.get_by_label("Prompt", exact=True).first, page.get_by_label("Seed").first
    prompt.fill("a red apple and " * 300)
    seed.focus()
    for top in (0, 9999):
        prompt.evaluate("(box, top) => { box.scrollTop = top }", top)
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert seed.evaluate("box => document.activeElement === box")
    prompt.fill("")


def test_errors_and_warnings_are_one_message(page):
    def press(message, **fields):
        fill(page, **fields)
        page.get_by_role("button", name="Generate").click()
        page.get_by_text(message).wait_for()
        page.get_by_role("button", name="Generate").wait_for()

    press("the prompt is empty: say what to draw", Prompt=" ")
    press("seed must be a whole number, got '<b>x</b>'", Prompt="a red apple", Seed="<b>x</b>", Steps=1)
    press("the prompt is longer than the", Prompt="a red apple and " * 300, Seed="")
    assert page.get_by_text("Traceback").count() == 0


OUTSIDE = ["/etc/passwd", str(Path(__file__).resolve()), "pyproject.toml", "{folder}/../secret.txt", "{folder}"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_only_the_output_folder_is_served(served, path):
    (served.folder / "own.txt").write_text("own")
    (served.folder.parent / "secret.txt").write_text("secret")
    assert get(f"{served.url}/gradio_api/file={served.folder / 'own.txt'}") == b"own"
    path = urllib.parse.quote(path.format(folder=served.folder))
    for route in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", "gradio_api/stream/"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(f"{served.url}/{route}{path}")
        assert refused.value.code in (403, 404, 405)


def test_only_uploads_are_compared(served, tmp_path):
    def compare(folder):
        file = Path(folder) / "private.png"
        Image.new("RGB", (128, 128)).save(file)
        own = {"path": str(file), "meta": {"_type": "gradio.FileData"}}
        body = json.dumps({"data": [own, "", "", studio.UPLOAD, None, None, own, [], [], False]}).encode()
        call = f"{served.url}/gradio_api/call/compare"
        started = urllib.request.urlopen(urllib.request.Request(call, body, {"Content-Type": "application/json"}))
        return get(f"{call}/{json.load(started)['event_id']}").decode()

    assert "identical" in compare(os.environ["GRADIO_TEMP_DIR"])  # where uploads lie
    refused = compare(tmp_path)
    assert "event: error" in refused
    assert "identical" not in refused


def test_listens_on_loopback_only_and_phones_nobody(served):
    addresses = {sock.getsockname()[0] for server in served.blocks.server.servers for sock in server.sockets}
    assert addresses == {"127.0.0.1"}
    assert not served.blocks.share
    assert not served.blocks.analytics_enabled
    assert served.blocks.max_file_size
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_follow_says_every_step_and_stops_when_told(model, tmp_path, steps_run):
    settings = {"num_steps": 4, "num_images": 2, "seed": 1}
    with Engine(model) as engine:
        frames = list(studio.follow(engine, "a red apple", settings, tmp_path, threading.Event(), pytest.fail))
        assert [frame.fraction for frame in frames] == [0.25, 0.5, 0.75, 1.0]
        assert all(len(frame.previews) == 2 for frame in frames)
        assert [path.name for path in frames[-1].paths] == ["1-a-red-apple.png", "2-a-red-apple.png"]
        steps_run.clear()
        stop = threading.Event()
        frames = studio.follow(engine, "a red apple", settings | {"num_steps": 50}, tmp_path, stop, pytest.fail)
        next(frames)
        stop.set()
        (last,) = frames
        assert last.message == "Stopped after step 1 of 50"
    assert len(steps_run) < 50


def test_what_is_missing_is_named(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(imagegen.RequestError, match="choose another"):
        studio.build(model, tmp_path / "file" / "pictures")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(imagegen.Error, match=r"pip install 'imagegen-diffusion\[demo\]'"):
        studio.build(model, tmp_path)


def test_flags_are_taken_off_a_prompt():
    read = lambda text: read_flags(text, FAMILIES["emoji"])  # noqa: E731
    assert read("a fox --seed 7 --steps 12 --cfg 4.5 --num 2 --no text, people") == (
        "a fox",
        {"seed": 7, "num_steps": 12, "guidance": 4.5, "num_images": 2, "negative_prompt": "text, people"},
    )
    assert read("a well-known fox -- really") == ("a well-known fox -- really", {})
    assert read("a fox —ar 1:1")[1] == {"width": 128, "height": 128}  # a telephone's dash
    width, height = (read("a fox --ar 3:2")[1][side] for side in ("width", "height"))
    assert (width % 8, height % 8) == (0, 0)
    assert abs(width / height - 1.5) < 0.1
    assert read("a fox --size 128x96")[1] == {"width": 128, "height": 96}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a fox --sed 7", "unknown flag --sed: did you mean --seed"),
        ("a fox --chaos 5", "unknown flag --chaos: there are --ar"),
        ("a fox --seed 1 --seed 2", "--seed is given twice"),
        ("a fox --seed", "--seed needs a value"),
        ("a fox --seed x", "--seed must be a whole number, got 'x'"),
        ("a fox --ar 0:1", "--ar must be two numbers"),
        ("a fox --ar 99:1", "one at most 8 times the other"),
        ("a fox --ar 1:1 --size 64x64", "both say the size"),
    ],
)
def test_wrong_flags_are_named(text, message):
    with pytest.raises(imagegen.RequestError, match=re.escape(message)):
        read_flags(text, FAMILIES["emoji"])


def test_a_visitor_has_a_folder_that_nobody_else_names(tmp_path):
    visitors = Visitors(tmp_path)
    key = visitors.enter("one", None)
    assert visitors.enter("one again", key) == key  # after a reload
    assert visitors.folder("one") == visitors.folder("one again") == tmp_path / folder_name(key)
    for wrong in ("../../etc", "", 7, {"a": 1}, "x" * 43 + "/"):
        other = visitors.enter("other", wrong)
        assert other != wrong
        assert visitors.folder("other").parent == tmp_path
        assert visitors.folder("other") != visitors.folder("one")
    assert key not in str(visitors.folder("one"))


def test_a_blind_test_knows_luck():
    assert chance_of(0, 4) == 1
    assert chance_of(4, 4) == 1 / 16
    assert chance_of(8, 10) == 56 / 1024
    assert "can well be luck" in tally(8, 10)
    assert "can be seen" in tally(10, 10)


def test_training_data_get_names_of_our_own(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "A Fox.png")
    (tmp_path / "A Fox.txt").write_text("a fox")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "b.png")
    captions = gather([str(path) for path in sorted(tmp_path.iterdir())], tmp_path / "data")
    assert captions == {"001-a-fox.png": "a fox", "002-b.png": ""}
    write_captions(tmp_path / "data", captions)
    assert find_faults(tmp_path / "data") == ["'002-b.png' has no caption"]
    (tmp_path / "data" / "003-c.png").write_text("no picture")
    assert any("003-c.png" in fault and "no picture" in fault for fault in find_faults(tmp_path / "data"))


def test_a_prompt_is_enhanced_by_a_stand_in():
    class StandIn(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((asked["model"], asked["messages"][-1]["content"], self.headers["Authorization"]))
            body = json.dumps({"choices": [{"message": {"content": " a red fox\nin snow "}}]}).encode()
            self.send_response(200 if self.path == "/v1/chat/completions" else 302)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    seen = []
    with http.server.HTTPServer(("127.0.0.1", 0), StandIn) as stand_in:
        threading.Thread(target=stand_in.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{stand_in.server_port}"
        assert enhance("a fox", Writer(f"{address}/v1/chat/completions", "m", "k")) == "a red fox in snow"
        with pytest.raises(imagegen.RequestError, match="answered 302"):  # the key goes nowhere else
            enhance("a fox", Writer(f"{address}/elsewhere", "m", "k"))
        stand_in.shutdown()
    assert seen[0] == ("m", "a fox", "Bearer k")


def test_the_page_fits_a_telephone(browser, served):
    for scheme in ("light", "dark"):
        opened = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
        opened.goto(served.url)
        opened.get_by_role("button", name="Generate").wait_for()
        for tab in ("Generate", "Compare", "Set", "Blind"):
            opened.get_by_role("tab", name=tab, exact=True).click()
            assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{tab} is wider than the screen"
        opened.close()


def test_nobody_stops_anothers_work(browser, page, served):
    other = browser.new_page()
    other.goto(served.url)
    other.get_by_role("button", name="Generate").wait_for()
    fill(page, Prompt="a blue heart", Steps=60, Seed=21)
    page.get_by_role("button", name="Generate").click()
    page.locator(".stage img").first.wait_for()
    other.get_by_label("Prompt").first.fill("a red apple --steps 60")
    other.get_by_role("button", name="Generate").click()
    other.get_by_role("button", name="Stop", exact=True).first.click()
    other.get_by_text(re.compile("^Stopped")).first.wait_for()
    page.get_by_text("60 steps in").wait_for()
    assert made(served, "21-a-blue-heart.png")
    other.close()


def test_a_painted_mask_is_opened_after_its_size_was_looked_at(tmp_path):
    layer = Image.new("RGBA", (64, 64))
    layer.paste((255, 255, 255, 255), (0, 0, 32, 64))
    layer.save(tmp_path / "layer.png")
    mask = painted([str(tmp_path / "layer.png")], (128, 128))
    assert [mask.getpixel((x, 64)) for x in (10, 118)] == [255, 0]
    (tmp_path / "bomb.png").write_bytes(bomb(12_000))
    with pytest.raises(imagegen.RequestError, match="12000x12000 pixels"):
        painted([str(tmp_path / "bomb.png")], (128, 128))
    with pytest.raises(imagegen.RequestError, match="nothing is painted"):
        painted([], (128, 128))


def test_tiers_say_what_was_measured_here(model, tmp_path):
    page = studio.build(model, tmp_path)
    picker = next(block for block in page.blocks.values() if getattr(block, "label", "") == "Speed, and what it costs")
    assert [label for label, _ in picker.choices][:2] == ["exact: not measured here yet", "balanced: not measured here yet"]
    trials = measure_tiers(model, ["exact"], studio.find_offers(model, None, None)[1]["emoji"], lambda *_: None)
    assert [trial.plan for trial in trials] == ["exact"]
    keep_figures(tmp_path, model, figures_of(trials))
    figures = kept_figures(tmp_path, model)["exact"]
    assert figures["seconds"] > 0 and figures["faster"] == 1 and figures["pictures"] == 3
    assert figures["psnr_db"] is None or figures["psnr_db"] > 50
    assert say(figures | {"seconds": 0.5, "psnr_db": 40.04, "faster": 1.5}) == "0.50 s, 1.50 ×, worst 40.0 dB"
    other = json.loads((tmp_path / "figures.json").read_text())
    other["machine"]["cores"] += 1
    (tmp_path / "figures.json").write_text(json.dumps(other))
    assert kept_figures(tmp_path, model) == {}, "measured on another machine"


def test_offered_folders_have_to_be_there(model, tmp_path):
    with pytest.raises(imagegen.RequestError, match=r"there is no folder .*nowhere"):
        studio.build(model, tmp_path, loras=tmp_path / "nowhere")
    (tmp_path / "a-lora.safetensors").touch()
    assert studio.find_offers(model, tmp_path, None)[0] == {"a-lora": tmp_path / "a-lora.safetensors"}


def test_another_model_is_a_candidate(model, tmp_path):
    copy = shutil.copytree(model.folder, tmp_path / "twin", ignore=shutil.ignore_patterns("recipe", "references", "samples"))
    reference = model.generate("a red apple", seed=3, num_steps=2)
    contest = Contest(reference.save(tmp_path)[0], "a picture", default_floor())
    request = reference.pictures[0].receipt.request
    looked = []
    hold_models({"twin": str(copy)}, model, request, contest, tmp_path, lambda *_: None, looked.append)
    assert [(entry.name, entry.measured["max_difference"]) for entry in contest.entries] == [("twin", 0)]
    assert len(looked) == 1
    assert sum(contest.entries[0].stages.values()) > 0
    with pytest.raises(imagegen.ModelError):
        hold_models({"none": str(tmp_path / "none")}, model, request, contest, tmp_path, lambda *_: None, looked.append)


def test_an_enhanced_prompt_keeps_its_flags_and_gets_no_others():
    assert flags_of("a fox --seed 7 --no text") == "--seed 7 --no text"
    assert flags_of("a fox") == ""
    assert without_flags("a fox —with a hat --steps 3") == "a fox with a hat steps 3"


def test_history_survives_a_reload_and_is_nobody_elses(page, browser, served):
    generate(page, Prompt="a key", Steps=2, Seed=91)
    page.reload()
    page.locator(".strip img").first.wait_for()
    file = made(served, "91-a-key.png")[0]
    assert get(page.locator(".strip img").first.get_attribute("src")) == file.read_bytes()
    other = browser.new_page()
    other.goto(served.url)
    other.get_by_role("button", name="Generate").wait_for()
    other.wait_for_timeout(500)
    assert other.locator(".strip img").count() == 0
    other.close()
