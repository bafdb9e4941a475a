# SPDX-License-Identifier: Apache-2.0
"""The playground: what it says without a page, and the page in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mmcompress.assets import MODELS, model_path
from mmcompress.eval.synthetic.benchmark import items, load, same

import mmcompress as mm
from mmcompress.cli import main
from mmcompress.playground import Playground
from mmcompress.presets import preset

SCREENS = Path("/tmp/mmcompress-app-screens")
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


@pytest.fixture(scope="module")
def ground() -> Playground:
    model, processor = load(model_path())
    return Playground(model, processor, "llava-shapes")


def test_a_question(ground: Playground) -> None:
    (item,) = items(1)
    shown = ground.ask(item.picture, item.question.text, "balanced", 8)
    assert shown.plan == preset("balanced", "llava").plan and f"mm.compress(model, {shown.plan!r})" in shown.code
    assert same(shown.stock, item.question.answer) and shown.cells[1] == 144 and shown.cells[0] < 144
    assert shown.maps and shown.maps[0][1] and shown.overlay.size == (480, 480)
    assert min(shown.milliseconds) > 0 and shown.cost.flops_ratio < 1 and not mm.api.is_compressed(ground.model)
    assert "wug" in ground.ask(item.picture, "what color is the wug ?", "fast", 2).note


def test_what_there_is_to_pick(ground: Playground) -> None:
    choices = ground.choices()
    assert choices[:3] == ["quality", "balanced", "fast"] and {"voronoi", "divprune", "fastv"} <= set(choices)
    for choice in choices:
        assert mm.as_pipeline(ground.plan_of(choice, 25))
    assert ground.plan_of("divprune", 40) == "divprune(keep=0.4)"
    assert "photographs" in ground.about(MODELS) and "sign" in ground.about(MODELS)
    for picture, question, plan, words in (
        (None, "?", "fast", "give a picture"),
        (items(1)[0].picture, " ", "fast", "ask a question"),
        (items(1)[0].picture, "?", "divprun", "did you mean 'divprune'"),
    ):
        with pytest.raises(ValueError, match=words):
            ground.ask(picture, question, plan)


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("mmcompress.cli.app.find_spec", lambda name: None)
    assert main(["app"]) == 2
    assert "pip install 'mmcompress[app]'" in capsys.readouterr().err
    assert main(["app", "llava-shape"]) == 2
    assert "did you mean 'llava-shapes'" in capsys.readouterr().err


# ---------------------------------------------------------------------- the page
@pytest.fixture()
def url(ground: Playground) -> Iterator[str]:
    pytest.importorskip("gradio", reason="no gradio: pip install 'mmcompress[app]'")
    from mmcompress.app import launch

    page, url = launch(ground, wait=False)
    yield url
    page.close()


@pytest.mark.slow
def test_the_page_in_a_browser(browser: Any, url: str, tmp_path: Path) -> None:
    """Upload, ask, change the plan, make a mistake, and hold it like a phone."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    item = next(one for one in items(20, start=3_000_000) if one.question.kind == "color")
    item.picture.save(tmp_path / "mine.png")
    browser.set_window_size(1280, 1000)
    browser.get(url)

    def one(selector: str) -> Any:
        return browser.find_element(By.CSS_SELECTOR, selector)

    def until(what: Any) -> None:
        WebDriverWait(browser, 120).until(what)

    def write(selector: str, text: str) -> None:
        one(selector).send_keys(Keys.CONTROL, "a")
        one(selector).send_keys(text)

    def tokens() -> list[str]:
        return re.findall(r"visual tokens at the end (\d+) (\d+)", " ".join(one("#numbers").text.split()))

    until(
        lambda b: (
            b.find_elements(By.CSS_SELECTOR, "#ask") and b.find_elements(By.CSS_SELECTOR, "#picture input[type=file]")
        )
    )
    assert "photographs" in browser.find_element(By.TAG_NAME, "body").text
    # the plan follows what is picked
    assert one("#plan textarea").get_property("value") == preset("balanced", "llava").plan
    # a picture of one's own
    one("#picture input[type=file]").send_keys(str(tmp_path / "mine.png"))
    until(lambda b: b.find_elements(By.CSS_SELECTOR, "#picture img"))
    write("#question textarea", item.question.text)
    one("#ask").click()
    until(lambda b: one("#compressed textarea").get_property("value"))
    assert same(one("#stock textarea").get_property("value"), item.question.answer)
    assert same(one("#compressed textarea").get_property("value"), item.question.answer)
    assert (
        tokens() == [("144", "36")] and "FLOPs of the prefill" in one("#numbers").text and " ms" in one("#numbers").text
    )
    until(lambda b: b.find_elements(By.CSS_SELECTOR, "#overlay img") and b.find_elements(By.CSS_SELECTOR, "#maps img"))
    assert preset("balanced", "llava").plan in one("#code").text
    # another plan
    write("#plan textarea", "divprune(keep=0.5)")
    one("#ask").click()
    until(lambda b: tokens() == [("144", "72")])
    assert "divprune(keep=0.5)" in one("#code").text
    shoot(browser, "desktop")
    # a mistake says what is right
    write("#plan textarea", "divprun(keep=0.5)")
    one("#ask").click()
    until(lambda b: "did you mean 'divprune'?" in b.find_element(By.TAG_NAME, "body").text)
    # a preset from the list
    choice = one("#choice input")
    choice.click()
    choice.send_keys(Keys.CONTROL, "a")
    choice.send_keys("fast", Keys.ENTER)
    until(lambda b: one("#plan textarea").get_property("value") == preset("fast", "llava").plan)
    # a phone: nothing is wider than the screen
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    browser.refresh()
    until(
        lambda b: (
            b.find_elements(By.CSS_SELECTOR, "#ask") and b.find_elements(By.CSS_SELECTOR, "#picture input[type=file]")
        )
    )
    one("#picture input[type=file]").send_keys(str(tmp_path / "mine.png"))
    until(lambda b: b.find_elements(By.CSS_SELECTOR, "#picture img"))
    write("#question textarea", item.question.text)
    browser.execute_script("document.querySelector('#ask').click()")
    until(lambda b: tokens() and b.find_elements(By.CSS_SELECTOR, "#maps img"))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE["width"]
    assert one("#stock").rect["y"] > one("#ask").rect["y"], "below each other"
    shoot(browser, "phone")


def shoot(browser: Any, name: str) -> None:
    """A picture of the whole page, for whoever has made the folder."""
    if SCREENS.is_dir():
        height = browser.execute_script("return document.documentElement.scrollHeight")
        told = {"captureBeyondViewport": True, "format": "png"}
        width = browser.execute_script("return document.documentElement.clientWidth")
        told["clip"] = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        import base64

        data = browser.execute_cdp_cmd("Page.captureScreenshot", told)["data"]
        (SCREENS / f"{name}.png").write_bytes(base64.b64decode(data))
