# SPDX-License-Identifier: Apache-2.0
"""From the cells of the pictures to the rows of a compressed sequence, and from its slots back through the cuts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..runtime.packing import Group
from ..selection import Selection
from ..trace import VisualTrace

MISSING = -1


def rows_in_layer(visual: VisualTrace, layer: int | None = None) -> Tensor:
    """For every cell of a visual the place in the prompt of the token that stands for it in a layer of the language model (None:
    the last), MISSING where it was dropped: [N] int64. Merged cells share the place of the token that they went into."""
    chosen, places = visual.selection, visual.span.patches
    output = chosen.assignment(visual.tokens)[0]
    rows = torch.where(output < 0, MISSING, places[chosen.keep[0]][output.clamp_min(0)])
    groups, row = visual.call.groups, visual.row
    for before, group in itertools.pairwise(groups):
        if layer is not None and group.start > layer:
            break
        slots = _slots(before, row)
        stands = torch.full((group.logical + 1,), MISSING)  # the last one is for MISSING
        alive = _slots(group, row)
        stands[alive[alive >= 0]] = alive[alive >= 0]
        for at, chosen in _merges(group, row):
            output = chosen.assignment(len(at))[0]
            stands[slots[at]] = torch.where(output < 0, MISSING, slots[at[chosen.keep[0]]][output.clamp_min(0)])
        rows = stands[rows]
    return rows


def before_cut(weights: Tensor, before: Group, group: Group, row: int = 0) -> Tensor:
    """Weights [A, S] on what a layer behind a cut holds (the tokens of `group`, then those generated), on what the layer before it
    holds: a merged token hands its weight to its sources by their shares in it. [A, S + dropped]."""
    assert group.from_previous is not None
    physical, device = group.physical, weights.device
    found = weights.new_zeros(len(weights), before.physical)
    found[:, group.from_previous[row].to(device)] = weights[:, :physical]
    for at, chosen in _merges(group, row):
        slots, keep = at.to(device), chosen.keep[0].to(device)
        if chosen.weight is None:  # tokens made anew: all to the slot that they stand for
            continue
        output, share = chosen.assignment(len(at))[0].to(device), chosen.weight[0].to(device).float()
        made = found[:, slots[keep]]
        found[:, slots] = (made[:, output.clamp_min(0)] * share).masked_fill(output < 0, 0)
    return torch.cat([found, weights[:, physical:]], 1)


def slots_of(rows: Tensor, group: Group, row: int = 0) -> Tensor:
    """Slots in `group` of the tokens at the places `rows` [N] of the prompt, MISSING for those that are not there."""
    inverse = torch.full((group.logical + 1,), MISSING)
    slots = _slots(group, row)
    there = slots >= 0
    inverse[slots[there]] = torch.arange(group.physical)[there]
    return inverse[rows]


def _slots(group: Group, row: int) -> Tensor:
    """Place in the prompt of what each slot holds, [physical] on the host, MISSING in padding."""
    if group.source is None:
        return torch.arange(group.physical)
    source = group.source[row].cpu()
    return source if group.valid is None else source.masked_fill(~group.valid[row].cpu(), MISSING)


def _merges(group: Group, row: int) -> Iterator[tuple[Tensor, Selection]]:
    """What the cut at the start of `group` chose in a row of the batch: slots [N] of the group before, and the selection."""
    for rows, at, chosen in group.merges:
        for i in (rows[:, 0] == row).nonzero()[:, 0].tolist():
            parts = {n: t[i : i + 1] for n in ("keep", "assign", "weight") if (t := getattr(chosen, n)) is not None}
            yield at[i].cpu(), Selection(**parts).cpu()
