# SPDX-License-Identifier: Apache-2.0
"""What was kept of pictures, remembered: one that is encoded again, half of it in a cache, keeps the same tokens."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

BYTES = 256 << 20


@dataclass(frozen=True)
class Kept:
    """source [m]: the tokens of a picture that enter the language model, in the order in which they do; rows [m, D], on the host:
    what they were, where a stage made them anew, else None."""

    source: Tensor
    rows: Tensor | None = None

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.source, self.rows) if x is not None)


class Memo:
    """What was kept, by the identity of a picture; the longest unused goes first where all take more than `limit` bytes."""

    def __init__(self, limit: int = BYTES) -> None:
        self.limit, self.used = limit, 0
        self.entries: OrderedDict[tuple[int, ...], Kept] = OrderedDict()

    def get(self, identity: tuple[int, ...]) -> Kept | None:
        found = self.entries.get(identity)
        if found is not None:
            self.entries.move_to_end(identity)
        return found

    def put(self, identity: tuple[int, ...], kept: Kept) -> None:
        self.entries[identity] = kept
        self.used += kept.bytes
        while self.used > self.limit and len(self.entries) > 1:
            self.used -= self.entries.popitem(last=False)[1].bytes
