# SPDX-License-Identifier: Apache-2.0
"""A harder synthetic benchmark: pages of text, with forms, tables, receipts and bar charts."""

from .benchmark import PageItem, page_items
from .content import Content, make_content, split_of
from .layout import Page, draw_page, make_page
from .questions import CHANCE, KINDS, ask

__all__ = [
    "CHANCE",
    "KINDS",
    "Content",
    "Page",
    "PageItem",
    "ask",
    "draw_page",
    "make_content",
    "make_page",
    "page_items",
    "split_of",
]
