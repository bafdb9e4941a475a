# SPDX-License-Identifier: Apache-2.0
"""What an encoder of frames, and the first layers of a language model behind it, are taught to tell about every visual token."""

from __future__ import annotations

import numpy as np

from ...synthetic.questions import Question
from ...synthetic.scenes import CHARACTERS, COLORS, SHAPES
from ...synthetic.videos.content import CODE_LENGTH, DIRECTIONS, MOST_COMING, PAIR, SIDE, Actor, Video
from ...synthetic.videos.frames import seen, sign_seen

UNIT = 8
"""Side of what one visual token of the embedded model shows, in pixels; it shows a pair of frames."""
GRID = SIDE // UNIT
_COLOR = {name: i + 1 for i, name in enumerate(COLORS)}
_SHAPE = {name: i + 1 for i, name in enumerate(SHAPES)}
LABELS = {"color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "character": len(CHARACTERS) + 1, "slot": CODE_LENGTH + 1}
"""What a pair of frames shows at a token, with the number of classes; class 0 is "nothing of that kind here"."""
EVENTS = {"goes": len(DIRECTIONS) + 1, "comes": MOST_COMING + 1, "turned": len(COLORS) + 1}
"""What has happened until then to the thing that a token shows; class 0: nothing of that kind. comes: as which one."""


def _covered(center: tuple[float, float], radius: float) -> np.ndarray:
    """Tokens whose middle lies in the disc, bool [GRID, GRID]."""
    at = (np.arange(GRID) + 0.5) * UNIT
    return (at[None] - center[0]) ** 2 + (at[:, None] - center[1]) ** 2 <= radius**2  # type: ignore[no-any-return]


def shown_at(video: Video, actor: Actor, pair: int) -> np.ndarray:
    """Tokens of a pair of frames that show it, bool [GRID, GRID]."""
    thing = seen(video, actor, PAIR * pair + (PAIR - 1) / 2)
    return np.zeros((GRID, GRID), bool) if thing is None else _covered(thing.center, 0.95 * thing.radius)


def token_labels(video: Video, pairs: list[int] | None = None) -> np.ndarray:
    """Labels of every token of those pairs of frames (all), int64 [labels, tokens], in the order of `LABELS`, pair by pair."""
    pairs = list(range(video.frames // PAIR)) if pairs is None else pairs
    labels = np.zeros((len(LABELS), len(pairs), GRID, GRID), dtype=np.int64)
    at = (np.arange(GRID) + 0.5) * UNIT
    for i, pair in enumerate(pairs):
        for actor in video.actors:
            thing = seen(video, actor, PAIR * pair)
            if thing is not None:
                here = shown_at(video, actor, pair)
                labels[0, i, here], labels[1, i, here] = _COLOR[thing.color], _SHAPE[thing.shape]
        if video.sign is not None and sign_seen(video, PAIR * pair):
            for slot, (character, (left, top, right, bottom)) in enumerate(
                zip(video.sign.code, video.sign.boxes, strict=True)
            ):
                here = ((at > top) & (at <= bottom))[:, None] & ((at > left) & (at <= right))[None]
                labels[2, i, here], labels[3, i, here] = CHARACTERS.index(character) + 1, slot + 1
    return labels.reshape(len(LABELS), -1)


def event_labels(video: Video) -> np.ndarray:
    """Labels of every token, int64 [events, tokens], in the order of `EVENTS`; -100 where nothing is shown."""
    labels = np.full((len(EVENTS), video.frames // PAIR, GRID, GRID), -100, dtype=np.int64)
    coming = video.doing("comes")
    for pair in range(video.frames // PAIR):
        for actor in video.actors:
            here = shown_at(video, actor, pair)
            labels[:, pair, here] = 0
            if actor.does == "goes" and pair:
                labels[0, pair, here] = list(DIRECTIONS).index(actor.goal) + 1
            elif actor.does == "comes":
                labels[1, pair, here] = coming.index(actor) + 1
            elif actor.does == "turns" and actor.at <= PAIR * pair:
                labels[2, pair, here] = _COLOR[actor.thing.color]
    return labels.reshape(len(EVENTS), -1)


def come_until(video: Video) -> list[int]:
    """How many things have come when each pair of frames is over."""
    return [sum(actor.at <= PAIR * pair for actor in video.doing("comes")) for pair in range(video.frames // PAIR)]


def asked_about(video: Video, question: Question, labels: np.ndarray, events: np.ndarray) -> list[np.ndarray]:
    """Where each word of the answer should look, bool [tokens + pairs of frames]: at tokens that show what is asked about, or at
    the end of a pair of frames (how many have come is known at the last one)."""
    pairs = video.frames // PAIR
    ends = np.zeros(pairs, bool)
    words = question.answer.split()
    if question.kind == "count":
        ends[-1] = True
        return [np.concatenate([np.zeros(labels.shape[1], bool), ends])]
    if question.kind in ("reading", "when"):
        slots = (
            [labels[3] == slot + 1 for slot in range(CODE_LENGTH)] if question.kind == "reading" else [labels[3] > 0]
        )
        return [np.concatenate([at, ends]) for at in slots]
    actor = video.actors[question.targets[0]]
    at = np.stack([shown_at(video, actor, pair) for pair in range(pairs)]).reshape(-1)
    if question.kind == "direction":
        at &= events[0] > 0
    elif question.kind == "change":
        at &= events[2] > 0
    return [np.concatenate([at, ends])] * len(words)
