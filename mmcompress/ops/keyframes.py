# SPDX-License-Identifier: Apache-2.0
"""Frames of a video that matter to a question, and still cover it: chosen on the host, from a score for each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

WAYS = ("aks", "top", "bins")


class Leaf(NamedTuple):
    """A stretch of neighbouring frames: number of the first, how many, how often the video was halved for it."""

    start: int
    length: int
    depth: int


def _standard(scores: Sequence[float]) -> list[float]:
    """Brought to [0, 1]; 0 where all are equal."""
    low, high = min(scores), max(scores)
    return [(score - low) / (high - low) if high > low else 0.0 for score in scores]


def leaves(scores: Sequence[float], most: int, peak: float = 0.8, depth: int = 5, spread: float = -100.0) -> list[Leaf]:
    """The stretches that AKS halves a video into, shallow ones first.

    scores, at least `most` of them, in [0, 1]. A stretch stays whole if the mean of its `most` best scores is more than `peak`
    above the mean of all, and their deviation more than `spread`; or at `depth`."""
    found, level, now = [], 0, [(0, len(scores))]
    while now:
        halves = []
        for start, length in now:
            part = scores[start : start + length]
            best = sorted(part, reverse=True)[:most]
            mean = math.fsum(part) / len(part)
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in part) / len(part))
            peaks = math.fsum(best) / len(best) - mean > peak and deviation > spread
            if peaks or level >= depth or length < 2:
                found.append(Leaf(start, length, level))
            else:
                halves += [(start, length // 2), (start + length // 2, length - length // 2)]
        level, now = level + 1, halves
    return found


def _best(scores: Sequence[float], among: Sequence[int], count: int) -> list[int]:
    """The `count` best of some frames, the earlier of equals."""
    return sorted(among, key=lambda i: -scores[i])[:count]


def keyframes(
    scores: Sequence[float],
    most: int,
    way: str = "aks",
    peak: float = 0.8,
    depth: int = 5,
    spread: float = -100.0,
    compat: str | None = None,
) -> list[int]:
    """The numbers of `most` frames by their scores, ascending; all of them where there are not more.

    way     "aks": Tang et al., CVPR 2025, arXiv 2502.21271: each stretch of `leaves` gives as many of its best frames as its share
            of the video; "top": the best of all; "bins": the best of each of `most` equal stretches.
    compat  "reference": as the code of AKS does it, which gives fewer frames, or none, where `most` is less than 2 ** depth, is no
            power of 2, or a stretch is short. Without it halving ends at log2(most), what is left over goes to the best frames that
            are not taken yet, and scores that are all equal choose at even distances.

    Raises ValueError for no frames wanted, for scores that are no numbers, and for another way."""
    if most < 1:
        raise ValueError(f"{most} frames were asked for: give a count of at least 1")
    if way not in WAYS:
        raise ValueError(f"way={way!r}: choose one of {', '.join(map(repr, WAYS))}")
    if compat not in (None, "reference"):
        raise ValueError(f"compat={compat!r}: choose 'reference' or None")
    if any(not math.isfinite(score) for score in scores):
        raise ValueError("scores of frames are not finite (NaN or Inf): look at what the frames are scored by")
    count = len(scores)
    if count < most or (count == most and compat is None):
        return list(range(count))
    if max(scores) == min(scores):
        return [(2 * i + 1) * count // (2 * most) for i in range(most)]
    if way == "top":
        return sorted(_best(scores, range(count), most))
    if way == "bins":
        edges = [i * count // most for i in range(most + 1)]
        return [_best(scores, range(a, b), 1)[0] for a, b in itertools.pairwise(edges)]
    depth = depth if compat else min(depth, int(math.log2(most)))
    found = leaves(_standard(scores), most, peak, depth, spread)
    chosen: list[int] = []
    for leaf in found:
        chosen += _best(scores, range(leaf.start, leaf.start + leaf.length), int(most / 2**leaf.depth))
    if compat is None:
        taken = set(chosen)
        chosen += _best(scores, [i for i in range(count) if i not in taken], most - len(chosen))
    return sorted(chosen)
