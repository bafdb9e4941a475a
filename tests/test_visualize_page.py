# SPDX-License-Identifier: Apache-2.0
"""The HTML page: self-contained, safe, and working in a real browser."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcompress.assets import model_path
from mmcompress.eval.synthetic import items
from mmcompress.eval.synthetic.benchmark import load
from PIL import Image

import mmcompress as mm
from mmcompress.cli import main
from mmcompress.explain import EXPLANATIONS, Token, Word, unaffordable
from mmcompress.explain.afford import activation_bytes
from mmcompress.explain.beside import NAMES, explained
from mmcompress.visualize import faithfulness, page, write_all

from . import reference  # noqa: F401 - registers pairs_mean
from .families import build, image, prompts, video

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & \u2028 $x^2$ {{ 7 * 7 }}"
PLAN = "prumerge(keep=0.4) >> fastv(layer=2, keep=0.5)"
VOID = {"meta", "link", "input", "img", "br"}


class Parsed(HTMLParser):
    """Tags, attributes and the content of scripts; complains about tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data


@torch.no_grad()
def maps_of(family: str, plan: str = "", visual: Any = None, answer: tuple[int, ...] = (31, 77)) -> mm.Explanation:
    model = build(family)
    inputs = prompts(model, family, [[3, visual or image(family), 5]])
    if plan:
        mm.compress(model, plan)
    return mm.token_activation_map(model, None, inputs=inputs, answer=list(answer))


@pytest.fixture(scope="module")
def tiled() -> list[mm.Explanation]:
    """The embedded model with tiles and thumbnail, stock and compressed, by two methods."""
    model, processor = load(model_path("llava-next-shapes"))
    item = items(3, stretched=True)[1]
    return explained(model, processor, [item.picture], item.question.text, PLAN, NAMES[:2])


def data_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Parsed(text).scripts[0])
    return found


# ---------------------------------------------------------------------- the file
def test_valid_and_self_contained(tiled: list[mm.Explanation], tmp_path: Path) -> None:
    text = page(tiled).save(tmp_path / "x" / "index.html").read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert not re.search(r"https?:|//[a-z]+\.[a-z]", text, re.IGNORECASE)
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    numbers = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(numbers) == len(set(numbers))
    labelled = {a.get("for") for tag, a in parsed.tags if tag == "label"}
    inside = "<label" in text  # radios and the select lie in their labels
    for tag, attributes in parsed.tags:
        if tag == "input" and attributes.get("type") == "range":
            assert attributes["id"] in labelled or inside
    assert ("html", {"lang": "en"}) in parsed.tags
    assert any(a.get("aria-live") == "polite" for _, a in parsed.tags)
    data = data_of(text)
    assert [run["method"] for run in data["runs"]] == ["token activation map", "attention rollout"] * 2
    assert {p["role"] for p in data["runs"][0]["visuals"][0]["panes"]} == {"tiles", "thumbnail"}
    assert len(data["pictures"]) == 1, "once, not once for each run"
    assert data["stops"][:3] == ["all tokens", "before the LLM, stage 1", "layer 0"]


def test_the_page_says_what_the_explanation_says(tiled: list[mm.Explanation]) -> None:
    run, found = data_of(page(tiled).html)["runs"][2], tiled[2]
    assert found.plan and run["name"] == found.plan and run["answer"] == found.answer
    maps = bytes_of(run)
    for word in range(len(found.words)):
        expected = found.word_map(word)
        assert ((maps[word] == 255) == expected.isnan()).all()
        there = ~expected.isnan()
        torch.testing.assert_close(maps[word][there] / 254, expected[there], atol=3e-3, rtol=0)
    last = run["steps"][run["at_stop"][-1]]
    assert [to >= 0 for to in last["stands"]] == found.visuals[0].valid.tolist()
    assert last["tokens"] == len(found.trace.visuals[0].kept_cells(99))


