# SPDX-License-Identifier: Apache-2.0
"""Labels of frames made whole: windows of frames that follow each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .groups import group_sizes


def windows_of(labels: Tensor) -> Tensor:
    """The first frame of the run of equal labels that each frame is in: labels [U, T] to [U, T] int64."""
    goes_on = F.pad(labels[:, 1:] == labels[:, :-1], (1, 0))
    return torch.arange(labels.shape[1], device=labels.device).masked_fill(goes_on, 0).cummax(1).values


@torch.no_grad()
def longest_runs(labels: Tensor) -> Tensor:
    """Labels [U, T] int64 in [0, T) of which only the longest runs stay, [U, T]: every other frame joins a neighbour.

    A run stays if no other one of its label is longer and it has two frames or more; stretches of other frames take, from the left
    on, the label of the longer run beside them, as labels are by then, the left one of equals; 0 without any. T steps.
    """
    count = labels.shape[1]
    begin = windows_of(labels)
    size = group_sizes(begin, count).gather(1, begin)
    longest = torch.zeros_like(labels).scatter_reduce(1, labels, size, "amax").gather(1, labels)
    kept = (size == longest) & (longest > 1)
    number = torch.arange(count, device=labels.device).expand_as(labels)
    ahead = torch.where(kept, number, count).flip(1).cummin(1).values.flip(1)  # the next frame that stays
    right = F.pad(labels, (0, 1), value=-1).gather(1, ahead)
    reach = F.pad(size, (0, 1)).gather(1, ahead)
    found = torch.zeros_like(labels)
    label, length = torch.full_like(labels[:, 0], -1), torch.zeros_like(labels[:, 0])
    for frame in range(count):
        free = ~kept[:, frame]
        starts = free if not frame else free & kept[:, frame - 1]
        taken = torch.where(reach[:, frame] > length, right[:, frame], label).clamp_min(0)
        # inside a stretch the label goes on
        now = torch.where(free, torch.where(starts, taken, found[:, frame - 1] if frame else taken), labels[:, frame])
        length = torch.where(now == label, length + 1, 1)
        label = now
        found[:, frame] = now
    return found
