"""Every tab of the studio as a person drives it: light and dark, on a desk and on a telephone."""

import re
from hashlib import sha256
from types import SimpleNamespace

import pytest
from needs import need
from PIL import Image, ImageDraw

import imagegen
from imagegen import server
from imagegen.families import adapters

SCREENS = {"desk": (1280, 900), "telephone": (390, 844)}
SCRIPT = 'a <img src=x onerror="window.robbed = 1"> <script>window.robbed = 1</script>'
PATIENCE_MS = 120_000
NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, select, [role=tab]')].filter(one => {
    if (!one.checkVisibility() || one.type === 'hidden') return false;
    if (one.querySelector('.image-frame')) return false;  // Gradio's own frame, in a block that has a label
    const label = one.closest('label') || (one.id && document.querySelector(`label[for="${CSS.escape(one.id)}"]`));
    const named = [one.ariaLabel, one.title, one.innerText, one.alt, label?.innerText, one.getAttribute('aria-labelledby')];
    return !named.some(text => text && text.trim());
}).map(one => one.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    need("gradio")
    folder = tmp_path_factory.mktemp("tabs")
    with server.launch(model, port=0, output_dir=folder, background=True) as running:
        yield SimpleNamespace(url=running.url, folder=folder)


@pytest.fixture(params=[(scheme, screen) for screen in SCREENS for scheme in ("light", "dark")], ids="-".join)
def page(request, browser, served):
    scheme, screen = request.param
    width, height = SCREENS[screen]
    opened = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    opened.set_default_timeout(20_000)
    errors = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(served.url)
    opened.get_by_role("button", name="Generate").wait_for()
    red, green, blue = map(int, re.findall(r"\d+", opened.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
    assert (red + green + blue > 600) == (scheme == "light")
    yield opened
    assert not errors
    assert opened.evaluate("window.robbed") is None
    opened.close()


def look(page):
    """See that nothing is wider than the screen and that everything to press or fill has a name."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    assert page.evaluate(NAMELESS) == []


def press(page, name, exact=True):
    page.get_by_role("button", name=name, exact=exact).locator("visible=true").first.click()


def enter(page, *tabs):
    for tab in tabs:
        page.get_by_role("tab", name=tab, exact=True).first.click()
    page.wait_for_timeout(300)  # a tab's parts are laid out when it is first shown
    look(page)


def wait_for(page, text):
    try:
        page.get_by_text(text).locator("visible=true").first.wait_for(timeout=PATIENCE_MS)
    except Exception as error:
        error.add_note(page.inner_text("body"))
        raise


@pytest.mark.slow
def test_every_tab(page, served, tmp_path):
    # Generate: nothing moves while a picture arrives, and a script in a prompt is a prompt.
    look(page)
    page.get_by_label("Prompt", exact=True).first.fill(f"{SCRIPT} --steps 30 --seed 3")
    actions = page.locator(".actions").first

    def place():
        return actions.evaluate("one => one.getBoundingClientRect().top + scrollY")

    before = place()
    press(page, "Generate")
    page.locator(".stage img").first.wait_for()
    assert place() == before
    wait_for(page, "30 steps in")
    assert place() == before
    wait_for(page, "seed 3")
    page.get_by_label("Prompt", exact=True).first.fill("a red apple --steps 3 --seed 5")
    page.get_by_label("Prompt", exact=True).first.press("Enter")
    wait_for(page, "seed 5")
    assert page.locator(".strip img").count() >= 2
    press(page, "Vary subtly")
    wait_for(page, re.compile(r"steps in .* seed (?!5 )"))
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    page.locator(".strip img").nth(1).click()  # the apple again: stock diffusers makes what words alone made
    wait_for(page, re.compile("a red apple · seed 5 "))

    # Compare: one picture, in every view; then a set; then blind.
    press(page, "Compare")
    page.get_by_label("fast", exact=True).locator("visible=true").first.check()
    look(page)
    page.get_by_role("button", name="Compare", exact=True).locator("visible=true").last.click()
    wait_for(page, "Where the time goes")
    page.get_by_label("fast", exact=True).locator("visible=true").last.check()
    for view, shown in {
        "Flicker": ".flicker img",
        "Side by side": ".pair img",
        "FLIP map": "img",
        "Difference": "img",
        "Slider": "img",
    }.items():
        page.get_by_label(view, exact=True).locator("visible=true").first.check()
        page.locator(f".view {shown}, {shown}").locator("visible=true").first.wait_for()
        look(page)
    enter(page, "Set")
    page.get_by_label("number input for Pictures of it, from the first").fill("1")
    page.get_by_label("fast", exact=True).locator("visible=true").first.check()
    press(page, "Compare the set")
    wait_for(page, "Each lever added in turn")
    look(page)
    enter(page, "Blind")
    press(page, "Show a pair")
    press(page, "A is the reference")
    wait_for(page, re.compile(r"(0|1) of 1 right"))

    # Tune: stopped after the first configuration.
    enter(page, "Tune")
    page.get_by_label("number input for Steps").locator("visible=true").fill("2")
    press(page, "Tune")
    wait_for(page, re.compile(r"\d+ configurations? measured"))
    look(page)
    press(page, "Stop")
    wait_for(page, re.compile("Stopped; the same settings go on|Done"))

    # Fine-tune: a fault is named, captions are mended, and what was learnt is used.
    enter(page, "Fine-tune")
    for name in ("red", "blue"):
        picture = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(picture).rectangle((30, 30, 98, 98), fill=name)
        picture.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("" if name == "red" else SCRIPT)
    files = page.locator("input[type=file][accept*='.jsonl']")
    files.set_input_files(sorted(tmp_path.iterdir()))
    wait_for(page, "has no caption")
    page.get_by_role("button", name="Clear").locator("visible=true").first.click()
    (tmp_path / "red.txt").write_text("a red tile")
    page.locator("input[type=file][accept*='.jsonl']").set_input_files(sorted(tmp_path.iterdir()))
    wait_for(page, "nothing is wrong")
    page.get_by_label("Name", exact=True).locator("visible=true").fill("../my tiles")
    page.get_by_label("Steps", exact=True).locator("visible=true").fill("2")
    press(page, "Start")
    wait_for(page, "Done: 2 steps")
    look(page)
    press(page, "Use it in Generate")
    page.get_by_label("Prompt", exact=True).first.fill("a red tile --steps 2 --seed 8")
    press(page, "Generate")
    wait_for(page, "seed 8")
    tile = max(served.folder.glob("visitor-*/8-a-red-tile*.png"), key=lambda path: path.stat().st_mtime_ns)
    learnt = (tile.parent / "trainings" / "my-tiles" / adapters.FILE).read_bytes()
    assert [lora["sha256"] for lora in imagegen.read_receipt(tile).loras] == [sha256(learnt).hexdigest()]