def bytes_of(run: dict[str, Any]) -> torch.Tensor:
    """Maps [words, cells] of a run."""
    held = torch.frombuffer(bytearray(base64.b64decode(run["maps"])), dtype=torch.uint8)
    return held.view(len(run["words"]), -1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl"])
def test_two_pictures_words_of_several_tokens_and_merges_of_two(family: str) -> None:
    """Every number of the page by hand: cells are those of all pictures, one after the other."""
    model = build(family)
    inputs = prompts(model, family, [[3, image(family), 2, image(family, other=True), 5]])
    mm.compress(model, "pairs_mean(keep=0.5)")
    found = mm.token_activation_map(model, None, inputs=inputs, answer=[31, 77, 58])
    asked = len(found.tokens) - 3
    words = (
        Word("what", tuple(range(asked)), "question"),
        Word("ab", (asked, asked + 1), "answer"),
        Word("c", (asked + 2,), "answer"),
    )
    run = data_of(page([dataclasses.replace(found, words=words)]).html)["runs"][0]
    counts = [len(seen.valid) for seen in found.visuals]
    assert [(v["first"], v["cells"]) for v in run["visuals"]] == [(0, counts[0]), (counts[0], counts[1])]
    for visual, seen in zip(run["visuals"], found.visuals, strict=True):
        cells = [cell for pane in visual["panes"] for cell in pane["cells"]]
        assert sorted(cells) == [*range(visual["first"], visual["first"] + visual["cells"])]
        for shown, pane in zip(visual["panes"], seen.panes, strict=True):
            assert shown["cells"] == (visual["first"] + pane.cells).flatten().tolist() and shown["grid"] == list(
                pane.grid
            )
    held, known = bytes_of(run), found.maps.nan_to_num(-1)
    assert [word["text"] for word in run["words"]] == ["what", "ab", "c"]
    for i, word in enumerate(words):
        expected = torch.stack([known[t] for t in word.tokens]).amax(0)
        torch.testing.assert_close(held[i] / 254, expected.masked_fill(expected < 0, 255 / 254), atol=2.1e-3, rtol=0)
        assert run["words"][i]["strength"] == pytest.approx(expected.max().item(), rel=6e-3)
        chance = found.tokens[word.tokens[0]].probability
        assert run["words"][i]["probability"] == (chance and pytest.approx(chance, rel=6e-3))
        for j, other in enumerate(words):
            values = [v for t in word.tokens for o in other.tokens if not math.isnan(v := found.relevance[t, o].item())]
            assert run["relevance"][i][j] == (pytest.approx(max(values), rel=6e-3, abs=1e-9) if values else None)
    step, total = run["steps"][-1], sum(counts)
    pairs = [first + i // 2 * 2 for first, n in zip((0, counts[0]), counts, strict=True) for i in range(n)]
    assert step["stands"] == pairs and step["fates"] == [total // 2, total // 2, 0] and step["tokens"] == total // 2
    assert set(map(int, step["hues"])) == set(pairs), "a merge of two has a colour"
    assert run["steps"][0]["fates"] == [total, 0, 0] and not run["steps"][0]["hues"]
    assert 0.3 < run["flops"] < 0.8


def test_it_opens_with_what_was_kept_unless_nothing_was_dropped(tiled: list[mm.Explanation]) -> None:
    text = page(tiled, about="a model", notes=["something is left out"]).html
    parsed, run = Parsed(text), data_of(text)["runs"][2]
    kept, merged, dropped = run["steps"][-1]["fates"]
    assert kept == len(tiled[2].trace.visuals[0].kept_cells(99)) and merged and kept + merged + dropped == 312
    assert f"{kept} of 312 kept, {merged} merged into them, {dropped} dropped" in parsed.text
    assert "a model" in parsed.text and "something is left out" in parsed.text
    assert ("input", {"type": "radio", "name": "mode", "value": "fate", "checked": None}) in parsed.tags
    faithful = data_of(text)["faithful"]
    assert faithful["token activation map"].startswith(
        "F1-IoU 16.2 ± 1.8 % (llava-next-shapes, 127 questions); not measured with prumerge"
    )
    assert faithfulness([maps_of("llava")]) == {"token activation map": "not measured for this model"}


def test_hostile_text_stays_text() -> None:
    found = maps_of("llava")
    tokens = (Token(5, HOSTILE, "question"), *found.tokens[1:])
    words = (Word(HOSTILE, (0,), "question"), *found.words[1:])
    text = page([dataclasses.replace(found, tokens=tokens, words=words)]).html
    parsed = Parsed(text)
    assert [tag for tag, _ in parsed.tags].count("script") == 3
    assert not any(tag == "img" or any(n.startswith("onerror") for n in a) for tag, a in parsed.tags)
    assert "alert(1)" in parsed.text, "the title shows it"
    assert "{{ 7 * 7 }}" in re.findall(r"<title>(.*?)</title>", text, re.DOTALL)[0]
    assert data_of(text)["runs"][0]["words"][0]["text"] == HOSTILE
    assert HOSTILE.split("<script>")[0] not in text.replace("</script>\n", "")


def test_show_takes_traces_and_explanations(tmp_path: Path) -> None:
    model = build("llava")
    inputs = prompts(model, "llava", [[3, image("llava"), 5], [3, 5, 2]])
    with mm.compressed(model, "divprune(keep=0.5)"), torch.no_grad():
        model(**inputs)
        trace = mm.trace(model)
    shown = mm.show(trace, Image.new("RGB", (40, 40), "red"))
    frame = Parsed(shown._repr_html_())
    assert [tag for tag, _ in frame.tags] == ["iframe"]
    assert frame.tags[0][1]["srcdoc"] == shown.html
    assert data_of(shown.html)["runs"][0]["words"] == []
    assert len(repr(shown)) < 200
    mm.show(trace)  # grey
    mm.show(maps_of("llava"))
    for wrong, message in (
        (lambda: mm.show(trace, row=1), "row=1"),
        (lambda: mm.show(trace, [Image.new("RGB", (4, 4))] * 2), "2 pictures for 1"),
        (lambda: mm.show([3]), "int"),
        (lambda: mm.show([]), "at least one"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            wrong()


def test_every_family_and_videos_are_written(tmp_path: Path) -> None:
    for family, visual in (("qwen3_vl", None), ("internvl", None), ("qwen3_vl", video("qwen3_vl"))):
        found = [maps_of(family, plan, visual) for plan in ("", "divprune(keep=0.5) >> fastv(layer=2, keep=0.5)")]
        paths = write_all(found, tmp_path / family)
        assert all(path.stat().st_size > 100 for path in paths)
        names = [path.name for path in paths]
        assert names[:3] == ["index.html", "stages.png", "scores.png"]
        film = {"kept_frames.png", "kept_frames.webp", "tokens_per_frame.png", "token-activation-map_stock_frames.webp"}
        assert film <= set(names) if visual else not film & set(names)


# ---------------------------------------------------------------------- the command
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(NAMES) == len(EXPLANATIONS)
    picture = tmp_path / "a.png"
    items(1)[0].picture.save(picture)
    out = tmp_path / "out"
    given = ["explain", "llava-shapes", "--image", str(picture), "--question", "what shape is red ?", "--out", str(out)]
    assert main([*given, "--plan", "divprune(keep=0.5)", "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert f"page: {(out / 'index.html').as_uri()}" in said
    assert (
        "gradient relevance: F1-IoU 45.6 ± 4.1 % (llava-shapes, 14 questions); not measured with divprune(keep=0.5)"
        in said
    )
    assert main([*given, "--no-gradients", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().out
    assert "gradient" not in said and "no --plan: nothing was dropped" in said and "does not know" not in said
    given[5] = "what is the dog doing ?"
    assert main([*given, "--no-gradients", "--max-new-tokens", "2"]) == 0
    assert "words that this model does not know" in capsys.readouterr().out
    text = (out / "index.html").read_text(encoding="utf-8")
    assert "<title>what is the dog doing ?</title>" in text and "words that this model does not know" in text
    assert {"index.html", "stages.png", "layers.png", "token-activation-map.png"} <= {p.name for p in out.iterdir()}
    assert main([*given[:3], str(tmp_path / "none.png"), *given[4:]]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([*given, "--plan", "divprun(keep=0.5)"]) == 2
    assert "divprune" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items(1)[0].picture.save(tmp_path / "a.png")
    given = [
        "explain",
        "llava-shapes",
        "--image",
        str(tmp_path / "a.png"),
        "--question",
        "x",
        "--out",
        str(tmp_path / "out"),
    ]
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main([*given, "--max-new-tokens", "2"]) == 0
    assert "pip install 'mmcompress[viz]'" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["index.html"]
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr("mmcompress.explain.beside.explained", None)  # it is said before any work
    assert main(given) == 2
    assert "the HTML page needs jinja2: pip install 'mmcompress[viz]'" in capsys.readouterr().err


# ---------------------------------------------------------------------- which maps
@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load(model_path())


def both(found: list[mm.Explanation]) -> list[tuple[str, str]]:
    return [(one.plan, one.method) for one in found]


def test_gradients_stand_beside_the_map_of_words(embedded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = embedded
    (item,) = items(1)
    said: list[str] = []
    ask = functools.partial(
        explained, model, processor, [item.picture], item.question.text, say=said.append, max_new_tokens=3
    )
    words, gradients, plan = "token activation map", "gradient relevance", "divprune(keep=0.25)"
    found = ask(plan)
    assert both(found) == [("", words), ("", gradients), (plan, words), (plan, gradients)] and not said
    assert found[1].answer_ids == found[0].answer_ids and found[3].answer_ids == found[2].answer_ids
    assert all(one.answer_ids == found[0].answer_ids for one in ask(plan, same_answer=True))
    assert both(ask(None, NAMES[:1])) == [("", words)]
    # a plan that rewrites attention: the model refuses, the page says why
    sinks = "var_attention_sink(dims=(3, 5))"
    assert both(ask(sinks)) == [("", words), ("", gradients), (sinks, words)]
    (reason,) = said
    assert reason.startswith(f"{sinks} without gradient relevance: ") and "rewrites attention" in reason
    # too much: by memory, and on the CPU by size
    for name, value, why in (
        (
            "free_bytes",
            lambda device: 2**20,
            r"stock model without gradient relevance: activations of 1\d\d tokens take about 0.0 GiB",
        ),
        ("CPU_PARAMETERS", 1e5, "billion parameters on the CPU would take a backward pass for every token"),
    ):
        said.clear()
        with monkeypatch.context() as patch:
            patch.setattr(f"mmcompress.explain.afford.{name}", value)
            assert both(ask(None)) == [("", words)]
            assert both(ask(None, NAMES[3:4])) == [("", gradients)], "whoever names it gets it"
        assert len(said) == 1 and re.search(why, said[0])


def test_what_gradients_need() -> None:
    """The estimate is above what autograd really keeps, but no more than four times."""
    for family in ("llava", "qwen3_vl", "internvl"):
        for attention in ("sdpa", "eager"):
            model = build(family, attention=attention)
            inputs = prompts(model, family, [[3, image(family), 40]])
            text = model.model.language_model
            embeds = torch.randn(1, inputs["input_ids"].shape[1], 64, requires_grad=True)
            held: dict[int, int] = {}

            def keep(x: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
                held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            model.requires_grad_(False)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                states = text(inputs_embeds=embeds, use_cache=False).last_hidden_state
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            used = sum(size for place, size in held.items() if place not in weights)
            assert states.requires_grad
            assert used < activation_bytes(model, embeds.shape[1]) < 4 * used, (family, attention)
    meta = build("llava").to("meta")
    assert "offloaded" in unaffordable(meta, 10)


# ---------------------------------------------------------------------- a real browser
def test_two_pictures_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """Each with its own cells; a merge of two shows on both, and says how many are together."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    model = build("llava")
    inputs = prompts(model, "llava", [[3, image("llava"), 2, image("llava", other=True), 5]])
    mm.compress(model, "pairs_mean(keep=0.5)")
    found = mm.token_activation_map(model, None, inputs=inputs, answer=[31, 77, 58])
    browser.get(page([found]).save(tmp_path / "index.html").as_uri())
    WebDriverWait(browser, 20).until(lambda b: len(b.find_elements(By.TAG_NAME, "canvas")) == 2)
    first, second = browser.find_elements(By.TAG_NAME, "canvas")
    detail, pixels = browser.find_element(By.ID, "detail"), "return arguments[0].toDataURL()"
    before = [browser.execute_script(pixels, one) for one in (first, second)]
    second.send_keys(Keys.ARROW_RIGHT)
    assert "image 2: row 1, column 2" in detail.text and "merged into row 1, column 1, 2 tokens together" in detail.text
    after = [browser.execute_script(pixels, one) for one in (first, second)]
    assert after[0] == before[0] and after[1] != before[1], "the cell is marked in its own picture"
    first.send_keys(Keys.ARROW_DOWN)
    assert "image 1: row 2, column 1" in detail.text and "kept, 2 tokens together" in detail.text
    assert "16 of 32 visual tokens kept, 16 merged into them" in browser.find_element(By.CSS_SELECTOR, ".step").text
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_the_page_in_a_browser(browser: Any, tiled: list[mm.Explanation], tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    path = page(tiled).save(tmp_path / "index.html")
    browser.set_window_size(1280, 1000)
    browser.get(path.as_uri())
    ready = "return [...document.images].every(i => i.complete) && !!document.querySelector('canvas')"
    WebDriverWait(browser, 20).until(lambda b: b.execute_script(ready))

    def by(name: str) -> Any:
        return browser.find_element(By.ID, name)

    def drawn(i: int = 0) -> str:
        script = "return document.querySelectorAll('canvas')[arguments[0]].toDataURL()"
        WebDriverWait(browser, 5).until(lambda b: b.execute_script(script, i) == b.execute_script(script, i))
        return str(browser.execute_script(script, i))

    assert len(browser.find_elements(By.TAG_NAME, "canvas")) == 4, "tiles and thumbnail, stock and compressed"
    # it opens with what was kept, merged and dropped, without what belongs to maps
    assert " ".join(by("legend").text.split()) == "kept merged, one colour for each token dropped"
    last = tiled[2].trace.visuals[0]
    kept = len(last.kept_cells(99))
    assert f"{kept} of {last.tokens} visual tokens kept" in browser.find_elements(By.CSS_SELECTOR, ".step")[1].text
    assert not [one for one in browser.find_elements(By.CSS_SELECTOR, ".of-map") if one.is_displayed()]
    colour = """const [x] = document.querySelectorAll('canvas'), d = x.getContext('2d').getImageData(0, 0, x.width, x.height).data;
        let most = 0; for (let i = 0; i < d.length; i += 4) most = Math.max(most, Math.abs(d[i] - d[i + 2])); return most;"""
    assert browser.execute_script(colour) > 100, "in colour"
    browser.find_element(By.CSS_SELECTOR, "[value=map]").send_keys(Keys.SPACE)
    assert by("word").is_displayed() and browser.execute_script(colour) > 100
    assert by("faithful").text.startswith(
        "Shown: token activation map. How faithful: F1-IoU 16.2 ± 1.8 % (llava-next-shapes"
    )
    plain = drawn(0)
    by("grey").send_keys(Keys.SPACE)
    assert drawn(0) != plain
    by("grey").send_keys(Keys.SPACE)
    # a map in all colours, or between 0 and 1
    stretched = drawn(0)
    assert "the most for this word" in by("legend").text
    by("stretch").send_keys(Keys.SPACE)
    assert drawn(0) != stretched and "the most for any word" in by("legend").text
    by("stretch").send_keys(Keys.SPACE)
    assert drawn(0) == stretched
    # the slider over words, by keyboard
    before, word = drawn(2), by("word-is").text
    by("word").send_keys(Keys.ARROW_LEFT)
    assert by("word-is").text != word
    assert drawn(2) != before
    pressed = browser.find_elements(By.CSS_SELECTOR, ".word[aria-pressed=true]")
    assert len(pressed) == 2 and pressed[0].text in by("word-is").text
    # the slider over layers
    browser.find_element(By.CSS_SELECTOR, "[value=fate]").send_keys(Keys.SPACE)
    end = drawn(2)
    by("layer").send_keys(Keys.HOME)
    assert by("layer-is").text == "all tokens"
    assert drawn(2) != end
    by("layer").send_keys(Keys.ARROW_RIGHT)
    assert "prumerge" in browser.find_elements(By.CSS_SELECTOR, ".step")[1].text
    # tokens by keyboard, with a focus that is seen
    by("layer").send_keys(Keys.TAB)
    canvas = browser.switch_to.active_element
    assert canvas.tag_name == "canvas"
    assert browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", canvas) != "none"
    assert "row 1, column 1" in by("detail").text
    canvas.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "row 2, column 3" in by("detail").text
    assert re.search(r"map of “.+” (missing|\d\.\d\d) .* (kept|merged into row|dropped)", by("detail").text)
    # ... and by pointer
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(browser.find_elements(By.TAG_NAME, "canvas")[0]).perform()
    assert by("detail").text.startswith("stock model") and "kept" in by("detail").text
    near = by("detail").rect
    place = browser.find_elements(By.TAG_NAME, "canvas")[0].rect
    assert abs(near["x"] - (place["x"] + place["width"] / 2)) < 60, "beside the pointer"
    # themes, and the other explanation
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(ground)
    by("theme").click()
    assert browser.execute_script(ground) != light
    other = drawn(0)
    browser.find_element(By.CSS_SELECTOR, "[value=map]").send_keys(Keys.SPACE)
    maps = drawn(0)
    assert maps != other
    labels = [one.text for one in by("methods").find_elements(By.TAG_NAME, "label")]
    assert labels == ["token activation map (F1-IoU 16.2 %)", "attention rollout (F1-IoU 15.4 %)"]
    browser.find_element(By.CSS_SELECTOR, "[value='attention rollout']").send_keys(Keys.SPACE)
    assert drawn(0) != maps and by("faithful").text.startswith("Shown: attention rollout. How faithful: F1-IoU 15.4")
    # a phone: nothing is wider than the screen
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for mode in ("fate", "map", "score"):
        browser.execute_script(f"document.querySelector('[value={mode}]').click()")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
