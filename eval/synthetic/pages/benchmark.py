# SPDX-License-Identifier: Apache-2.0
"""Pages of the dev or test split, one question each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..questions import Question
from .content import SPLITS, Split
from .layout import Page, draw_page, make_page
from .questions import KINDS, ask


@dataclass(frozen=True)
class PageItem:
    """One question about one page."""

    page: Page
    question: Question

    @property
    def seed(self) -> int:
        return self.page.seed

    @property
    def picture(self) -> Image.Image:
        return draw_page(self.page)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, without drawing it."""
        return self.page.size


def page_items(count: int, start: int = 1_000_000, split: Split = "test") -> list[PageItem]:
    """`count` questions on pages of `split` from seed `start` on, the types in turn, one question per page.

    Splits share no association (`content.split_of`): no key with its value, cell with its row and column, and so on.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
    kinds = list(KINDS)
    found: list[PageItem] = []
    while len(found) < count:
        page = make_page(start, split)
        kind = kinds[len(found) % len(kinds)]
        question = ask(page.content, kind, np.random.default_rng((8003, SPLITS.index(split), start)))
        if question is not None:
            found.append(PageItem(page, question))
        start += 1
    return found
