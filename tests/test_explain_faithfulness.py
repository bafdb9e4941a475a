# SPDX-License-Identifier: Apache-2.0
"""Words, panes, scores and curves; explanations of the embedded models through their processors."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcompress.assets import model_path
from mmcompress.eval.explained.faithful import Faithfulness, compare, drawn_f1, record, rows_of, thing_box, truth
from mmcompress.eval.explained.rank_order import FORMS, agreement, rank_agreement
from mmcompress.eval.synthetic import items
from mmcompress.eval.synthetic.benchmark import load
from PIL import Image
from torch import Tensor

import mmcompress as mm
from mmcompress.explain import EXPLANATIONS, panes
from mmcompress.explain.curves import answer_probabilities, insertion_deletion
from mmcompress.explain.faithfulness import OUTSIDE, Scores, explanation_scores, fill_missing, seen_in, word_scores
from mmcompress.explain.labels import FUNCTION, NOUN, OTHER
from mmcompress.explain.measured import measured
from mmcompress.explain.thresholds import otsu_threshold, quantised, resize_map
from mmcompress.explain.words import group_words, token_texts, word_text

from .families import build, image, prompts


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load(model_path())


# ---------------------------------------------------------------------- words
def test_words() -> None:
    assert group_words(["A", " d", "og", ",", " it", "'s", "."]) == [[0], [1, 2], [3], [4, 5], [6]]
    assert group_words(["\u2581two", "\u2581w", "ords", "\u4e2d", "\u6587"]) == [[0], [1, 2], [3], [4]]
    assert group_words([]) == [] and group_words(["", "x"]) == [[0, 1]]
    assert word_text([" d", "og"], [0, 1]) == "dog"


def test_pieces_of_a_character_wait_for_the_rest() -> None:
    class Bytes:
        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    ids = list("a\u00e9 \u20acb".encode())
    texts = token_texts(Bytes(), ids)
    assert "".join(texts) == "a\u00e9 \u20acb" and texts == ["a", "", "\u00e9", " ", "", "", "\u20ac", "b"]


# ---------------------------------------------------------------------- panes
def test_tiles_become_one_pane_in_their_places() -> None:
    tiles = tuple(mm.View((2, 2), (c / 2, r / 2, (c + 1) / 2, (r + 1) / 2), "tile") for r in (0, 1) for c in (0, 1))
    whole, small = panes(mm.Layout((*tiles, mm.View((2, 2), role="thumbnail"))))
    assert whole.cells.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert (whole.role, whole.seams, whole.box) == ("tiles", ((2.0,), (2.0,)), (0, 0, 1, 1))
    assert small.cells.tolist() == [[16, 17], [18, 19]] and small.role == "thumbnail"
    first, second = panes(mm.Layout.raster(2, 1, 3))
    assert (first.frame, second.frame, second.cells.tolist()) == (0, 1, [[3, 4, 5]])


def test_values_on_the_picture_keep_their_places() -> None:
    (pane,) = panes(mm.Layout((mm.View((1, 2), (0.5, 0.0, 1.0, 1.0)),)))
    shown = pane.on_picture(torch.tensor([[1.0, float("nan")]]), (2, 8), smooth=False)
    assert shown[0, 4:6].tolist() == [1.0, 1.0]
    assert bool(shown[:, :4].isnan().all()) and bool(shown[:, 6:].isnan().all())
    smooth = pane.on_picture(torch.tensor([[0.25, 1.0]]), (2, 8))
    assert torch.all(smooth[0, 4:].diff() >= 0) and smooth[0, 4:].max() <= 1


# ---------------------------------------------------------------------- scores
@torch.no_grad()
def test_tiles_and_thumbnail_are_averaged_where_both_are_there() -> None:
    model = build("llava_next")
    inputs = prompts(model, "llava_next", [[3, image("llava_next"), 5]])
    found = mm.token_activation_map(model, None, inputs=inputs, answer=[31, 77])
    (seen,) = found.visuals
    (tiles,), (thumbnail,) = ([p for p in seen.panes if p.role == role] for role in ("tiles", "thumbnail"))
    values = torch.zeros(len(seen.valid))
    values[tiles.cells], values[thumbnail.cells] = 0.2, 0.6
    pane, grid = found.fused(values)
    assert pane is tiles
    torch.testing.assert_close(grid, torch.full(tiles.grid, 0.4))
    gone = values.clone()
    gone[tiles.cells[0, 0]] = math.nan
    assert found.fused(gone)[1][0, 0] == pytest.approx(0.6) and found.fused(gone)[1][0, 1] == pytest.approx(0.4)
    gone[thumbnail.cells] = math.nan
    _, alone = found.fused(gone)
    assert alone[0, 0].isnan() and alone[0, 1] == pytest.approx(0.2)
    corner = torch.zeros(len(seen.valid))
    corner[thumbnail.cells[-1, -1]] = 1.0
    _, lit = found.fused(corner)
    assert lit[-1, -1] > 0.4 and lit[0].max() == lit[:, 0].max() == 0


def test_otsu_and_resizing() -> None:
    assert otsu_threshold(torch.tensor([10] * 30 + [200] * 5, dtype=torch.uint8)) == 10
    assert otsu_threshold(torch.full((4, 4), 7, dtype=torch.uint8)) == 0
    values = torch.randint(0, 256, (5, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(resize_map(values, (5, 7)), values)
    for size in ((20, 21), (11, 7), (64, 3)):
        pixels = torch.nn.functional.interpolate(values[None, None].double(), size, mode="bilinear")[0, 0]
        assert (resize_map(values, size).double() - pixels).abs().max() <= 1.0
    assert quantised(torch.tensor([0.0, 0.9999, 1.0])).tolist() == [0, 254, 255]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=2, max_size=60))
def test_otsu_separates_best(values: list[int]) -> None:
    """By trying all thresholds."""
    x = np.array(values, dtype=np.float64)

    def between(t: int) -> float:
        low, high = x[x <= t], x[x > t]
        return 0.0 if not len(low) or not len(high) else len(low) * len(high) * (low.mean() - high.mean()) ** 2

    best = max(between(t) for t in range(256))
    assert between(otsu_threshold(torch.tensor(values, dtype=torch.uint8))) == pytest.approx(best)


def test_scores_of_perfect_and_of_missing_maps() -> None:
    mask = torch.zeros(8, 8, dtype=torch.int64)
    mask[:4, :4] = 1
    good, dark = torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
    good[0, 0] = 255
    maps = torch.stack([good, dark])
    scores = word_scores(maps, [[0], [1]], [1, FUNCTION], mask)
    assert scores.pointing == [True] and scores.obj[0] > 0.5 and scores.func_iou == 1.0
    both = word_scores(maps, [[1], [0]], [1, 1], mask)
    assert both.obj == scores.obj  # neighbours of one object: the better one
    apart = word_scores(maps, [[1], [0], [0]], [1, OTHER, 1], mask)
    assert len(apart.obj) == 2
    gone = torch.tensor([[False, True], [True, True]])
    missing = word_scores(maps, [[0]], [1], mask, gone)
    assert missing.obj == [] and missing.gone == 1 and missing.coverage == [0.75]
    outside = mask.clone()
    outside[:4, :4] = OUTSIDE
    assert word_scores(maps, [[0]], [1], outside).obj == []
    pooled = Scores.pooled([scores, apart, missing])
    assert len(pooled.obj) == 3 and pooled.gone == 1 and 0 < pooled.f1_iou < 1
    assert np.isnan(Scores().f1_iou) and word_scores(maps, [[0]], [NOUN], mask).obj == []


def test_missing_cells_get_their_neighbours_value_and_panes_see_their_part() -> None:
    maps = torch.tensor([[[1.0, float("nan"), float("nan"), 4.0]]])
    assert fill_missing(maps).tolist() == [[[1.0, 1.0, 4.0, 4.0]]]
    mask = torch.arange(8)[None].expand(4, 8)
    (pane,) = panes(mm.Layout((mm.View((1, 1), (-0.25, 0.0, 0.5, 1.0)),)))
    assert seen_in(mask, pane)[0].tolist() == [OUTSIDE, OUTSIDE, 0, 1, 2, 3]


def test_truth_of_the_benchmark() -> None:
    """Boxes enclose what is drawn, words of an object name it."""
    for item in items(21):
        scene, question = item.scene, item.question
        picture = np.asarray(item.picture).astype(int)
        for i, thing in enumerate(scene.things):
            left, top, right, bottom = thing_box(scene, i)
            x, y, r = (3 * v for v in (*thing.center, thing.radius))
            assert abs((left + right) / 2 - x) < 0.35 * r and abs((top + bottom) / 2 - y) < 0.35 * r
            assert 1.1 * r < right - left < 2.4 * r and picture[top:bottom, left:right].size
        words = [*question.text.split(), *question.answer.split()]
        parts = ["question"] * len(question.text.split()) + ["answer"] * len(question.answer.split())
        labels, mask = truth(item, words, parts)
        assert {int(v) for v in mask.unique()} - {0} == {label for label in labels if label > 0}
        assert (FUNCTION in labels) == bool({"what", "the", "how", "there", "a", "where", "yes", "no"} & set(words))


# ---------------------------------------------------------------------- embedded models
@pytest.mark.parametrize("name", ["llava-shapes", "llava-next-shapes", "qwen3-vl-shapes"])
def test_embedded_models_through_their_processors(name: str) -> None:
    model, processor = load(model_path(name))
    (item,) = items(1, stretched=name != "llava-shapes")
    found = mm.token_activation_map(model, processor, item.picture, item.question.text)
    assert found.question == item.question.text and found.answer == item.question.answer
    assert [w.text for w in found.words if w.part == "question"] == item.question.text.split()
    assert found.tokens[-1].probability > 0.5 and found.tokens[-1].candidates[0][0].strip() == found.answer.split()[-1]
    assert found.visuals[0].pictures[0].size == item.picture.size
    word = found.answer_words[0]
    pane, grid = found.fused(found.word_map(word))
    assert grid.shape == pane.grid and bool(grid.isfinite().all())
    assert bool(found.on_picture(found.word_map(word), (40, 50)).isfinite().all())
    model.train()
    mm.compress(model, "divprune(keep=0.5)")
    half = mm.token_activation_map(model, processor, item.picture, item.question.text, answer=found.answer)
    assert model.training and half.coverage == pytest.approx(0.5, abs=0.01) and half.answer_ids == found.answer_ids
    assert -1 <= rank_agreement(found, half) <= 1 and rank_agreement(found, found) == pytest.approx(1.0)
    assert half.layers[0] < found.layers[0]


def test_maps_of_kept_cells_keep_their_order(embedded: tuple[Any, Any]) -> None:
    half, all_of_them = agreement("x", *embedded, items(4), ["fastv(layer=2, keep=0.5)", "fastv(layer=2, keep=1.0)"])
    for form in FORMS:
        assert half[form]["mean"] > 0.55 and half[form]["n"] == 4  # 0.79 over more questions
        assert all_of_them[form]["mean"] == pytest.approx(1.0, abs=1e-3)


def test_scores_and_curves_on_the_embedded_model(embedded: tuple[Any, Any]) -> None:
    model, processor = embedded
    asked = items(8)
    found = compare(model, processor, asked, gradients=1)
    assert [one.explanation for one in found] == list(EXPLANATIONS) and [one.samples for one in found] == [
        8,
        8,
        8,
        1,
        1,
    ]
    for one, name in zip(found, ("token_activation_map", "attention_rollout", "last_attention"), strict=False):
        alone = getattr(mm, name)(model, processor, asked[0].picture, asked[0].question.text)
        labels, mask = truth(asked[0], [w.text for w in alone.words], [w.part for w in alone.words])
        expected = explanation_scores(alone, labels[1:], mask, words=range(1, len(labels)))
        assert one.parts[0].obj == pytest.approx(expected.obj, abs=1e-3), name
    (item,) = [i for i in asked[:1] if i.question.kind == "color"]
    stock = mm.last_attention(model, processor, item.picture, item.question.text)
    (pane,) = stock.visuals[0].panes
    left, top, right, bottom = thing_box(item.scene, item.question.targets[0])
    oracle = torch.zeros(pane.grid)
    sides = (item.picture.height / pane.grid[0], item.picture.width / pane.grid[1])
    for y in range(pane.grid[0]):
        for x in range(pane.grid[1]):
            at = ((x + 0.5) * sides[1], (y + 0.5) * sides[0])
            oracle[y, x] = float(left <= at[0] <= right and top <= at[1] <= bottom)
    perfect, wrong = (_with(stock, values.flatten()) for values in (oracle, 1 - oracle))
    labels, mask = truth(item, [w.text for w in stock.words], [w.part for w in stock.words])
    best = explanation_scores(perfect, labels, mask)
    assert best.obj_iou > 0.6 > explanation_scores(wrong, labels, mask).obj_iou and best.mean("pointing") == 1.0
    good, bad = (
        insertion_deletion(model, processor, item.picture, item.question.text, e, steps=4) for e in (perfect, wrong)
    )
    assert good.deletion[0] == pytest.approx(bad.insertion[-1], abs=1e-4) and good.deletion[0] > 0.9
    assert good.deletion_area < bad.deletion_area and good.insertion_area > bad.insertion_area
    with pytest.raises(ValueError, match="baseline='black'"):
        insertion_deletion(model, processor, item.picture, item.question.text, perfect, baseline="black")
    with pytest.raises(ValueError, match="one of the question"):
        insertion_deletion(model, processor, item.picture, item.question.text, perfect, word=0)
    (probability,) = answer_probabilities(model, processor, item.picture, item.question.text, item.question.answer)
    assert probability > 0.9


def test_errors_are_paired_and_records_keep_other_models(tmp_path: Any) -> None:
    one = [Scores(obj=[0.1 * i], func=[0.9, 0.8]) for i in range(1, 8)]
    better = [Scores(obj=[0.1 * i + 0.1], func=[0.9, 0.8]) for i in range(1, 8)]
    spread = drawn_f1(one)
    assert spread.std() > 0.02 and spread.mean() == pytest.approx(Scores.pooled(one).f1_iou, abs=0.03)
    first, second = rows_of("llava-shapes", [_faithful("a", better), _faithful("b", one)])
    assert first["lead"] == 0 and second["lead"] == pytest.approx(first["f1_iou"] - second["f1_iou"])
    assert second["lead_error"] < second["f1_error"] and not first["lead_error"]
    path = tmp_path / "x.json"
    record(path, [{"model": "internvl-shapes"}])
    record(path, [first, second])
    record(path, [second])
    assert [row["model"] for row in json.loads(path.read_text())["rows"]] == ["llava-shapes", "internvl-shapes"]


RECORD = json.loads((Path(__file__).parent.parent / "results" / "explain.json").read_text())["rows"]


@pytest.mark.parametrize("name", ["llava-shapes", "llava-next-shapes", "qwen3-vl-shapes", "internvl-shapes"])
def test_explanations_say_what_the_record_says(name: str) -> None:
    """On the model that was measured and with the options that were; the stock model's score where no other is known."""
    model, _ = load(model_path(name))
    last = len(model.model.language_model.layers) - 1
    options: dict[str, dict[str, Any]] = {
        "token activation map": {"compat": "paper", "interference": True, "kernel": 3, "cap": None},
        "attention rollout": {"normalise": "joint"},
        "last-layer attention": {"layer": last, "normalise": "joint"},
        "gradient relevance": {"normalise": "joint", "explain_question": False},
        "Grad-CAM": {"explain_question": True},
    }
    assert set(options) == set(EXPLANATIONS)
    rows = [row for row in RECORD if row["model"] == name]
    assert len(rows) == 11
    for row in rows:
        found = measured(model, row["explanation"], options[row["explanation"]], row["plan"])
        assert found is not None
        assert (found.model, found.questions, found.plan) == (name, row["samples"], row["plan"])
        assert found.f1 == pytest.approx(row["f1_iou"], abs=1e-6) and found.error == pytest.approx(
            row["f1_error"], abs=1e-6
        )
        assert str(found).startswith(f"F1-IoU {100 * row['f1_iou']:.1f} ± {100 * found.error:.1f} % ({name}")
    other = measured(model, "attention rollout", options["attention rollout"], "divprune(keep=0.25)")
    assert other is not None and other.plan == ""
    assert measured(model, "last-layer attention", {"layer": last - 1, "normalise": "joint"}) is None
    assert measured(model, "attention rollout", {"normalise": "visual"}) is None
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[0] += 1
    assert measured(model, "attention rollout", options["attention rollout"]) is None


