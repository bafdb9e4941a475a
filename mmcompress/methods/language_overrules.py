# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..plan import register
from .fastervlm import FasterVLM


@register("language_overrules")
@dataclass(frozen=True, repr=False)
class LanguageOverrules(FasterVLM):
    """Keep the k patches that CLS attends to most, so that text dominates the attention of the LLM less.

    Wu et al., "When Language Overrules: Revealing Text Dominance in Multimodal Large Language Models", arXiv 2508.10552. The
    pruning is that of `fastervlm`, whose notes hold here too; `keep` is 1 - r of the paper (0.25, 0.1 and 0.05 there). What it
    does to the balance of text and picture is measured by `mmcompress.modality_dominance`. Cost N log N. Departs from the
    reference as `fastervlm` does: any number of images in a batch, padding is no patch.
    """

    keep: float | int = 0.1
    paper: ClassVar[str] = "arXiv 2508.10552"
