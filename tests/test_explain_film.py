# SPDX-License-Identifier: Apache-2.0
"""Videos over time: every number of sheets and curves is that of the trace, every time that of the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmcompress.adapters import adapter_for
from mmcompress.assets import model_path
from mmcompress.eval.synthetic.benchmark import load
from mmcompress.eval.synthetic.videos import video_items
from PIL import Image

import mmcompress as mm
from mmcompress.cli import main
from mmcompress.explain import Seen, Word
from mmcompress.explain.fates import DROPPED, KEPT, MERGED, steps
from mmcompress.explain.film import films
from mmcompress.explain.prompt import Prompt
from mmcompress.explain.session import Session
from mmcompress.videos import Clip, read_video
from mmcompress.visualize import (
    contact_sheet,
    headlines,
    kept_animation,
    kept_sheet,
    page,
    tokens_figure,
    word_animation,
    word_strip,
)
from mmcompress.visualize.film import frame_label, stage_name
from mmcompress.visualize.headline import Gain
from mmcompress.visualize.legend import strip, swatch, wrapped

from .families import build, image, prompts, video
from .test_visualize_page import data_of

TIMES = (0.0, 0.1, 0.5, 0.6, 1.4, 1.5, 2.0, 2.2, 3.3)
"""Nine frames, that is five of an encoder that takes two at a time."""
PLAN = "flashvid(keep=0.4)"


def moving(count: int = len(TIMES), times: tuple[float, ...] | None = TIMES) -> Clip:
    frames = np.stack([np.full((48, 48, 3), 20 * i, np.uint8) for i in range(count)])
    return Clip(
        frames, None if times is None else np.asarray(times), tuple(range(count)), count, 3.0 if times else None
    )


@pytest.fixture(scope="module")
def watcher() -> tuple[Any, Any]:
    return load(model_path("qwen3-vl-video"))


@pytest.fixture(scope="module")
def found(watcher: tuple[Any, Any]) -> mm.Explanation:
    (item,) = video_items(1)
    with mm.compressed(watcher[0], PLAN):
        return mm.token_activation_map(*watcher, item.clip(), item.question.text, video=True, max_new_tokens=3)


# ---------------------------------------------------------------------- counts
def test_tokens_of_each_frame_are_those_of_the_trace(found: mm.Explanation) -> None:
    (film,), (visual,) = found.films, found.trace.visuals
    assert len(film) == visual.layout.frames == 8 and film.name == "video 1"
    decided = steps(found.trace)
    assert film.tokens.shape == (len(decided), 8) and len(decided) == 3
    each = visual.tokens // 8
    for row, step in zip(film.tokens, decided, strict=True):
        assert int(row.sum()) == step.tokens
    for layer, row in ((0, film.tokens[1]), (99, film.tokens[2])):
        kept = visual.kept_cells(layer)
        assert torch.bincount(kept // each, minlength=8).equal(row)
    assert film.fates.sum(-1).eq(each).all(), "every cell has one fate"
    for i in range(8):
        fates = decided[-1].fate[i * each : (i + 1) * each]
        assert film.fates[-1, i].tolist() == [int((fates == kind).sum()) for kind in (KEPT, MERGED, DROPPED)]
        assert frame_label(film, i).startswith(f"frame {i}, {i * 1.0:.2f} s: {film.tokens[-1, i]} tokens\n")
    assert stage_name(film, 0) == "all tokens" and stage_name(film, 1).startswith("before the LLM: flashvid_merge")


def test_a_word_over_time_is_the_most_of_each_frame(found: mm.Explanation) -> None:
    word = found.answer_words[0]
    text = found.words[word].text
    values = found.word_map(word).view(8, -1)
    expected = [float("nan") if row.isnan().all() else row[~row.isnan()].max().item() for row in values]
    assert found.over_time(text.upper()).tolist() == pytest.approx(expected, nan_ok=True)
    assert found.over_time(word).equal(found.over_time(text)) or found.over_time(word).isnan().any()
    with pytest.raises(ValueError, match=f"word='horse' is not there .*words of the answer: '{text}'.*'which'"):
        found.over_time("horse")
    with pytest.raises(ValueError, match="film=1: there are 1"):
        found.over_time(word, film=1)


def test_words_of_the_answer_come_before_those_of_the_question(found: mm.Explanation) -> None:
    words = (*found.words[:-1], dataclasses.replace(found.words[-1], text=found.words[0].text))
    assert dataclasses.replace(found, words=words).find(f" {found.words[0].text} ")[0] == len(words) - 1


# ---------------------------------------------------------------------- times
def test_times_are_those_of_the_frames_that_are_shown(watcher: tuple[Any, Any]) -> None:
    """An odd number of frames too: the picture and the time of a pair are those of its first."""
    for clip in (moving(), moving(times=None), moving(1)):
        one = mm.token_activation_map(*watcher, clip, "what comes first ?", video=True, answer="left")
        if len(clip) == 1:
            assert one.films == ()  # one frame is a picture
            with pytest.raises(ValueError, match="film=0: nothing here has frames; give a video with video=True"):
                one.over_time("left")
            continue
        (film,) = one.films
        assert film.times == (None if clip.times is None else (0.0, 0.5, 1.4, 2.0, 3.3))
        assert [film.label(i) for i in (0, 4)] == (
            ["0.00 s", "3.30 s"] if clip.times is not None else ["frame 0", "frame 4"]
        )
        shown = [data_of(page([one]).html)["runs"][0]["visuals"][0]["panes"][i]["picture"] for i in range(5)]
        assert len(set(shown)) == 5
        seen = one.visuals[0]
        from mmcompress.visualize.overlay import picture_of

        greys = [picture_of(seen.pictures, seen.panes, pane).getpixel((5, 5))[0] // 20 for pane in seen.panes]
        assert greys == [0, 2, 4, 6, 8]
    assert moving().times is not None and film.milliseconds() == [500] * 5
    assert dataclasses.replace(film, times=(0.0, 0.05, 1.05, 9.0, 9.5)).milliseconds() == [120, 1000, 2000, 500, 500]


def test_times_are_those_of_the_file(watcher: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed (pip install 'mmcompress[video]')")
    from .test_videos import VARIED, write

    write(tmp_path / "a.mp4", "libx264", VARIED, 96, 64, {})
    clip = read_video(tmp_path / "a.mp4", 8)
    (film,) = mm.token_activation_map(*watcher, clip, "what comes first ?", video=True, answer="left").films
    true = [VARIED[i] - VARIED[0] for i in clip.indices[::2]]
    assert film.times == pytest.approx(true, abs=1e-3)


def test_a_video_that_is_a_row_of_pictures_is_one_film(found: mm.Explanation) -> None:
    """As InternVL takes them."""
    (seen,) = found.visuals
    each = len(seen.valid) // 8
    layout = dataclasses.replace(seen.layout, views=(dataclasses.replace(seen.layout.views[0], role="image"),))

    def single(i: int) -> Seen:
        part = slice(i * each, (i + 1) * each)
        return Seen(
            "image", layout, seen.valid[part], seen.kept[part], seen.pictures[2 * i : 2 * i + 1], (float(i),), i
        )

    rows = [single(i) for i in range(8)]
    (film,) = films(rows, steps(found.trace))
    assert film.times == found.films[0].times and film.tokens.equal(found.films[0].tokens)
    assert film.places == tuple((i, 0) for i in range(8))
    picture = dataclasses.replace(single(0), frame=None)
    assert films([picture, picture], steps(found.trace)) == ()
    two = films([*rows[:4], *rows[:4]], steps(found.trace))
    assert [len(one) for one in two] == [4, 4]


@torch.no_grad()
def test_frames_and_times_of_a_row_of_pictures() -> None:
    """A session gives each picture its frame and its time; one picture alone is no video."""
    model = build("internvl")
    for count in (3, 1):
        inputs = prompts(model, "internvl", [[2, *[image("internvl")] * count, 5]])
        with mm.compressed(model, "uniform(keep=0.5)"):
            model(**inputs)
            frames = tuple(Image.new("RGB", (8, 8), (i, i, i)) for i in range(count))
            prompt = Prompt(dict(inputs), [], [frames], "x", (0.0, 0.5, 2.0)[:count])
            session = Session(model, adapter_for(model), None, None, prompt, None, 0)
            session.trace = mm.trace(model)
            seen = session._seen(session.rows())
        assert [one.frame for one in seen] == ([0, 1, 2] if count == 3 else [None])
        assert [one.times for one in seen] == [(0.0,), (0.5,), (2.0,)][:count]
        assert [one.pictures[0].getpixel((0, 0))[0] for one in seen] == list(range(count))
        (film,) = films(seen, steps(session.trace)) or (None,)
        assert film.times == (0.0, 0.5, 2.0) if count == 3 else film is None


@torch.no_grad()
def test_a_trace_with_a_clip_has_times_too() -> None:
    model = build("llava_onevision")
    inputs = prompts(model, "llava_onevision", [[3, video("llava_onevision"), 5]])
    with mm.compressed(model, "divprune(keep=0.5)"):
        model(**inputs)
        trace = mm.trace(model)
    data = data_of(mm.show(trace, moving(3, (0.0, 0.5, 2.0))).html)
    (film,) = data["runs"][0]["films"]
    assert film["times"] == [0.0, 0.5, 2.0] and sum(film["tokens"][-1]) == trace.visuals[0].kept
    assert data_of(mm.show(trace).html)["runs"][0]["films"][0]["labels"] == ["frame 0", "frame 1", "frame 2"]


# ---------------------------------------------------------------------- pictures
def test_sheets_animations_and_curves(found: mm.Explanation, tmp_path: Path) -> None:
    (film,) = found.films
    word = found.answer_words[0]
    sheet = Image.open(kept_sheet(found, film, tmp_path / "sheet.png"))
    assert sheet.width == 3 * 326 + 6 and sheet.height > 3 * 320
    for path in (kept_animation(found, film, tmp_path / "a.webp"), word_animation(found, 0, word, tmp_path / "b.webp")):
        assert Image.open(path).n_frames == 8  # type: ignore[attr-defined]
    strip_ = Image.open(word_strip(found, 0, [word, 0], tmp_path / "strip.png"))
    assert strip_.width == 8 * 186 + 6 and strip_.height > 2 * 180
    assert tokens_figure([found], tmp_path / "curve.png").stat().st_size > 1000


def test_a_contact_sheet_has_its_legend_and_its_labels(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (200, 100), "red")] * 3
    plain = Image.open(contact_sheet(frames, tmp_path / "a.png"))
    full = Image.open(contact_sheet(frames, tmp_path / "b.png", 3, labels=["a\nb"] * 3, title="x", legend="fate"))
    assert full.width == 3 * 206 + 6 and full.height > 100 + 2 * 17 + strip(full.width).height and plain.height > 200
    assert strip(200).height > strip(600).height, "a narrow one has more lines"
    assert wrapped("one two", 10_000) == ["one two"] and len(wrapped("one two", 30)) == 2
    assert wrapped("x" * 500, 100)[0].endswith("…")
    swatches = {np.asarray(swatch(name, 30, 13)).tobytes() for name in ("kept", "merged", "dropped", "ramp", "none")}
    assert len(swatches) == 5


# ---------------------------------------------------------------------- one sentence
def test_the_headline_says_tokens_flops_time_and_answers(found: mm.Explanation) -> None:
    last = steps(found.trace)[-1]
    stock = dataclasses.replace(found, plan="")
    ((name, said),) = headlines([stock, found])
    assert name == found.plan and said.startswith(f"{last.tokens} of {len(last.stands)} visual tokens left; ")
    assert "fewer FLOPs of the LLM layers" in said and said.endswith(f"answer “{found.answer}”, as stock")
    ((_, said),) = headlines([stock, found], {found.plan: Gain(0.6, (40.0, 26.5))})
    assert "40 % fewer FLOPs of the prefill, vision included; first token in 26 ms here, stock 40 ms" in said
    ((_, said),) = headlines([found], {found.plan: Gain(1.2)})
    assert "20 % more FLOPs" in said and "first token" not in said
    ((name, said),) = headlines([stock])
    assert name == "stock model" and "FLOPs" not in said


def test_the_page_opens_with_the_word_that_is_named(found: mm.Explanation) -> None:
    assert data_of(page([found]).html)["word"] == found.answer_words[0]
    asked = next(i for i, word in enumerate(found.words) if word.part == "question")
    assert data_of(page([found], words=["nothing", found.words[asked].text]).html)["word"] == asked
    assert Word("", (), "answer") not in found.words


# ---------------------------------------------------------------------- the command
def test_the_command_with_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        Image.fromarray(moving(3).frames[i]).save(tmp_path / f"{i}.png")
    given = ["explain", "qwen3-vl-video", "--video", "--question", "what comes first ?", "--max-new-tokens", "2"]
    given += [part for i in range(3) for part in ("--image", str(tmp_path / f"{i}.png"))]
    given += ["--plan", "evs(keep=0.5)", "--no-gradients", "--out", str(tmp_path / "out")]
    assert main([*given, "--word", "horse"]) == 2
    said = capsys.readouterr().err
    assert "--word='horse' is not there (words of the answer: '" in said and not (tmp_path / "out").exists()
    assert main([*given, "--word", "First"]) == 0
    said = capsys.readouterr().out
    assert (
        "evs(keep=0.5): " in said and "visual tokens left" in said and "FLOPs of the prefill, vision included" in said
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"index.html", "kept_frames.png", "kept_frames.webp", "tokens_per_frame.png"} <= names
    assert "token-activation-map_compressed_frames.png" in names and "token-activation-map.png" not in names
    data = data_of((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert data["runs"][0]["words"][data["word"]]["text"] == "first"
    assert data["runs"][0]["films"][0]["times"] is None, "frames without a file have no times"


# ---------------------------------------------------------------------- a real browser
def test_the_film_in_a_browser(browser: Any, found: mm.Explanation, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    stock = dataclasses.replace(found, plan="")
    browser.get(page([stock, found], about="a model").save(tmp_path / "index.html").as_uri())
    WebDriverWait(browser, 20).until(lambda b: len(b.find_elements(By.CSS_SELECTOR, ".shot")) == 16)
    (film,) = found.films

    def all_of(selector: str) -> list[Any]:
        return list(browser.find_elements(By.CSS_SELECTOR, selector))

    shots = [one.text.split("\n") for one in all_of("article.reduced .shot")][-8:]
    assert shots == [[f"{i}.00 s", f"{film.tokens[-1, i]} tokens"] for i in range(8)]
    assert "flashvid" in all_of(".headline")[0].text and all_of(".headline")[0].text.startswith("a model · ")
    # curves: one per stage; their sums are the tokens
    keys = [one.text for one in all_of(".curve:first-child li")]
    assert [int(key.rsplit("(", 1)[1].rstrip(")")) for key in keys] == film.tokens.sum(1).tolist()
    assert len(all_of(".curve:first-child .dots")) == 3

    # a click on the strip, the slider, a click on the curve
    def pictured() -> str:
        return str(browser.execute_script("return document.querySelectorAll('.views canvas')[1].toDataURL()"))

    before = pictured()
    all_of(".shot")[12].send_keys(Keys.ENTER)
    assert browser.find_element(By.ID, "frame-is").text == "4 at 4.00 s" and pictured() != before
    assert browser.switch_to.active_element.get_attribute("data-frame") == "4", "the focus stays"
    browser.find_element(By.ID, "frame").send_keys(Keys.ARROW_RIGHT)
    assert browser.find_element(By.ID, "frame-is").text == "5 at 5.00 s"
    assert len(all_of(".shot[aria-pressed=true]")) == 2
    browser.execute_script(
        "const s = document.querySelector('.curve svg'), r = s.getBoundingClientRect();"
        "s.dispatchEvent(new MouseEvent('click', {clientX: r.left + 2, clientY: r.top + 9, bubbles: true}))"
    )
    assert browser.find_element(By.ID, "frame-is").text == "0 at 0.00 s"
    # maps over time
    browser.execute_script("document.querySelector('[value=map]').click()")
    values = found.over_time(found.answer_words[0]).tolist()
    shots = [one.text.split("\n")[1] for one in all_of(".shot")][-8:]
    assert shots == ["no token" if value != value else f"up to {round(value * 254) / 254:.2f}" for value in values]
    # a phone, dark: what was kept is on the first screen, and nothing is wider than it
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_script("document.querySelector('[value=fate]').click()")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    where = "return document.querySelector('article.reduced canvas').getBoundingClientRect().top + scrollY"
    assert browser.execute_script(where) < 600
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_pictures_have_no_section_over_time(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    model = build("llava")
    with mm.compressed(model, "divprune(keep=0.5)"), torch.no_grad():
        model(**prompts(model, "llava", [[3, image("llava"), 5]]))
        browser.set_window_size(1280, 900)
        browser.get(mm.show(mm.trace(model)).save(tmp_path / "index.html").as_uri())
    assert not browser.find_element(By.ID, "time").is_displayed()
    canvas = browser.find_element(By.TAG_NAME, "canvas").rect
    height = browser.execute_script("return innerHeight")
    assert canvas["y"] < 0.45 * height and canvas["y"] + canvas["height"] <= height, "above the fold"
