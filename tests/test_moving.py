# SPDX-License-Identifier: Apache-2.0
"""The benchmark of moving scenes: what is drawn, what is asked, what is held out, and the training on it."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmcompress.eval.evaluator import drawn_questions
from mmcompress.eval.inputs import inputs_of, texts_of
from mmcompress.eval.making.videos.labels import (
    EVENTS,
    GRID,
    LABELS,
    UNIT,
    asked_about,
    come_until,
    event_labels,
    token_labels,
)
from mmcompress.eval.making.videos.train import VideoRecipe, VideoTrainer, questions_of
from mmcompress.eval.synthetic.pages.content import split_of
from mmcompress.eval.synthetic.scenes import COLORS
from mmcompress.eval.synthetic.videos import CHANCE, KINDS, Video, draw_video, make_video, video_items
from mmcompress.eval.synthetic.videos.content import CELL, DIRECTIONS, LENGTHS, PAIR, PARTS, SIDE
from mmcompress.eval.synthetic.videos.frames import seen
from mmcompress.eval.tasks import task_of


def is_color(pixels: np.ndarray, name: str) -> bool:
    """Whether a thing of the colour is here: each is drawn a little darker or lighter, and frames have noise."""
    return bool(np.abs(pixels.reshape(-1, 3).mean(0) - COLORS[name]).max() < 26)


def solid(video: Video) -> list[Any]:
    """Actors whose middle is filled with their colour."""
    return [actor for actor in video.actors if actor.thing.shape != "ring"]


def patch(frame: np.ndarray, center: tuple[float, float]) -> np.ndarray:
    x, y = (round(at) for at in center)
    return frame[y - 1 : y + 1, x - 1 : x + 1]


# ---------------------------------------------------------------------- videos
def test_a_seed_is_a_video() -> None:
    assert make_video(5) == make_video(5) != make_video(6)
    video = make_video(5)
    frames = draw_video(video)
    assert np.array_equal(frames, draw_video(video)) and frames.shape == (video.frames, SIDE, SIDE, 3)
    assert np.array_equal(draw_video(video, [2, 3]).shape, (2, SIDE, SIDE, 3))
    said = " | ".join(atom for seed in range(50) for atom in make_video(seed, "test").atoms())
    assert zlib.crc32(said.encode()) == 3635076762, "recorded results are about other videos"


def test_frames_show_what_happens() -> None:
    """Found anew in the pixels: what goes is where it should be, what comes is not there before, colours turn, pictures end."""
    counted: Counter[str] = Counter()
    for seed in range(60):
        video = make_video(seed)
        frames = draw_video(video)
        for actor in solid(video):
            center, name = actor.thing.center, actor.thing.color
            last = video.cut - 1
            if actor.does == "goes":
                end = (center[0] + actor.travel[0], center[1] + actor.travel[1])
                assert is_color(patch(frames[0], center), name) and is_color(patch(frames[last], end), name)
                moved = np.sign(np.subtract(end, center)).astype(int)
                assert tuple(moved) == DIRECTIONS[actor.goal]
            elif actor.does == "comes":
                assert not is_color(patch(frames[actor.at - 1], center), name)
                assert is_color(patch(frames[actor.at], center), name) and is_color(patch(frames[last], center), name)
            elif actor.does == "turns":
                assert is_color(patch(frames[actor.at - 1], center), name)
                assert is_color(patch(frames[actor.at], center), actor.goal)
            elif actor.does == "last":
                assert is_color(patch(frames[-1], center), name) and video.cut == video.frames - PAIR
            counted[actor.does] += 1
        if video.sign is not None:
            left, top = video.sign.boxes[0][:2]
            bright = (
                frames[:, round(top) + 1 : round(top) + 3, round(left) + 3 : round(left) + 16].mean((1, 2, 3)) > 200
            )
            shown = np.zeros(video.frames, bool)
            shown[slice(*video.shown)] = True
            assert (bright == shown).all()
            assert PARTS[(video.shown[0] + video.shown[1]) * 3 // (2 * video.frames)] == video.part
            counted["sign"] += 1
    assert min(counted[name] for name in ("goes", "comes", "turns", "stays", "last", "sign")) > 10


def test_nothing_stands_on_anything_else() -> None:
    for seed in range(100):
        video = make_video(seed)
        for frame in range(video.frames):
            there = [thing for actor in video.actors if (thing := seen(video, actor, frame)) is not None]
            for i, one in enumerate(there):
                for other in there[i + 1 :]:
                    assert np.hypot(*np.subtract(one.center, other.center)) > CELL - 5
        names = [actor.thing.name for actor in video.actors]
        assert len({*names}) == len(names)
        assert video.frames in LENGTHS and all(actor.at % PAIR == 0 for actor in video.actors)


def test_splits_share_nothing_that_is_asked_about() -> None:
    found: dict[str, set[str]] = {}
    for split in ("train", "dev", "test"):
        atoms = {atom for seed in range(300) for atom in make_video(seed, split).atoms()}
        assert all(split_of(atom) == split for atom in atoms)
        found[split] = atoms
    assert not found["train"] & found["test"] and not found["dev"] & found["test"]
    assert all(len([a for a in found["test"] if a.startswith(does)]) > 5 for does in ("goes", "comes", "turns", "sign"))


# ---------------------------------------------------------------------- questions
def test_questions_have_the_answers_that_videos_give() -> None:
    for seed in range(200):
        video = make_video(seed, "dev")
        asked = {(q.text, q.answer) for q in questions_of(video)}
        coming = sorted((a for a in video.actors if a.does == "comes"), key=lambda a: a.at)
        assert ("how many shapes come ?", str(len(coming))) in asked
        if len(coming) > 1:
            assert ("what comes first ?", coming[0].thing.name) in asked
            assert ("what comes last ?", coming[-1].thing.name) in asked
        for actor in video.actors:
            if actor.does == "goes":
                assert (f"which way does the {actor.thing.name} go ?", actor.goal) in asked
            elif actor.does == "turns":
                assert ("which shape turns another color ?", actor.thing.shape) in asked
                assert (f"what color does the {actor.thing.shape} turn ?", actor.goal) in asked
        if video.sign is not None:
            assert ("what does the sign say ?", " ".join(video.sign.code)) in asked
        assert len({text for text, _ in asked}) == len(asked)


def test_no_answer_can_be_guessed() -> None:
    """Who always says the most frequent answer is hardly better than chance."""
    said: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for item in video_items(700):
        said[item.question.kind][item.question.answer] += 1
    assert {*KINDS} == {*CHANCE}
    for kind, counts in said.items():
        assert max(counts.values()) / counts.total() < CHANCE[kind] + 0.15, (kind, counts.most_common(3))


def test_items_are_the_questions_of_the_task() -> None:
    items = video_items(14)
    assert [item.question.kind for item in items] == 2 * list(KINDS) and len({item.seed for item in items}) == 14
    questions = drawn_questions("videos", 14, None)
    assert [q.answers[0] for q in questions] == [item.question.answer for item in items]
    clip = questions[0].videos[0]()  # type: ignore[operator]
    assert np.array_equal(clip.frames, draw_video(items[0].video)) and clip.metadata()["fps"] == 2.0
    row = task_of("videos").row(questions[4], questions[4].answers[0].upper(), "official")
    assert row.value == 1 and row.chance == CHANCE["when"] == 1 / 3
    with pytest.raises(ValueError, match="at least 7"):
        drawn_questions("videos", 6, None)
    with pytest.raises(ValueError, match="choose one of train, dev, test"):
        video_items(7, split="tset")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- training
def test_labels_say_what_is_at_a_token() -> None:
    for seed in range(40):
        video = make_video(seed)
        pairs = video.frames // PAIR
        labels = token_labels(video).reshape(len(LABELS), pairs, GRID, GRID)
        events = event_labels(video).reshape(len(EVENTS), pairs, GRID, GRID)
        assert (labels.max((1, 2, 3)) < list(LABELS.values())).all() and (
            events.max((1, 2, 3)) < list(EVENTS.values())
        ).all()
        for pair in range(pairs):
            for actor in video.actors:
                thing = seen(video, actor, PAIR * pair)
                if thing is None or actor.does == "goes":
                    continue
                x, y = (min(GRID - 1, int(at // UNIT)) for at in thing.center)
                assert labels[0, pair, y, x] == list(COLORS).index(thing.color) + 1
                came = actor.does == "comes"
                assert (events[1, pair, y, x] > 0) == came
                assert (events[2, pair, y, x] > 0) == (actor.does == "turns" and actor.at <= PAIR * pair)
        assert come_until(video)[-1] == len(video.doing("comes")) and come_until(video)[0] == 0
        flat, told = token_labels(video), event_labels(video)
        for question in questions_of(video):
            looks = asked_about(video, question, flat, told)
            assert len(looks) == len(question.answer.split()) and all(at.any() for at in looks)


def tiny() -> VideoRecipe:
    return VideoRecipe(dev_videos=6, see_steps=2, see_pairs=2, answer_steps=4, answer_batch=2, save_every=2)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> VideoTrainer:
    return VideoTrainer(tmp_path_factory.mktemp("videos"), tiny(), device="cpu")


def test_the_model_is_small_and_knows_all_words(trainer: VideoTrainer) -> None:
    assert sum(p.numel() for p in trainer.model.parameters()) <= 3_000_000
    known = trainer.processor.tokenizer.get_vocab()
    for seed in range(100):
        for question in questions_of(make_video(seed, "test")):
            assert all(word in known for word in (*question.text.split(), *question.answer.split()))
    for frames, tokens in ((12, 216), (16, 288)):
        made = trainer.inputs([np.zeros((frames, SIDE, SIDE, 3), np.uint8)], augment=False)
        assert (made["input_ids"] == trainer.model.config.video_token_id).sum() == tokens
        assert trainer.processor.tokenizer.unk_token_id not in made["input_ids"]


@torch.no_grad()
def test_packed_questions_are_answered_as_if_alone(trainer: VideoTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of every answer token of a pack equal those of its prompt alone, as evaluation makes it of processor and template."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")  # float32
    model, processor = trainer.model, trainer.processor
    videos = [make_video(seed, "dev") for seed in (0, 3)]
    asked = [questions_of(video)[:3] for video in videos]
    packed_logits, packed, _ = trainer.answers(videos, asked, augment=False)
    model.set_attn_implementation("sdpa")
    rows = []
    for video, questions in zip(videos, asked, strict=True):
        for question in questions:
            said = f"{question.answer} </s>"
            made: Any = trainer.inputs([draw_video(video)], augment=False)
            rest = processor.tokenizer(f"{question.text} ASSISTANT: {said}", return_tensors="pt")["input_ids"]
            made["input_ids"] = torch.cat([made["input_ids"], rest], 1)
            made["attention_mask"] = torch.ones_like(made["input_ids"])
            made["mm_token_type_ids"] = 2 * (made["input_ids"] == model.config.video_token_id).long()
            rows.append(model(**made).logits[0, -1 - len(said.split()) : -1])
    model.set_attn_implementation("half")
    assert torch.cat(rows).shape == packed_logits.shape and len(packed.input_ids) == 2
    torch.testing.assert_close(torch.cat(rows), packed_logits, atol=2e-4, rtol=1e-4)


def test_evaluation_asks_as_training_does(trainer: VideoTrainer) -> None:
    """The prompt of the chat template, through the inputs of `mmcompress eval`, has the tokens of a packed conversation."""
    questions = drawn_questions("videos", 7, None)
    texts, wrong = texts_of(trainer.processor, task_of("videos"), questions, "official", None, "chat")
    assert not wrong
    _, inputs, wrong = inputs_of(trainer.model, trainer.processor, questions, texts, [2])
    assert not wrong
    clip = questions[2].videos[0]()  # type: ignore[operator]
    begin = trainer.inputs([clip.frames], augment=False)["input_ids"][0].tolist()
    words = [trainer.vocabulary[word] for word in [*questions[2].text.split(), "ASSISTANT:"]]
    assert inputs["input_ids"][0].tolist() == begin + words


@pytest.mark.slow
def test_training_of_videos_restarts_where_it_stopped(tmp_path: Path) -> None:
    """A run that is stopped and started again ends with the same weights as one that was not."""
    from mmcompress.eval.synthetic.benchmark import load

    straight = VideoTrainer(tmp_path / "straight", tiny(), device="cpu").run()

    class Stopped(Exception):
        pass

    stopped = VideoTrainer(tmp_path / "stopped", tiny(), device="cpu")

    def stop(stage: str, step: int, *_: Any) -> None:
        if (stage, step) == ("answer", 4):
            raise Stopped

    stopped.record = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        stopped.run()
    resumed = VideoTrainer(tmp_path / "stopped", tiny(), device="cpu").run()
    (a, processor), (b, _) = load(straight), load(resumed)
    assert all(torch.equal(weight, b.state_dict()[name]) for name, weight in a.state_dict().items())
    assert processor.video_processor.size["longest_edge"] == 16 * SIDE**2


# ---------------------------------------------------------------------- the model in the package
def test_the_embedded_model_of_videos_works(tmp_path: Path) -> None:
    from mmcompress.assets import VIDEO, checkpoint, model_path
    from mmcompress.eval.evaluator import Setup, evaluate
    from mmcompress.eval.synthetic.benchmark import load

    assert checkpoint(VIDEO) == str(model_path(VIDEO))
    model, processor = load(model_path(VIDEO))
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    setup = Setup("videos", batch_size=35)
    record = evaluate(model, processor, drawn_questions("videos", 70, model), setup, folder=tmp_path, name=VIDEO)
    right: dict[str, list[float]] = {}
    for row in record["rows"]:
        right.setdefault(row["kind"], []).append(row["value"])
    assert set(right) == set(KINDS)
    assert np.mean([np.mean(values) for values in right.values()]) >= 0.9
    assert all(np.mean(values) >= 0.7 for values in right.values())
