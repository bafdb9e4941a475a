# SPDX-License-Identifier: Apache-2.0
"""The one rounding rule: from what a user asks to an exact number of tokens."""

from __future__ import annotations

import math


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
