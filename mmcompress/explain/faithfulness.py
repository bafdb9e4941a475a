# SPDX-License-Identifier: Apache-2.0
"""How faithful maps are where the truth is known: Obj-IoU, Func-IoU, F1-IoU and the pointing game.

The protocol is that of Li et al. (ICCV 2025, arXiv 2506.23270): maps as 8-bit values, bilinear resizing and Otsu thresholds as in
OpenCV; numbers equal the authors' on their inputs. All functions work on the CPU; cost a few passes over the pixels per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .labels import FUNCTION, NOUN
from .panes import Box, Pane
from .result import Explanation
from .thresholds import otsu_threshold, quantised, resize_map, resize_nearest

OUTSIDE = -1
"""In a mask: not part of the picture."""


@dataclass(frozen=True)
class Scores:
    """Scores of words, of one sample or many. obj, precision, recall: of each object word; func: of each function word; pointing:
    whether the largest value of an object word lies on its object. coverage: part of the cells of the grid
    that are there, of each sample (tiles and thumbnail on one grid).
    gone: object words whose object lies in missing cells only."""

    obj: list[float] = field(default_factory=list)
    precision: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    func: list[float] = field(default_factory=list)
    pointing: list[bool] = field(default_factory=list)
    coverage: list[float] = field(default_factory=list)
    gone: int = 0

    @staticmethod
    def pooled(parts: Iterable[Scores]) -> Scores:
        """All words of all samples together."""
        total = Scores()
        gone = 0
        for part in parts:
            for name in ("obj", "precision", "recall", "func", "pointing", "coverage"):
                getattr(total, name).extend(getattr(part, name))
            gone += part.gone
        return Scores(total.obj, total.precision, total.recall, total.func, total.pointing, total.coverage, gone)

    @property
    def obj_iou(self) -> float:
        return _mean(self.obj)

    @property
    def func_iou(self) -> float:
        return _mean(self.func)

    @property
    def f1_iou(self) -> float:
        """Harmonic mean of the two means."""
        a, b = self.obj_iou, self.func_iou
        return 2 * a * b / (a + b) if a + b > 0 else 0.0 if a + b == 0 else math.nan

    def mean(self, name: str) -> float:
        return _mean(getattr(self, name))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def word_scores(
    maps: Tensor, words: Sequence[Sequence[int]], labels: Sequence[int], mask: Tensor, valid: Tensor | None = None
) -> Scores:
    """Scores of the words of one text on one picture.

    maps    [T, h, w] uint8, of its tokens. words: tokens of each word; labels: one per word (above).
    mask    [H, W] integer: number of the object at each pixel, OUTSIDE where it does not count. It shows what the grid shows.
    valid   [h, w] bool: cells that are there; others count nowhere (None: all).

    Obj-IoU: of a word with an object, the map resized and cut at its Otsu threshold against the mask; the best token of the word,
    and the best of neighbouring words with the same object. The threshold of a text is the mean over its nouns of the largest
    threshold of their tokens; Func-IoU is the part of a function word's cells below it, mean over tokens.
    """
    mask, maps, size = mask.cpu(), maps.cpu(), (mask.shape[0], mask.shape[1])
    valid = torch.ones(maps.shape[1:], dtype=torch.bool) if valid is None else valid.cpu()
    pixels = resize_nearest(valid, size) & (mask != OUTSIDE)
    total = Scores(coverage=[valid.float().mean().item()])
    thresholds, gone, before = [], 0, None
    for number, (tokens, label) in enumerate(zip(words, labels, strict=True)):
        if label < NOUN or not bool(pixels.any()):
            continue
        resized = [resize_map(maps[t], size) for t in tokens]
        cuts = [otsu_threshold(r[pixels]) for r in resized]
        thresholds.append(float(max(cuts)))
        if label <= 0 or not bool((mask == label).any()):
            continue
        wanted = (mask == label) & pixels
        if not bool(wanted.any()):
            gone += 1
            continue
        best = max(
            (_overlap((r > cut) & pixels, wanted) for r, cut in zip(resized, cuts, strict=True)), key=lambda s: s[0]
        )
        hit = any(_points(maps[t], valid, mask, label) for t in tokens)
        if before == (number - 1, label):
            if best[0] > total.obj[-1]:
                total.obj[-1], total.precision[-1], total.recall[-1] = best
            total.pointing[-1] = total.pointing[-1] or hit
        else:
            total.pointing.append(hit)
            for values, value in zip((total.obj, total.precision, total.recall), best, strict=True):
                values.append(value)
        before = (number, label)
    if thresholds:
        cut = _mean(thresholds)
        for tokens, label in zip(words, labels, strict=True):
            if label == FUNCTION:
                total.func.append(_mean([(maps[t][valid] < cut).float().mean().item() for t in tokens]))
    return Scores(total.obj, total.precision, total.recall, total.func, total.pointing, total.coverage, gone)


def _overlap(found: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    """Intersection over union, precision, recall of two sets of pixels; `wanted` is not empty."""
    both, mine, theirs = (float(x.sum()) for x in (found & wanted, found, wanted))
    return both / (mine + theirs - both), both / mine if mine else 0.0, both / theirs


def _points(values: Tensor, valid: Tensor, mask: Tensor, label: int) -> bool:
    """Whether the centre of the cell with the largest value lies on the object (the first of several)."""
    best = int(values.int().masked_fill(~valid, -1).flatten().argmax())
    row, column = divmod(best, values.shape[1])
    y, x = (int((at + 0.5) * n / cells) for at, n, cells in zip((row, column), mask.shape, values.shape, strict=True))
    return int(mask[y, x]) == label


def explanation_scores(
    explanation: Explanation,
    labels: Sequence[int],
    mask: Tensor,
    visual: int = 0,
    frame: int = 0,
    words: Sequence[int] | None = None,
) -> Scores:
    """Scores of an explanation where the truth is known.

    labels: one for each of its words (or of those with the numbers `words`). mask [H, W]: objects in the picture, as in
    `word_scores`. Tiles and thumbnail are fused on the grid of the tiles. Missing cells count neither for nor against: look at
    `coverage` beside the scores, and compare methods on the same cells. Words with a token that was not explained are left out.
    """
    numbers = range(len(explanation.words)) if words is None else words
    chosen = [
        (n, label)
        for n, label in zip(numbers, labels, strict=True)
        if all(map(explanation.explained, explanation.words[n].tokens))
    ]
    tokens = [t for n, _ in chosen for t in explanation.words[n].tokens]
    if not tokens:
        return Scores()
    grids = []
    for token in tokens:
        pane, grid = explanation.fused(explanation.token_map(token, visual), visual, frame)
        grids.append(grid)
    maps = torch.stack(grids)
    valid = ~maps[0].isnan()
    place = iter(range(len(tokens)))
    groups = [[next(place) for _ in explanation.words[n].tokens] for n, _ in chosen]
    return word_scores(
        quantised(fill_missing(maps)), groups, [label for _, label in chosen], seen_in(mask, pane), valid
    )


def fill_missing(maps: Tensor) -> Tensor:
    """Maps [T, h, w] with NaN in the same cells of each: those get the value of the nearest cell that is there; 0 if none is."""
    there = ~maps[0].isnan()
    if bool(there.all()) or not bool(there.any()):
        return maps.nan_to_num(0.0)
    known, missing = there.nonzero().float(), (~there).nonzero().float()
    nearest = torch.cdist(missing, known).argmin(1)
    filled = maps.clone()
    filled[:, ~there] = maps[:, there][:, nearest]
    return filled


def seen_in(mask: Tensor, pane: Pane) -> Tensor:
    """What a pane shows of a picture with the mask [H, W]: [h, w], OUTSIDE where it reaches over the edge."""
    box: Box = pane.box
    if box == (0.0, 0.0, 1.0, 1.0):
        return mask
    (height, width), (left, top, right, bottom) = mask.shape, box
    x0, x1, y0, y1 = round(left * width), round(right * width), round(top * height), round(bottom * height)
    found = torch.full((max(1, y1 - y0), max(1, x1 - x0)), OUTSIDE, dtype=torch.int64)
    inside = mask[max(0, y0) : min(height, y1), max(0, x0) : min(width, x1)]
    y, x = max(0, -y0), max(0, -x0)
    found[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return found
