# SPDX-License-Identifier: Apache-2.0
"""The embedded model that reads pages: a Qwen3-VL of the sizes of `qwen3-vl-shapes`, which it starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...synthetic.pages.content import COLUMNS, DIGITS, HEADINGS, ITEMS, KEYS, VALUES
from ...synthetic.pages.layout import SIZES, UNIT
from ...synthetic.scenes import CHARACTERS
from ..families import Qwen3VL, take_over
from ..model import make_tokenizer

WORDS = tuple(dict.fromkeys([*KEYS, *VALUES, *ITEMS, *COLUMNS, *HEADINGS[0], *HEADINGS[1]]))
"""All words that are written on pages."""
CHARACTERS_WRITTEN = "abcdefghijklmnopqrstuvwxyz" + DIGITS
_ASKED = "what is the of how many plus which largest smallest lines does heading say listed yes no , . ?"


class PageReader(Qwen3VL):
    """Qwen3-VL for pages of about 320 visual tokens: patches of 8 x 8 pixels that are not merged."""

    name = "qwen3-vl-pages"
    patch = UNIT
    merge = 1
    width = 128
    depth = 5
    pixels = {"shortest_edge": 32 * 64, "longest_edge": max(w * h for w, h in SIZES)}  # noqa: RUF012 - as in the base

    def make_tokenizer(self) -> Any:
        return make_tokenizer((*_ASKED.split(), *DIGITS, *CHARACTERS, *WORDS), **self.special)

    def make_model(self, tokenizer: Any) -> Any:
        """A model with the language model of the embedded Qwen3-VL and its words that occur here too; the rest is random."""
        model = super().make_model(tokenizer)
        take_over(model, tokenizer, "language_model")
        with torch.no_grad():
            for module in model.model.visual.modules():
                if (
                    isinstance(module, nn.Linear | nn.Conv3d) and module.weight.any()
                ):  # not those of DeepStack that begin at zero
                    module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        return model
