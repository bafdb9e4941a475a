# SPDX-License-Identifier: Apache-2.0
"""Greedy choices of different tokens on a GPU, without a host that waits.

Up to TABLE tokens the cosines are made once, half of them and mirrored. Max-min makes all its picks in one launch. From a table
it is one program per visual, which reads one row per pick. Without one, a visual has as many programs as the device runs at
once; each looks after a stretch of its tokens, leaves its best one behind, waits until all have, and finds the next pick for
itself. A cooperative launch is what makes sure that all of them run: where they cannot, it fails and does not hang. The
determinant takes one launch per pick, each of which finds the last pick from what the one before left behind. The number of
launches depends on sizes alone: all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted
from .cosines import Tokens, length_of
from .naive import SPENT, first_largest

TABLE = 4096
"""Largest number of tokens whose cosines are held, 64 MB per visual."""
_TOGETHER = 2**28
"""Numbers in the tables that are held at a time."""
_NONE = tl.constexpr(float("-inf"))
_TAKEN = tl.constexpr(-1e30)
_SPENT = tl.constexpr(SPENT)


@triton.jit
def _meet(near, owner, row, token, pick):
    """The cosine of each token to its nearest pick, and which that is, when another pick comes; picks belong to themselves."""
    better = (row > near) | ((row == near) & (pick < owner))
    near, owner = tl.where(better, row, near), tl.where(better, pick, owner)
    return tl.where(token == pick, float("inf"), near), tl.where(token == pick, pick, owner)


@triton.jit
def _max_min_kernel(
    COSINE, NEAR, WEIGHT, PICKS, OWNER, count, tiles, k, w_u, w_n,
    WEIGHTED: tl.constexpr, NEAREST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All picks of one visual from its table."""
    u = tl.program_id(0).to(tl.int64)
    COSINE += u * count * count
    token = tl.arange(0, BLOCK)
    free = token < count
    near = tl.full([BLOCK], _NONE, tl.float32)
    for t in range(tiles):
        near = tl.maximum(near, tl.load(NEAR + (u * tiles + t) * count + token, mask=token < count, other=_NONE))
    weight = tl.full([BLOCK], 1, tl.float32)
    if WEIGHTED:
        weight = tl.load(WEIGHT + u * w_u + token * w_n, mask=token < count, other=0).to(tl.float32)
    pick = tl.argmax(tl.where(free, 1 - near, _NONE), 0, tie_break_left=True)
    tl.store(PICKS + u * k, pick.to(tl.int64))
    near = tl.full([BLOCK], _NONE, tl.float32)
    owner = tl.full([BLOCK], BLOCK, tl.int32)
    for step in range(1, k + 1):
        if NEAREST or step < k:
            row = tl.load(COSINE + pick.to(tl.int64) * count + token, mask=token < count, other=0)
            near, owner = _meet(near, owner, row, token, pick)
        if step < k:
            free = free & (token != pick)
            pick = tl.argmax(tl.where(free, weight * (1 - near), _NONE), 0, tie_break_left=True)
            tl.store(PICKS + u * k + step, pick.to(tl.int64))
    if NEAREST:
        tl.store(OWNER + u * count + token, owner.to(tl.int64), mask=token < count)


@triton.jit
def _row(
    X, LENGTH, COSINE, pick, token, count, width, x_n, x_d, HELD: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr
):
    """Cosines of a block of tokens to the pick, read from the table if it is held."""
    if HELD:
        cosine = tl.load(COSINE + pick.to(tl.int64) * count + token, mask=token < count, other=0)
    else:
        total = tl.zeros([BLOCK, DEPTH], tl.float32)
        for d in range(0, width, DEPTH):
            dims = d + tl.arange(0, DEPTH)
            own = tl.load(X + pick.to(tl.int64) * x_n + dims * x_d, mask=dims < width, other=0).to(tl.float32)
            at = X + token[:, None].to(tl.int64) * x_n + dims[None, :] * x_d
            x = tl.load(at, mask=(token < count)[:, None] & (dims < width)[None, :], other=0).to(tl.float32)
            total += x * own[None, :]
        scale = length_of(LENGTH, token, count) * tl.load(LENGTH + pick)
        cosine = tl.where(scale < float("inf"), tl.sum(total, 1) / scale, 0)
    return cosine


