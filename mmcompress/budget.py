# SPDX-License-Identifier: Apache-2.0
"""The one rounding rule: from what a user asks to an exact number of tokens."""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation


def check_keep(keep: float | int) -> float | int:
    """Return `keep` if it is a ratio in (0, 1] or a positive count; raise otherwise.

    A float is a ratio (`1.0` keeps everything), an int is a count (`1` keeps one token).
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"keep={keep!r}: give a ratio as a float in (0, 1] or a count as an int >= 1")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"keep={keep}: a count must be at least 1; for a ratio write a float in (0, 1]")
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:
        count = max(1, round(keep)) if math.isfinite(keep) else 64
        raise ValueError(f"keep={keep}: a ratio must lie in (0, 1]; for a count write an int, e.g. keep={count}")
    return keep


def percent(value: str) -> float | None:
    """`25%` as a ratio; None for any other text."""
    try:
        return float(Decimal(value.strip().removesuffix("%")) / 100) if value.strip().endswith("%") else None
    except InvalidOperation:
        return None


def read_keep(text: str) -> float | int:
    """What a user writes for `keep`: `25%` and `0.25` are ratios, `64` is a count; raises ValueError for others."""
    value: float | int | None = percent(text)
    try:
        value = value if value is not None else int(text) if text.strip().isdigit() else float(text)
    except ValueError as error:
        raise ValueError(f"keep={text!r}: write a ratio as 0.25 or 25%, a count as an int, such as 64") from error
    return check_keep(value)


def keep_text(keep: float | int) -> str:
    """`keep` for people: 25% or 64."""
    return f"{round(100 * keep, 6):g}%" if isinstance(keep, float) else str(keep)


def warn_of_one(keep: float | int | None) -> None:
    """Warn of the count 1, which many write for all."""
    if isinstance(keep, int) and keep == 1:
        warnings.warn("keep=1 is a count, one token; for all write keep=1.0 or 100%", UserWarning, stacklevel=2)


def resolve(keep: float | int, tokens: int) -> int:
    """How many of `tokens` are kept: the count itself, or `round(keep * tokens)` (half to even) and at least 1.

    Raises ValueError for a count larger than `tokens`: no method can invent tokens.
    """
    check_keep(keep)
    if isinstance(keep, float):
        return max(1, round(keep * tokens)) if tokens else 0
    if keep > tokens:
        raise ValueError(
            f"keep={keep}, but only {tokens} visual tokens enter this stage: give a count of at most {tokens}, "
            f"or a ratio (a float in (0, 1]) that fits visuals of every size"
        )
    return keep


def merge_schedule(r: int | tuple[int, ...], blocks: int, inflect: float = 0.0) -> list[int]:
    """Tokens to merge in each of `blocks` encoder blocks, in the notations of ToMe.

    An int is the mean of a straight line over the blocks: `inflect` 0 is constant, -1 falls from 2r to 0, +1 rises from 0
    to 2r; each value is truncated. A tuple is taken as it is and padded with zeros.
    """
    if isinstance(r, tuple):
        if len(r) > blocks:
            raise ValueError(f"r has {len(r)} entries, but only {blocks} blocks run: give at most {blocks}")
        return [*r, *[0] * (blocks - len(r))]
    low = int(r * (1.0 - inflect))
    step = (2 * r - 2 * low) / (blocks - 1) if blocks > 1 else 0.0
    return [int(low + step * i) for i in range(blocks)]


def exact_merge_schedule(tokens: int, keep: int, blocks: int, protected: int) -> list[int]:
    """A schedule that leaves exactly `keep` of `tokens` mergeable tokens after `blocks` blocks.

    As even as possible: the same number everywhere and one more in the first blocks. A block can merge at most half of
    its tokens (`protected` ones not counted); where the even schedule would break that, earlier blocks merge more.
    Raises ValueError if no schedule reaches `keep`.
    """
    for extra in range(tokens + 1):
        left = tokens - keep
        schedule: list[int] = []
        for block in range(blocks):
            now = tokens + protected - sum(schedule)
            even = -(-left // (blocks - block))
            merged = min(even + extra, left, (now - protected) // 2)
            schedule.append(merged)
            left -= merged
        if left == 0:
            return schedule
    fewest = tokens
    for _ in range(blocks):
        fewest -= fewest // 2
    raise ValueError(
        f"cannot merge {tokens} tokens down to {keep} in {blocks} encoder blocks, each of which can merge at most half: "
        f"keep at least {fewest}, or prune after the encoder"
    )


def distinct_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """One layer for each cut: a cut that falls on the layer of the one before it moves up to the next layer.

    Raises ValueError if they come in the wrong order, or if one moves out of the `depth` layers.
    """
    found: list[int] = []
    for i, layer in enumerate(layers):
        if i and layer < layers[i - 1]:
            raise ValueError(f"layers {tuple(layers)} of {depth}: cuts must come in ascending order")
        found.append(max(layer, found[-1] + 1) if found else layer)
    if found[-1] >= depth:
        raise ValueError(
            f"cuts before the layers {tuple(found)}, but the language model has {depth} layers, so that the last cut can come "
            f"before layer {depth - 1}: cut fewer times (layers=..., ratios=...) or earlier"
        )
    return tuple(found)


def floored(ratios: Sequence[float], tokens: int) -> tuple[int, ...]:
    """`ratios` of `tokens` as whole numbers: rounded down, at least 1."""
    return tuple(max(1, int(ratio * tokens)) for ratio in ratios)


def layer_mean(tokens: float, counts: Sequence[float], layers: Sequence[int], depth: int) -> float:
    """Mean over `depth` layers of the tokens that enter them: `tokens` before the first of `layers`, from each of them on the
    next of `counts`."""
    return sum(n * span for n, span in zip((tokens, *counts), _spans(layers, depth), strict=True)) / depth


def _spans(layers: Sequence[int], depth: int) -> list[int]:
    """How many layers come before the first cut, between cuts, and behind the last one."""
    return [end - start for start, end in zip((0, *layers), (*layers, depth), strict=True)]


def check_mean(keep: float | int | None, layers: Sequence[int], depth: int, tokens: int | None = None) -> None:
    """Raise ValueError if cuts before `layers` cannot bring the mean over `depth` layers down to `keep` (a count: of `tokens`).

    A ratio is only refused where the layers before the first cut cost that much by themselves.
    """
    if isinstance(keep, float) and keep * depth <= layers[0]:
        least = f"above {layers[0] / depth:.3f}"
    elif isinstance(keep, int) and tokens is not None and keep * depth < tokens * layers[0] + depth - layers[0]:
        least = f"{layer_mean(tokens, [1] * len(layers), layers, depth):.1f} or more, with {tokens} visual tokens"
    else:
        return
    raise ValueError(
        f"keep={keep} is the mean over all layers, and {layers[0]} of the {depth} layers come before the first cut, so that it "
        f"can only be {least}: cut earlier (layers=...), or prune before the language model, as in 'divprune(keep=0.25) >> ...'"
    )


def scaled_to_mean(
    ratios: Sequence[float], tokens: int, layers: Sequence[int], depth: int, keep: float | int
) -> tuple[int, ...]:
    """Tokens after each cut, in the proportions of `ratios`, so that their mean over all layers is `keep`, a count or a part of
    `tokens`.

    All ratios are scaled by the largest factor whose counts, rounded down, do not go beyond the budget; what rounding has
    left goes to the cuts as single tokens, from the first one on. The mean is never above the budget and less than one token
    below it, as long as a cut can take more; only of a ratio that is too small for one token in every layer it is above.
    No cut leaves more than the one before it, or less than 1. Raises ValueError if the mean cannot be reached.
    """
    resolve(keep, tokens)
    check_mean(keep, layers, depth, tokens)
    before, *spans = _spans(layers, depth)
    room = int((keep if isinstance(keep, int) else keep * tokens) * depth + 1e-6) - before * tokens

    def counts_at(factor: float) -> list[int]:
        whole = factor * tokens * (1 + 1e-9)  # a product that should be a whole number may come out a little smaller
        return [min(tokens, max(1, int(ratio * whole))) for ratio in ratios]

    def cost(counts: list[int]) -> int:
        return sum(n * span for n, span in zip(counts, spans, strict=True))

    low, high = 0.0, 1 / min(ratios)
    if cost(counts_at(high)) <= room:
        low = high
    for _ in range(40):
        factor = (low + high) / 2
        low, high = (factor, high) if cost(counts_at(factor)) <= room else (low, factor)
    counts = counts_at(low)
    given = True
    while given:
        given = False
        for i, span in enumerate(spans):
            if counts[i] < (counts[i - 1] if i else tokens) and cost(counts) + span <= room:
                counts[i] += 1
                given = True
    return tuple(counts)


def recycling(dropped: int) -> tuple[int, int]:
    """How many of `dropped` tokens SparseVLM merges (30 %, and one more), and into how many (a tenth, and one more)."""
    merged = int(0.3 * dropped) + 1 if dropped else 0
    return merged, merged // 10 + 1 if dropped else 0


def kept_beside_recycled(tokens: int, k: int) -> int:
    """How many of `tokens` are kept, at least 1, where these and those that `recycling` makes of the others are to be `k`.

    Of two numbers that fit, the larger one. Where k has no room for all that `recycling` makes, one token is kept.
    """
    fits = bisect.bisect_right(range(tokens), k, key=lambda kept: kept + recycling(tokens - kept)[1])
    return max(1, fits - 1)


def check_each(stage: object, k: int, tokens: int, frames: int) -> None:
    """Raise ValueError if `k` of the `tokens` of a video of `frames` frames are too few for a stage that keeps one of each."""
    if k < min(frames, tokens):
        raise ValueError(
            f"{stage!r} leaves {k} of {tokens} tokens of a video of {frames} frames, and keeps one of each frame at least: keep "
            f"{frames} ({100 * frames / tokens:.2g}%) or more, or show fewer frames"
        )
