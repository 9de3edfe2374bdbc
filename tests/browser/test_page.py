"""The page at `/` in a browser, in front of a host that paints stripes (`make test-browser`)."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

    from browser.painter import Painter

CHROMIUM = os.environ.get("CHROMIUM", "")
if not CHROMIUM:
    pytest.skip("needs a browser: make test-browser", allow_module_level=True)

SIZES = {"wide": (1360, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Painter, str]]:
    from browser.painter import Painter
    from fake_host import listening
    from preheat.gateway.app import create_app
    from preheat.gateway.queued import Queued

    host = Painter(pause=0.02)
    with listening(create_app(Queued(host), local=True)) as url:
        yield host, url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def host(served: tuple[Painter, str]) -> Painter:
    painter = served[0]
    painter.asked.clear()
    painter.warm(False)
    return painter


@pytest.fixture(params=SIZES)
def width(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def errors() -> list[str]:
    """What the console said; the test that expects a refusal empties it."""
    return []


@pytest.fixture
def page(
    browser: Browser, served: tuple[Painter, str], host: Painter, width: str, errors: list[str]
) -> Iterator[Page]:
    across, down = SIZES[width]
    context = browser.new_context(viewport={"width": across, "height": down})
    opened = context.new_page()

    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            errors.append(message.text)

    opened.on("console", heard)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("requestfailed", lambda request: errors.append(f"{request.url} failed"))
    opened.goto(served[1])
    opened.wait_for_selector("#map .chosen", state="attached")
    yield opened
    context.close()
    assert errors == []


def _painted(page: Page, number: int) -> None:
    last = f"#gallery li:nth-child({number}):last-child"
    page.wait_for_selector(last, state="attached")  # a function would be eval, which CSP forbids
    page.wait_for_selector("#progress", state="hidden")


def test_a_picture_is_painted_with_previews(page: Page, host: Painter) -> None:
    page.fill("#prompt", "hills")
    page.fill("#negative", "people")
    page.fill("#steps", "30")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#shown.preview")
    assert "/ 30" in page.inner_text("#steptext")
    _painted(page, 1)
    (asked,) = host.asked
    assert asked["prompt"] == "hills" and asked["negative_prompt"] == "people"
    assert (asked["width"], asked["height"], asked["stream"]) == (512, 512, True)
    assert page.evaluate("document.getElementById('shown').naturalWidth") == 512
    assert page.get_attribute("#shown", "alt") == "hills"
    facts = page.inner_text("#facts")
    assert all(word in facts for word in ("openvino", "bitwise", "25 %", "shown"))


def test_the_same_again_has_the_same_seed_and_a_new_one_has_not(page: Page, host: Painter) -> None:
    page.fill("#prompt", "hills")
    page.click("#go")
    _painted(page, 1)
    page.click("text=The same again")
    _painted(page, 2)
    page.click("#lock")
    page.click("#lock")
    page.click("#go")
    _painted(page, 3)
    first, again, other = host.asked
    assert "seed" not in first and "seed" in again and "seed" not in other
    assert {**again, "seed": 0} == {**first, "seed": 0}


def test_a_size_is_dragged_and_its_bucket_shown(page: Page, host: Painter) -> None:
    box = page.locator("#map").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 14 * box["width"] / 340 + 5, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.52, box["y"] + box["height"] * 0.45, steps=6)
    page.mouse.up()
    across, down = (int(page.input_value(side)) for side in ("#width", "#height"))
    assert 512 < across <= 768 and down < 512 and across % 8 == down % 8 == 0
    said = page.inner_text("#where").replace("\u00d7", "x")
    assert f"{across} x {down} goes into bucket 768 x 512" in said
    assert f"{round(100 * (1 - across * down / (768 * 512)))} % padding" in said
    assert "openvino, 20 ms a step" in said  # of a picture alone
    page.fill("#width", "2000")
    assert "No bucket covers" in page.inner_text("#where")


def _image(page: Page) -> None:
    file = io.BytesIO()
    Image.new("RGB", (320, 240), "teal").save(file, "png")
    picture = {"name": "a.png", "mimeType": "image/png", "buffer": file.getvalue()}
    page.set_input_files("#file", picture)  # type: ignore[arg-type]
    page.wait_for_selector("#masked:not([hidden])")


def test_a_mask_is_painted_over_an_image(page: Page, host: Painter) -> None:
    _image(page)
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5, steps=4)
    page.mouse.up()
    page.fill("#prompt", "hills")
    page.click("#go")
    _painted(page, 1)
    (asked,) = host.asked
    assert (asked["width"], asked["height"], asked["strength"]) == (320, 240, 0.6)
    assert Image.open(io.BytesIO(base64.b64decode(asked["image"]))).size == (320, 240)
    mask = Image.open(io.BytesIO(base64.b64decode(asked["mask_image"]))).convert("L")
    assert mask.size == (320, 240)
    assert mask.getpixel((100, 120)) == 255 and mask.getpixel((300, 20)) == 0


def test_the_mask_can_be_painted_with_the_keyboard(page: Page, host: Painter) -> None:
    _image(page)
    page.focus("#mask")
    for key in ("ArrowLeft", "ArrowLeft", " ", "Shift+ArrowUp"):
        page.keyboard.press(key)
    page.fill("#prompt", "hills")
    page.click("#go")
    _painted(page, 1)
    assert "mask_image" in host.asked[0]
    page.click("#clearmask")
    page.click("#go")
    _painted(page, 2)
    assert "mask_image" not in host.asked[1]


def test_a_snippet_asks_for_the_same(page: Page, host: Painter) -> None:
    page.fill("#prompt", "it's hills")
    page.click("#go")
    _painted(page, 1)
    page.click("text=Snippet")
    curl = page.inner_text("#code")
    assert "/predictions/tiny" in curl and "it'\\''s hills" in curl
    page.click("#aspython")
    python = page.inner_text("#code")
    compile(python, "snippet", "exec")
    asked = json.loads(python[python.index("{") : python.index("}") + 1])
    assert asked["prompt"] == "it's hills" and isinstance(asked["seed"], int)
    page.keyboard.press("Escape")
    page.wait_for_selector("#snippet", state="hidden")


def test_what_goes_wrong_is_said(page: Page, host: Painter, errors: list[str]) -> None:
    page.fill("#prompt", "break")
    page.click("#go")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error") == "it raised"
    page.fill("#prompt", "refuse")
    page.click("#go")
    page.wait_for_selector("#error:has-text('refused')")
    assert [error for error in errors if "400" not in error] == []
    errors.clear()  # the browser itself notes an answer of 400


def test_painting_can_be_cancelled(page: Page, host: Painter, errors: list[str]) -> None:
    page.fill("#prompt", "hills")
    page.fill("#steps", "40")  # the host paints on: its place is taken for some seconds
    page.click("#go")
    page.wait_for_selector("#shown.preview")
    page.click("#cancel")
    page.wait_for_selector("#progress", state="hidden")
    assert page.locator("#gallery li").count() == 0
    assert all("failed" in error for error in errors)
    errors.clear()  # the request that was given up


def test_the_workers_have_their_tab(page: Page, host: Painter) -> None:
    page.focus("#tab-paint")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#workers table")
    assert page.is_hidden("#paint")
    shown = page.inner_text("#workers")
    assert "compiles since READY" in shown and "768x512" in shown and "20 ms" in shown
    host.warm(True)
    page.wait_for_selector("#workers progress")
    assert "2 / 4" in page.inner_text("#workers .warm")
    assert "warming 6/12" in page.inner_text("#state")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_stands_in_the_way_of_a_screen_reader(
    page: Page, host: Painter, scheme: str
) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    _image(page)
    page.fill("#prompt", "hills")
    page.click("#go")
    _painted(page, 1)
    assert _findings(page) == []
    page.click("text=Snippet")
    assert _findings(page) == []
    page.click("#close")
    page.click("#tab-workers")
    page.wait_for_selector("#workers table")
    assert _findings(page) == []


def _findings(page: Page) -> list[Any]:
    """What axe-core finds serious."""
    axe = resources.files("axe_playwright_python") / "axe.min.js"
    page.evaluate(axe.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document)")
    return [
        (each["id"], each["impact"], [node["html"][:120] for node in each["nodes"]])
        for each in found["violations"]
        if each["impact"] in ("serious", "critical", "moderate")
    ]


def test_nothing_is_wider_than_the_screen(page: Page, width: str) -> None:
    for tab in ("#tab-paint", "#tab-workers"):
        page.click(tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[width][0]
