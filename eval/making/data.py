# SPDX-License-Identifier: Apache-2.0
"""Training data of the synthetic benchmark: small pictures, labels per patch, conversations as token ids."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..synthetic.questions import KINDS, Question, ask, neighbours
from ..synthetic.scenes import CHARACTERS, CODE_LENGTH, COLORS, SHAPES, SIDE, Scene, draw
from .model import GRID, PATCH

_COLOR_IDS = {name: i + 1 for i, name in enumerate(COLORS)}
_SHAPE_IDS = {name: i + 1 for i, name in enumerate(SHAPES)}
PATCH_LABELS: dict[str, int] = {
    "color": len(COLORS) + 1,
    "shape": len(SHAPES) + 1,
    "character": len(CHARACTERS) + 1,
    "slot": CODE_LENGTH + 1,
    **{f"{word} {what}": n + 1 for word in ("left of", "right of", "above", "below")
       for what, n in (("color", len(COLORS)), ("shape", len(SHAPES)))},
}  # fmt: skip
"""What each patch is taught to tell, with the number of classes; class 0 is "nothing of that kind here"."""


def small_picture(scene: Scene) -> np.ndarray:
    """The picture as the image processor sees it after resizing: uint8 [SIDE, SIDE, 3]."""
    return np.asarray(draw(scene).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def pictures(scenes: list[Scene], cache: Path | None = None) -> Tensor:
    """Small pictures of all scenes, uint8 [n, 3, SIDE, SIDE]; drawn by all cores and kept in the file `cache`."""
    if cache is not None and cache.exists():
        drawn = np.load(cache)
        if len(drawn) == len(scenes):
            return torch.from_numpy(drawn)
    if len(scenes) < 2000:  # starting processes takes longer than drawing
        rows = [small_picture(scene) for scene in scenes]
    else:
        with multiprocessing.get_context("spawn").Pool() as pool:
            rows = pool.map(small_picture, scenes, chunksize=256)
    drawn = np.stack(rows).transpose(0, 3, 1, 2).copy()
    if cache is not None:
        np.save(cache, drawn)
    return torch.from_numpy(drawn)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [n, 3, SIDE, SIDE] to what the image processor returns (mean 0.5, standard deviation 0.25)."""
    return (pixels.float() / 255 - 0.5) / 0.25


def noisy(pixels: Tensor) -> Tensor:
    """Pixels of a training step, a little brighter or darker, with noise."""
    return pixels * (1 + 0.1 * torch.randn(()).item()) + 0.05 * torch.randn_like(pixels)


def patch_labels(scene: Scene) -> np.ndarray:
    """Labels of every patch of a square scene, int64 [labels, GRID * GRID], in the order of `PATCH_LABELS`."""
    centers = (np.arange(GRID) + 0.5) * PATCH
    y, x = (grid.ravel() for grid in np.meshgrid(centers, centers, indexing="ij"))
    return labels_at(scene, x, y)


def labels_at(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Labels of the points (x, y) in drawing units, int64 [labels, points], in the order of `PATCH_LABELS`."""
    labels = np.zeros((len(PATCH_LABELS), len(x)), dtype=np.int64)
    rows = {name: i for i, name in enumerate(PATCH_LABELS)}
    for i, thing in enumerate(scene.things):
        inside = (x - thing.center[0]) ** 2 + (y - thing.center[1]) ** 2 <= (0.9 * thing.radius) ** 2
        labels[rows["color"], inside] = _COLOR_IDS[thing.color]
        labels[rows["shape"], inside] = _SHAPE_IDS[thing.shape]
        for word, j in neighbours(scene, i).items():
            if j is not None:
                labels[rows[f"{word} color"], inside] = _COLOR_IDS[scene.things[j].color]
                labels[rows[f"{word} shape"], inside] = _SHAPE_IDS[scene.things[j].shape]
    for sign in (scene.sign, *scene.more_signs):
        for slot, (character, box) in enumerate(zip(sign.code, sign.boxes, strict=True)):
            inside = (x > box[0]) & (x <= box[2]) & (y > box[1]) & (y <= box[3])
            labels[rows["character"], inside] = CHARACTERS.index(character) + 1
            labels[rows["slot"], inside] = slot + 1
    return labels


def scene_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the whole picture: which (colour, shape) pairs are there, and the characters of the code."""
    present = np.zeros(len(COLORS) * len(SHAPES), dtype=np.float32)
    for thing in scene.things:
        present[(_COLOR_IDS[thing.color] - 1) * len(SHAPES) + _SHAPE_IDS[thing.shape] - 1] = 1
    return present, np.array([CHARACTERS.index(c) for c in scene.sign.code], dtype=np.int64)


HARD = ("count", "place", "relation")
"""Question types that training asks twice as often: they are learned last."""


def conversation(scene: Scene, turns: int, rng: np.random.Generator, more: tuple[str, ...] = ()) -> list[Question]:
    """`turns` random questions about one scene: all types alike, and as much again for each time a type is in `more`."""
    asked: list[Question] = []
    kinds = [*KINDS, *more]
    while len(asked) < turns:
        question = ask(scene, kinds[int(rng.integers(len(kinds)))], rng)
        if question is not None:
            asked.append(question)
    return asked


@dataclass
class Tokens:
    """A batch of conversations, padded on the right: all [batch, length]; `turn` numbers the answers, -1 elsewhere."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    turn: Tensor


class Encoder:
    """Turns conversations into token ids, word by word, as the processor would do."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.vocabulary = tokenizer.get_vocab()
        self.pad = self.vocabulary["<pad>"]
        self.square = [self.vocabulary["USER:"], *[self.vocabulary["<image>"]] * (GRID * GRID)]
        """How a prompt about a square picture begins in the embedded LLaVA."""

    def __call__(self, conversations: list[list[Question]], prefixes: list[list[int]]) -> Tokens:
        """Conversations behind the token ids `prefixes`, with which the first question of each one begins."""
        rows = []
        for questions, prefix in zip(conversations, prefixes, strict=True):
            ids = list(prefix)
            turn = [-1] * len(ids)
            for i, question in enumerate(questions):
                prompt = [*(["USER:"] if i else []), *question.text.split(), "ASSISTANT:"]
                answer = [*question.answer.split(), "</s>"]
                ids += [self.vocabulary[word] for word in prompt + answer]
                turn += [-1] * len(prompt) + [i] * len(answer)
            rows.append((ids, turn))
        longest = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), longest), self.pad)
        turns = torch.full((len(rows), longest), -1)
        for b, (ids, turn) in enumerate(rows):
            input_ids[b, : len(ids)] = torch.tensor(ids)
            turns[b, : len(turn)] = torch.tensor(turn)
        return Tokens(input_ids, (input_ids != self.pad).long(), input_ids.masked_fill(turns < 0, -100), turns)