@triton.jit
def _leading(BEST, AT, u, blocks, SPAN: tl.constexpr):
    """The block with the largest value, the first of equals: its value, its token, its number."""
    block = tl.arange(0, SPAN)
    values = tl.load(BEST + u * blocks + block, mask=block < blocks, other=_NONE)
    lead = tl.argmax(values, 0, tie_break_left=True)
    return tl.max(values, 0), tl.load(AT + u * blocks + lead), lead


@triton.jit
def _leave(BEST, AT, at, value, token, BLOCK: tl.constexpr):
    """Write down the best token of the block, the first of equals."""
    lead = tl.argmax(value, 0, tie_break_left=True)
    tl.store(BEST + at, tl.max(value, 0))
    tl.store(AT + at, tl.min(token, 0) + lead)
    return lead


@triton.jit
def _together_kernel(
    X, LENGTH, WEIGHT, FIRST, CU, CU_PICKS, NEAR, OWNER, BEST, AT, ARRIVED, PICKS, x_u, x_n, x_d, w_u, w_n, count, width, k,
    WEIGHTED: tl.constexpr, NEAREST: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All picks of one visual by several programs, which wait for each other after each."""
    program, programs, u = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    visuals = tl.num_programs(1)
    if RAGGED:
        begin, place = tl.load(CU + u).to(tl.int64), tl.load(CU_PICKS + u).to(tl.int64)
        count, k = (tl.load(CU + u + 1) - begin).to(tl.int32), (tl.load(CU_PICKS + u + 1) - place).to(tl.int32)
        X += begin * x_n
        WEIGHT += begin * w_n
        PICKS += place
        slot = begin
    else:
        begin, slot = u * count, 0 * u
        X += u * x_u
        WEIGHT += u * w_u
        PICKS += u * k
    pick = (tl.load(FIRST + u) - slot).to(tl.int32)
    stretch = tl.cdiv(tl.cdiv(count, BLOCK), programs) * BLOCK
    low = program * stretch
    high = tl.minimum(count, low + stretch)
    for step in range(k):
        if program == 0:
            tl.store(PICKS + step, slot + pick)
        if NEAREST or step + 1 < k:
            best, lead = tl.full([], _NONE, tl.float32), tl.full([], 0, tl.int32)
            for start in range(low, high, BLOCK):
                token = start + tl.arange(0, BLOCK)
                there = token < high
                row = _row(X, LENGTH + begin, X, pick, token, count, width, x_n, x_d, False, BLOCK, DEPTH)
                seen = there & (step > 0)
                near = tl.load(NEAR + begin + token, mask=seen, other=_NONE)
                owner = (tl.load(OWNER + begin + token, mask=seen, other=0) - slot).to(tl.int32)
                near, owner = _meet(near, owner, row, token, pick)
                tl.store(NEAR + begin + token, near, mask=there)
                tl.store(OWNER + begin + token, slot + owner, mask=there)
                value = 1 - near
                if WEIGHTED:
                    value = value * tl.load(WEIGHT + token * w_n, mask=there, other=0).to(tl.float32)
                value = tl.where(there & (owner != token), value, _NONE)
                most = tl.max(value, 0)
                if most > best:
                    best, lead = most, start + tl.argmax(value, 0, tie_break_left=True)
            if step + 1 < k:
                side = ((step % 2) * visuals + u) * programs  # a fast program may be one pick ahead
                tl.store(BEST + side + program, best)
                tl.store(AT + side + program, lead)
                _wait(ARRIVED + u, programs * (step + 1))
                _, pick, _ = _leading(BEST + side, AT + side, 0, programs, SPAN)


@triton.jit
def _wait(ARRIVED, all):
    """Until `all` arrivals are counted: then everything that was written before them can be read."""
    tl.debug_barrier()
    arrived = tl.atomic_add(ARRIVED, 1, sem="acq_rel") + 1
    while arrived < all:
        arrived = tl.atomic_add(ARRIVED, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _gains(left, worth, there, BEST, BEST_LEFT, REST, at, token, BEST_AT, REST_AT, BLOCK: tl.constexpr):
    """Write down the best token of the block that is new, with what is left of it, and the best of those that are not."""
    new = there & (left > _SPENT)
    gain = tl.where(new, worth + tl.log(tl.where(new, left, 1)), _NONE)
    lead = _leave(BEST, BEST_AT, at, gain, token, BLOCK)
    tl.store(BEST_LEFT + at, tl.sum(tl.where(tl.arange(0, BLOCK) == lead, left, 0), 0))
    spent = there & (left > _TAKEN)
    _leave(REST, REST_AT, at, tl.where(spent, worth, _NONE), token, BLOCK)


@triton.jit
def _begin_kernel(WORTH, LEFT, BEST, BEST_AT, BEST_LEFT, REST, REST_AT, count, BLOCK: tl.constexpr):
    """What the tokens of a block are worth before the first pick."""
    block, blocks, u = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    there = token < count
    left = tl.load(LEFT + u * count + token, mask=there, other=_TAKEN)
    worth = tl.load(WORTH + u * count + token, mask=there, other=0)
    _gains(left, worth, there, BEST, BEST_LEFT, REST, u * blocks + block, token, BEST_AT, REST_AT, BLOCK)


@triton.jit(do_not_specialize=["step"])
def _determinant_kernel(
    X, LENGTH, COSINE, WORTH, LEFT, FACTOR, BEFORE, BEFORE_AT, BEFORE_LEFT, BEFORE_REST, BEFORE_REST_AT,
    BEST, BEST_AT, BEST_LEFT, REST, REST_AT, PICKS, x_u, x_n, x_d, count, width, blocks, k, step,
    HELD: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Pick number `step`, its row of the factor for a block of tokens, and what they are worth after it."""
    block, u = tl.program_id(0), tl.program_id(1).to(tl.int64)
    value, pick, lead = _leading(BEFORE, BEFORE_AT, u, blocks, SPAN)
    _, rest, _ = _leading(BEFORE_REST, BEFORE_REST_AT, u, blocks, SPAN)
    new = value > _NONE
    pick = tl.where(new, pick, rest)
    if block == 0:
        tl.store(PICKS + u * k + step, pick.to(tl.int64))
    if step + 1 < k:
        token = block * BLOCK + tl.arange(0, BLOCK)
        there = token < count
        left = tl.load(LEFT + u * count + token, mask=there, other=_TAKEN)
        FACTOR += u * k * count
        if new:  # what is not new changes nothing
            row = _row(
                X + u * x_u, LENGTH + u * count, COSINE + u * count * count, pick, token, count, width, x_n, x_d,
                HELD, BLOCK, DEPTH,
            )  # fmt: skip
            shared = tl.zeros([BLOCK], tl.float32)
            for s in range(0, step, STEPS):
                steps = s + tl.arange(0, STEPS)
                earlier = steps < step
                known = tl.load(FACTOR + steps.to(tl.int64) * count + pick, mask=earlier, other=0)
                at = FACTOR + steps[:, None].to(tl.int64) * count + token[None, :]
                shared += tl.sum(known[:, None] * tl.load(at, mask=earlier[:, None] & there[None, :], other=0), 0)
            row = (row - shared) / tl.sqrt(tl.load(BEFORE_LEFT + u * blocks + lead))
            tl.store(FACTOR + step.to(tl.int64) * count + token, row, mask=there)
            left = tl.where(left > _TAKEN, left - row * row, left)
        left = tl.where(token == pick, _TAKEN, left)
        tl.store(LEFT + u * count + token, left, mask=there)
        worth = tl.load(WORTH + u * count + token, mask=there, other=0)
        _gains(left, worth, there, BEST, BEST_LEFT, REST, u * blocks + block, token, BEST_AT, REST_AT, BLOCK)


def max_min(
    features: Tensor, k: int, weight: Tensor | None, first: Tensor | None = None, nearest: bool = False
) -> tuple[Tensor, Tensor]:
    if features.shape[1] > TABLE:
        return _max_min_together(features, k, weight, first, nearest, None, None)
    together = max(1, _TOGETHER // features.shape[1] ** 2)
    none = [None] * len(features)
    others = (none if x is None else x.split(together) for x in (weight, first))
    parts = [_max_min_held(x, k, *y, nearest) for x, *y in zip(features.split(together), *others, strict=False)]
    picks, near = zip(*parts, strict=True)
    return torch.cat(picks), torch.cat(near)


def max_min_ragged(
    features: Tensor, k: int, weight: Tensor | None, first: Tensor | None, cu_seqlens: Tensor, cu_picks: Tensor
) -> tuple[Tensor, Tensor]:
    """features [total, D]; all picks [k] of all segments, and the nearest one of each row."""
    weight = None if weight is None else weight[None]
    picks, near = _max_min_together(features[None], k, weight, first, True, cu_seqlens, cu_picks)
    return picks[0], near[0]


def _max_min_together(
    features: Tensor,
    k: int,
    weight: Tensor | None,
    first: Tensor | None,
    nearest: bool,
    cu_seqlens: Tensor | None,
    cu_picks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tokens = Tokens(features)
    if first is None:
        first = first_largest(1 - tokens.nearest())
    visuals = len(first)
    block = tokens.size["tokens"]
    programs = max(1, min(_processors(features.device) // visuals, triton.cdiv(tokens.count, block)))
    near, owner = torch.empty_like(tokens.length), torch.empty_like(tokens.length, dtype=torch.int64)
    picks = torch.full((len(features), k), -1, device=features.device)
    if cu_seqlens is not None:
        owner.fill_(-1)
    best = near.new_empty(2, visuals, programs)
    arrived = torch.zeros(visuals, dtype=torch.int32, device=features.device)
    weights = near if weight is None else weight
    _together_kernel[(programs, visuals)](
        features, tokens.length, weights, first, cu_seqlens, cu_picks, near, owner, best,
        torch.empty_like(best, dtype=torch.int32), arrived, picks,
        *features.stride(), *weights.stride(), tokens.count, tokens.width, k,
        WEIGHTED=weight is not None, NEAREST=nearest, RAGGED=cu_seqlens is not None,
        BLOCK=block, SPAN=triton.next_power_of_2(programs), DEPTH=tokens.depth(tokens.size["reach"]),
        launch_cooperative_grid=programs > 1,
    )  # fmt: skip
    return picks, owner


def _processors(device: torch.device) -> int:
    """Programs that surely run at the same time; in the interpreter one after the other."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if interpreted() else 8


def _as_if_loneliest(first: Tensor, count: int) -> Tensor:
    """Cosines to the nearest other token, [U, N], by which the picks begin with `first` [U]."""
    near = torch.ones(len(first), count, device=first.device)
    return near.scatter_(1, first[:, None], -1)


def _max_min_held(
    features: Tensor, k: int, weight: Tensor | None, first: Tensor | None, nearest: bool
) -> tuple[Tensor, Tensor]:
    tokens = Tokens(features)
    table, near = tokens.table(nearest=first is None)
    if first is not None:
        near = _as_if_loneliest(first, tokens.count)[:, None]
    picks = near.new_empty(len(features), k, dtype=torch.int64)
    owner = near.new_empty(len(features), tokens.count if nearest else 0, dtype=torch.int64)
    weights = tokens.length if weight is None else weight
    block = triton.next_power_of_2(tokens.count)
    _max_min_kernel[(len(features),)](
        table, near, weights, picks, owner, tokens.count, near.shape[1], k, *weights.stride(),
        WEIGHTED=weight is not None, NEAREST=nearest, BLOCK=block,
        num_warps=max(1, min(tokens.size["pick_warps"], block // 64)),
    )  # fmt: skip
    return picks, owner


def greedy_map(features: Tensor, log_quality: Tensor, k: int) -> Tensor:
    count = features.shape[1]
    numbers = count * count + k * count if count <= TABLE else k * count
    together = max(1, _TOGETHER // numbers)
    pairs = zip(features.split(together), log_quality.split(together), strict=True)
    return torch.cat([_greedy_map(x, q, k) for x, q in pairs])


def _greedy_map(features: Tensor, log_quality: Tensor, k: int) -> Tensor:
    tokens = Tokens(features)
    held = tokens.count <= TABLE
    table = tokens.table(nearest=False)[0] if held else tokens.length
    worth = 2 * log_quality.float().clamp_min(-1e30).contiguous()
    grid, constants = tokens.blocks(tokens.size["held_tokens" if held else "tokens"])
    factor = worth.new_empty(len(features), k, tokens.count)
    left = tokens.own_part
    picks = worth.new_empty(len(features), k, dtype=torch.int64)
    states = []
    for _ in range(2):
        best, best_left, rest = worth.new_empty(3, *grid[::-1])
        best_at, rest_at = worth.new_empty(2, *grid[::-1], dtype=torch.int32)
        states.append((best, best_at, best_left, rest, rest_at))
    _begin_kernel[grid](worth, left, *states[0], tokens.count, BLOCK=constants["BLOCK"])
    for step in range(k):
        _determinant_kernel[grid if step + 1 < k else (1, len(features))](
            features, tokens.length, table, worth, left, factor, *states[step % 2], *states[1 - step % 2], picks,
            *features.stride(), tokens.count, tokens.width, grid[0], k, step, HELD=held, STEPS=16, **constants,
        )  # fmt: skip
    return picks
