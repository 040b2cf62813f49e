"""The README's screenshots of the demo: a picture beside its reference, a whole set in the dark, a telephone."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import imagegen
from imagegen import server

SEED = 7
PATIENCE_MS = 90_000
DESK, TELEPHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


def photograph(model: imagegen.Model, folder: Path) -> None:
    """Drive the demo in Chromium and write `demo.png`, `demo-set.png` and `demo-telephone.png`."""
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium")
    if browser_path is None:
        raise SystemExit("the demo's screenshots need Chromium: apt-get install chromium")
    with (
        tempfile.TemporaryDirectory() as out,
        server.launch(model, port=0, output_dir=Path(out), background=True) as demo,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])

        def visit(screen: dict[str, int], scheme: str) -> Any:
            page = browser.new_page(viewport=screen, color_scheme=scheme)
            page.set_default_timeout(PATIENCE_MS)
            page.goto(demo.url)
            page.get_by_label("Prompt", exact=True).first.fill(f"a red apple --seed {SEED}")
            page.get_by_role("button", name="Generate", exact=True).click()
            page.get_by_text("steps in").first.wait_for()
            page.get_by_role("button", name="Generate", exact=True).wait_for()
            return page

        page = visit(DESK, "light")
        page.get_by_role("button", name="Measure the tiers on this machine").click()
        page.get_by_text("Measured").first.wait_for()
        page.get_by_role("button", name="Measure the tiers on this machine").wait_for()  # the run has ended
        compare(page)
        page.screenshot(path=folder / "demo.png")
        page.close()

        page = visit(TELEPHONE, "light")
        page.locator(".theatre").scroll_into_view_if_needed()
        page.screenshot(path=folder / "demo-telephone.png")
        page.close()

        page = visit(DESK, "dark")
        compare(page)
        page.get_by_role("tab", name="Set", exact=True).click()
        page.get_by_label("fast", exact=True).locator("visible=true").first.check()
        page.get_by_role("button", name="Compare the set").click()
        page.get_by_text("Each lever added in turn").first.wait_for()
        page.wait_for_timeout(1500)  # the gallery's pictures are drawn
        page.screenshot(path=folder / "demo-set.png", full_page=True)
        browser.close()


def compare(page: Any) -> None:
    """Hold the picture that was made against stock diffusers', with the fast tier beside it."""
    page.get_by_role("button", name="Compare", exact=True).locator("visible=true").first.click()
    page.get_by_label("fast", exact=True).locator("visible=true").first.check()
    page.get_by_role("button", name="Compare", exact=True).locator("visible=true").last.click()
    page.get_by_text("Where the time goes").locator("visible=true").first.wait_for()
    page.wait_for_timeout(1500)  # the slider's pictures are drawn
