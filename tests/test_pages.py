# SPDX-License-Identifier: Apache-2.0
"""The benchmark of pages: what is drawn, what is asked, what is held out, and the training on it."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmcompress.eval.evaluator import drawn_questions
from mmcompress.eval.making.pages.labels import LABELS, token_labels
from mmcompress.eval.making.pages.model import WORDS, PageReader
from mmcompress.eval.making.pages.train import PageRecipe, PageTrainer, questions_of
from mmcompress.eval.synthetic.pages import CHANCE, KINDS, Page, draw_page, make_page, page_items, split_of
from mmcompress.eval.synthetic.pages.content import (
    AMOUNTS,
    COLUMNS,
    HEADINGS,
    ITEMS,
    KEYS,
    LINES,
    SPLITS,
    VALUES,
    make_content,
)  # fmt: skip
from mmcompress.eval.synthetic.pages.content import KINDS as DOCUMENTS
from mmcompress.eval.synthetic.pages.layout import UNIT, Field, font_of
from mmcompress.eval.tasks import task_of
from PIL import Image, ImageDraw


# ---------------------------------------------------------------------- pages
def test_a_page_follows_from_its_seed() -> None:
    for seed in range(8):
        a, b = (make_page(seed, "test") for _ in range(2))
        assert a == b and draw_page(a).tobytes() == draw_page(b).tobytes()
    said = {str(make_page(seed, split).content) for split in SPLITS for seed in range(20)}
    assert len(said) == 60
    rng = np.random.default_rng(0)
    made = [make_content("test", kind, 4, 2, True, rng) for kind in DOCUMENTS for _ in range(5)]
    said = "\n".join(str((content.heading, content.lines, content.columns)) for content in made)
    assert zlib.crc32(said.encode()) == 782986057, "recorded results are about other pages"


def test_pages_differ_as_documents_do() -> None:
    pages = [make_page(seed) for seed in range(300)]
    assert {page.content.kind for page in pages} == {"form", "table", "receipt", "chart"}
    assert {page.background for page in pages} == {"plain", "grain"}
    assert {field.size for page in pages for field in page.fields} == {10, 12, 13, 14, 15, 17}
    assert {len(page.content.lines) for page in pages} == set(range(LINES[0], LINES[1] + 1))
    for page in pages:
        assert 300 <= page.size[0] * page.size[1] / UNIT**2 <= 800 and draw_page(page).size == page.size
        for box in (*page.bars, *(field.box for field in page.fields)):
            assert 0 <= box[0] < box[2] <= page.size[0] and 0 <= box[1] < box[3] <= page.size[1]


def test_what_is_drawn_is_what_the_fields_say() -> None:
    """Every field is where it says, in ink that stands out; nothing else is dark."""
    for seed in range(40):
        page = make_page(seed, "dev")
        image = np.asarray(draw_page(page).convert("L"), float)
        alone = Image.new("L", page.size, 255)
        pen = ImageDraw.Draw(alone)
        for field in page.fields:
            font = font_of(field.size)
            box = pen.textbbox((0, 0), field.text, font=font, anchor="la")
            pen.text((field.box[0] - box[0], field.box[1] - box[1]), field.text, fill=0, font=font, anchor="la")
        ink = np.asarray(alone) < 60
        paper = np.asarray(alone) == 255
        for left, top, right, bottom in (*page.bars, *page.rules):
            paper[top : bottom + 1, left : right + 1] = False
        assert ink.sum() > 60 and image[ink].max() < 125 < 135 < image[paper].min()


# ---------------------------------------------------------------------- what is held out
def test_no_association_is_in_two_splits() -> None:
    stated = {split: {a for s in range(300) for a in make_page(s, split).content.atoms()} for split in SPLITS}
    for split, atoms in stated.items():
        assert len(atoms) > 100 and {split_of(atom) for atom in atoms} == {split}
    assert not stated["train"] & stated["test"] and not stated["train"] & stated["dev"]
    snippets = {a for s in range(300) for a in make_page(s, "train", snippet=True).content.atoms()}
    assert {split_of(atom) for atom in snippets} == {"train"}


def test_what_a_question_asks_about_was_never_stated_in_training() -> None:
    """By what the pages show: keys with values, cells with row and column, headings; found anew in the fields."""

    def pairs(page: Page) -> set[tuple[str, ...]]:
        rows = by_line(page)
        if page.content.kind == "form":
            return {(key, value) for key, value in rows.values()}
        if page.content.kind == "table":
            return {
                (row[0], name, cell) for row in rows.values() for name, cell in zip(columns(page), row[1:], strict=True)
            }
        return {heading(page)}

    seen = set().union(*(pairs(make_page(seed, "train")) for seed in range(1500)))
    asked = set().union(*(pairs(make_page(seed, "test")) for seed in range(300)))
    assert len(seen) > 1000 and len(asked) > 100 and not seen & asked


# ---------------------------------------------------------------------- questions
def by_line(page: Page) -> dict[int, list[str]]:
    """The words of every line, from left to right, found by where they stand."""
    size = min(field.size for field in page.fields)
    body = sorted((f for f in page.fields if f.size == size), key=baseline)
    rows: list[list[Field]] = []
    for field in body:
        if rows and abs(baseline(rows[-1][0]) - baseline(field)) <= 4:
            rows[-1].append(field)
        else:
            rows.append([field])
    texts = [[f.text for f in sorted(row, key=lambda f: f.box[0])] for row in rows]
    if texts[0][0] in COLUMNS:
        texts = texts[1:]
    return dict(enumerate(texts, 1))


def baseline(field: Field) -> int:
    """Top of the line of a field, whatever its letters."""
    return field.box[1] - int(font_of(field.size).getbbox(field.text, anchor="la")[1])


def columns(page: Page) -> list[str]:
    return [f.text for f in sorted(page.fields, key=lambda f: f.box[0]) if f.text in COLUMNS]


def heading(page: Page) -> tuple[str, ...]:
    largest = max(field.size for field in page.fields)
    return tuple(f.text for f in sorted(page.fields, key=lambda f: f.box[0]) if f.size == largest)


def answer(page: Page, text: str) -> str:
    """The answer to a question, found anew from what stands where."""
    rows, words = by_line(page), text.split()
    value = {row[0]: row[1] for row in rows.values() if len(row) > 1}
    match words:
        case ["what", "is", a, "plus", b, "?"]:
            return " ".join(str(int(value[a]) + int(value[b])))
        case ["what", "is", "the", column, "of", row, "?"]:
            cells = next(cells for cells in rows.values() if cells[0] == row)
            return " ".join(cells[1 + columns(page).index(column)])
        case ["what", "is", "the", key, "?"]:
            return value[key] if value[key] in VALUES else " ".join(value[key])
        case ["how", "many", "lines", "?"]:
            return str(len(rows))
        case ["how", "many", item, "?"]:
            return value[item]
        case ["which", "is", which, "?"]:
            bar = (max if which == "largest" else min)(page.bars, key=lambda box: box[2] - box[0])
            middle = (bar[1] + bar[3]) / 2
            return min(page.fields, key=lambda f: abs((f.box[1] + f.box[3]) / 2 - middle)).text
        case ["what", "does", "the", "heading", "say", "?"]:
            return " ".join(heading(page))
        case ["is", word, "listed", "?"]:
            return "yes" if any(row[0] == word for row in rows.values()) else "no"
    raise AssertionError(text)


def test_answers_are_right() -> None:
    asked = 0
    for seed in range(120):
        page = make_page(seed, "test")
        for question in questions_of(page, 100, np.random.default_rng(seed)):
            assert question.answer == answer(page, question.text), (seed, question)
            asked += 1
    assert asked > 1500


def test_chance_is_that_of_a_guess_among_the_answers() -> None:
    said: dict[str, list[str]] = {kind: [] for kind in KINDS}
    bars = []
    for seed in range(1500):
        page = make_page(seed)
        for question in questions_of(page, 100, np.random.default_rng(seed)):
            said[question.kind].append(question.answer)
        if page.bars:
            bars.append(len(page.bars))
    assert set(CHANCE) == set(KINDS) == set(said)
    for kind in ("value", "amount", "sum", "lines", "listed"):
        assert len(set(said[kind])) == round(1 / CHANCE[kind]), kind
    assert set(said["value"]) == set(VALUES) and set(said["amount"]) == {
        str(n) for n in range(AMOUNTS[0], AMOUNTS[1] + 1)
    }
    assert len(set(said["cell"])) == 90 and CHANCE["cell"] == 1 / 90
    assert len(set(said["heading"])) <= len(HEADINGS[0]) * len(HEADINGS[1]) == 1 / CHANCE["heading"]
    assert 120 <= len(set(said["code"])) <= 128 and CHANCE["code"] == 1 / 128
    assert CHANCE["largest"] == pytest.approx(sum(1 / n for n in range(3, 7)) / 4)
    assert abs(said["listed"].count("yes") / len(said["listed"]) - 0.5) < 0.01
    blind = max(said["lines"].count(n) for n in set(said["lines"])) / len(said["lines"])
    assert blind < 0.45  # who always says the same


def test_items_ask_all_kinds_in_turn_and_are_the_questions_of_the_task() -> None:
    items = page_items(18)
    assert [item.question.kind for item in items] == 2 * list(KINDS)
    assert len({item.seed for item in items}) == 18
    questions = drawn_questions("pages", 18, None)
    assert [q.answers[0] for q in questions] == [item.question.answer for item in items]
    assert questions[0].images[0].size == items[0].picture.size  # type: ignore[union-attr]
    row = task_of("pages").row(questions[3], questions[3].answers[0].upper(), "official")
    assert row.value == 1 and row.chance == CHANCE["amount"] and row.kind == "amount"
    with pytest.raises(ValueError, match="at least 9"):
        drawn_questions("pages", 8, None)
    with pytest.raises(ValueError, match="choose one of train, dev, test"):
        page_items(9, split="tset")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- training
def test_labels_say_what_stands_at_a_token() -> None:
    names = list(LABELS)
    for seed in range(60):
        page = make_page(seed)
        labels = token_labels(page).reshape(len(LABELS), page.size[1] // UNIT, page.size[0] // UNIT)
        assert (labels >= 0).all() and (labels.max((1, 2)) < list(LABELS.values())).all()
        for field in page.fields:
            if field.text not in WORDS:
                continue
            left, top, right, bottom = field.box
            here = labels[:, (top + bottom) // 2 // UNIT, (left + right) // 2 // UNIT]
            assert here[names.index("word")] == WORDS.index(field.text) + 1
            assert here[names.index("line")] == (field.line or LINES[1] + 1)
            expected = page.content.lines[field.line - 1][0] if field.line and field.column else None
            assert here[names.index("label")] == (WORDS.index(expected) + 1 if expected else 0)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> PageTrainer:
    return PageTrainer(tmp_path_factory.mktemp("pages"), tiny(), device="cpu")


def tiny() -> PageRecipe:
    return PageRecipe(
        dev_pages=4, read_steps=4, read_snippets=4, read_pages=1, answer_steps=4, answer_batch=2, turns=3, save_every=2
    )


def test_the_model_is_small_and_knows_all_words(trainer: PageTrainer) -> None:
    assert sum(p.numel() for p in trainer.model.parameters()) <= 4_000_000
    known = trainer.processor.tokenizer.get_vocab()
    for seed in range(100):
        for question in questions_of(make_page(seed, "test"), 100, np.random.default_rng(0)):
            assert all(word in known for word in (*question.text.split(), *question.answer.split()))
    assert {*KEYS, *ITEMS, *VALUES} <= set(known)


@torch.no_grad()
def test_packed_questions_are_answered_as_if_alone(trainer: PageTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of every answer token of a pack equal those of its prompt alone, through processor and model as users call them."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")  # float32
    model, processor, family = trainer.model, trainer.processor, PageReader()
    pages = [make_page(seed, "dev") for seed in (0, 3, 5)]
    asked = [questions_of(page, 4, np.random.default_rng(1)) for page in pages]
    packed_logits, packed, _ = trainer.answers(pages, asked, augment=False)
    model.set_attn_implementation("sdpa")
    rows = []
    for page, questions in zip(pages, asked, strict=True):
        for question in questions:
            said = f"{question.answer} </s>"
            text = f"USER: {family.image} {question.text} ASSISTANT: {said}"
            inputs: Any = processor(images=[draw_page(page)], text=[text], return_tensors="pt")
            rows.append(model(**inputs).logits[0, -1 - len(said.split()) : -1])
    assert torch.cat(rows).shape == packed_logits.shape and len(packed.input_ids) == 3
    torch.testing.assert_close(torch.cat(rows), packed_logits, atol=2e-4, rtol=1e-4)


@pytest.mark.slow
def test_training_of_pages_restarts_where_it_stopped(tmp_path: Path) -> None:
    """A run that is stopped and started again ends with the same weights as one that was not."""
    from mmcompress.eval.synthetic.benchmark import load

    straight = PageTrainer(tmp_path / "straight", tiny(), device="cpu").run()

    class Stopped(Exception):
        pass

    stopped = PageTrainer(tmp_path / "stopped", tiny(), device="cpu")

    def stop(stage: str, step: int, *_: Any) -> None:
        if (stage, step) == ("answer", 4):
            raise Stopped

    stopped.record = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        stopped.run()
    resumed = PageTrainer(tmp_path / "stopped", tiny(), device="cpu").run()
    (a, processor), (b, _) = load(straight), load(resumed)
    assert all(torch.equal(weight, b.state_dict()[name]) for name, weight in a.state_dict().items())
    assert processor.image_processor.merge_size == 1

    on = PageTrainer(tmp_path / "on", replace(tiny(), start=str(straight)), device="cpu")
    assert all(
        torch.equal(weight, on.model.state_dict()[name].half()) for name, weight in a.half().state_dict().items()
    )
    seen: list[str] = []
    on.record = lambda stage, *_: seen.append(stage)  # type: ignore[method-assign]
    on.run()
    assert set(seen) == {"answer"}


# ---------------------------------------------------------------------- the model in the package
def test_the_embedded_model_of_pages_works(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As far as it was trained: it looks things up and counts, but does not yet read codes and cells of tables (README)."""
    from mmcompress.assets import PAGES, checkpoint, model_path
    from mmcompress.eval.synthetic.benchmark import evaluate, load, prepare

    from mmcompress.cli import main

    assert checkpoint(PAGES) == str(model_path(PAGES))
    model, processor = load(model_path(PAGES))
    score = evaluate(model, processor, prepare(processor, page_items(90)))
    assert set(KINDS) <= set(score.right)
    assert np.mean([score.accuracy(kind) for kind in KINDS]) >= 0.6
    for kind in ("amount", "largest", "lines", "heading", "listed"):
        assert score.accuracy(kind) >= 0.8, kind
    item = page_items(7)[6]
    item.picture.save(tmp_path / "page.png")
    line = ["run", PAGES, "--image", str(tmp_path / "page.png"), "--question", item.question.text]
    assert main([*line, "--plan", "divprune(keep=0.5)"]) == 0
    assert f"stock       {item.question.answer}" in capsys.readouterr().out
