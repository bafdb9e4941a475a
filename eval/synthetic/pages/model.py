# SPDX-License-Identifier: Apache-2.0
"""The embedded model that reads pages: a Qwen3-VL of the sizes of `qwen3-vl-shapes`, which it starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ....assets import model_path
from ..families import Qwen3VL
from ..model import make_tokenizer
from ..scenes import CHARACTERS
from .content import COLUMNS, DIGITS, HEADINGS, ITEMS, KEYS, VALUES
from .layout import SIZES, UNIT

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
        from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

        model = super().make_model(tokenizer)
        source = model_path("qwen3-vl-shapes")
        theirs = Qwen3VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32).state_dict()
        known, mine = AutoTokenizer.from_pretrained(source).get_vocab(), model.state_dict()
        with torch.no_grad():
            for name, weight in theirs.items():
                if "embed_tokens" in name or "lm_head" in name:
                    mine[name].normal_(std=weight.std().item())
                    for word, i in tokenizer.get_vocab().items():
                        if word in known:
                            mine[name][i] = weight[known[word]]
                elif "language_model" in name:
                    mine[name].copy_(weight)
            for module in model.model.visual.modules():
                if (
                    isinstance(module, nn.Linear | nn.Conv3d) and module.weight.any()
                ):  # not those of DeepStack that begin at zero
                    module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        return model