def test_explanations_carry_question_and_measure(embedded: tuple[Any, Any]) -> None:
    model, processor = embedded
    asked = "  What is the dog's name, please?\n"
    for explain in EXPLANATIONS.values():
        found = explain(model, processor, items(1)[0].picture, asked, max_new_tokens=3)
        assert found.question == "What is the dog's name, please?" and "<unk>" in {t.text.strip() for t in found.tokens}
        assert found.measured is not None and found.measured.model == "llava-shapes" and found.measured.plan == ""
    plain = build("llava")
    (row,) = [prompts(plain, "llava", [[3, image("llava"), 5]])]
    found = mm.token_activation_map(plain, None, inputs=row, answer=[31])
    assert found.measured is None and found.question == "".join(t.text for t in found.tokens[:-1]).strip()


def _faithful(name: str, parts: list[Scores]) -> Faithfulness:
    return Faithfulness(name, "", parts, parts)


def _with(explanation: mm.Explanation, values: Tensor) -> mm.Explanation:
    return dataclasses.replace(explanation, maps=values.expand(len(explanation.maps), -1))


def test_pictures_of_all_forms_and_bad_ones(embedded: tuple[Any, Any], tmp_path: Any) -> None:
    model, processor = embedded
    (item,) = items(1)
    item.picture.save(tmp_path / "scene.png")
    array = np.asarray(item.picture)
    forms = (
        item.picture,
        str(tmp_path / "scene.png"),
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        [item.picture],
    )
    maps = [mm.token_activation_map(model, processor, form, item.question.text).maps for form in forms]
    assert all(torch.equal(maps[0], other) for other in maps[1:])
    two = mm.token_activation_map(model, processor, [item.picture] * 2, item.question.text, max_new_tokens=3)
    assert len(two.visuals) == 2 and [len(v.pictures) for v in two.visuals] == [1, 1]
    wide = Image.new("RGB", (200, 100))
    wide.paste(item.picture.resize((100, 100)), (50, 0))
    cropped = mm.token_activation_map(model, processor, wide, item.question.text)
    assert cropped.visuals[0].panes[0].box == pytest.approx((0.25, 0.0, 0.75, 1.0))
    ask = item.question.text
    for visuals, question, said in (
        (None, ask, "no image to explain"),
        ([], ask, "no image to explain"),
        (item.picture, " ", "give the text"),
        (np.zeros((2, 8, 8, 3), dtype=np.uint8), ask, "video=True"),
        (np.zeros((8, 8, 3)), ask, "float64"),
        (item.picture, "what " * 3000, "context of the model"),
    ):
        with pytest.raises(ValueError, match=said):
            mm.token_activation_map(model, processor, visuals, question)


def test_a_video_through_its_processor() -> None:
    model, processor = load(model_path("qwen3-vl-shapes"))
    with pytest.raises(ValueError, match="no place for videos"):
        mm.token_activation_map(model, processor, [items(1)[0].picture] * 2, "what color is the star ?", video=True)
    before = "{% if part['type'] == 'image' %}"
    assert before in processor.chat_template  # the embedded models know no videos: neither does their template
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    after = "{% if part['type'] == 'video' %}{{ '" + video + "' }}{% elif part['type'] == 'image' %}"
    processor.chat_template = processor.chat_template.replace(before, after)
    frames = [item.picture for item in items(4)]
    found = mm.token_activation_map(model, processor, frames, "what color is the star ?", video=True, max_new_tokens=3)
    (seen,) = found.visuals
    assert seen.modality == "video" and [p.frame for p in seen.panes] == [0, 1] and len(seen.pictures) == 4
    assert found.fused(found.token_map(-1), frame=1)[1].shape == seen.panes[1].grid
