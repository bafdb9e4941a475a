# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.focus import focus, inhibit, unfocused
from ..plan import register
from ..stage import AttentionStage, Rewrite
from ..visuals import AttentionRows, widened
from .var_attention_sink import check_part


@register("cmai")
@dataclass(frozen=True, repr=False)
class CMAI(AttentionStage):
    """Hide from each text token the visual tokens that the text before it does not look at; nothing is dropped.

    Yang et al., "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy", preprint
    2024, arXiv 2411.15453 (its CMAI; its VMTC is `vmtc`). In layer `layer` each text token inherits, along the attention
    between text tokens, the attention that those pay to the visual tokens (mean over heads). It then sees, in all layers
    behind, only the part `rho`, ceil(rho * I), of the I visual tokens with the largest sum, ties by index, as if the others had
    been masked. Departs from the paper where its text is silent: there is no code, it was built from the abstract and reviews,
    and the formulas are our definition.

    Text tokens here are those behind the last visual; in decode each new token gets its own row, and is handed on itself.
    `first=True` leaves the first text token out, where others soak up attention; rows are ranked by themselves, so that this
    matters only for prompts that begin with the image. Where later stages drop tokens, the decision holds for those that are
    left. Cost: heads * T * S * d for T rows of each layer, and T * S numbers in the cache of one layer, which grow by a row
    and a column with each token (a static cache is waited for, and a compiled step compiled again).
    """

    rho: float = 0.5
    layer: int = 2
    first: bool = False
    paper: ClassVar[str] = "arXiv 2411.15453"

    def __post_init__(self) -> None:
        check_part("rho", self.rho, "the share of visual tokens that each text token sees")
        if self.rho == 0:
            raise ValueError("rho=0: each text token has to see a visual token; give a share in (0, 1]")
        if type(self.layer) is not int or self.layer < 0:
            raise ValueError(f"layer={self.layer!r}: give the number of the layer to look at, an int of at least 0")
        if type(self.first) is not bool:
            raise ValueError(f"first={self.first!r}: choose False, or True to leave out the first text token")

    def layers(self, depth: int) -> range:
        if self.layer >= depth - 1:
            raise ValueError(
                f"layer={self.layer}: the language model has {depth} layers, look at one of 0 to {depth - 2}"
            )
        return range(self.layer, depth)

    def rewriting(self, rows: AttentionRows) -> Rewrite | None:
        if rows.layer == self.layer:
            self._decide(rows)
            return None
        if "inhibited" not in rows.carried:
            return None
        hidden = rows.carried["inhibited"]
        place = rows.place().clamp_max(hidden.shape[2] - 1)  # a static cache ends in columns without tokens
        inhibited = hidden.gather(2, place[:, None].expand(hidden.shape[0], hidden.shape[1], -1)) & rows.visual[:, None]

        def rewrite(weights: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            return inhibit(weights, inhibited[:, part]), inhibited[:, part].any(2)

        return rewrite

    def _decide(self, rows: AttentionRows) -> None:
        """Carry on which pairs are inhibited, [B, Q, tokens of the conversation] bool, and note the attention of the new rows
        on visual tokens: [B, R, C] for the last R of the C columns that there are."""
        past, new = rows.before(), rows.stream.shape[1]
        columns, mean = past + new, rows.mean()[..., : past + new]
        visual, real = rows.visual[:, :columns], rows.real[:, :columns]
        to_image = mean * (rows.changing[..., None] & visual[:, None])
        known = rows.state.get("focus")
        if known is not None and not all(rows.fresh):
            to_image = torch.cat([self._before(known, rows, past, new - mean.shape[1]), to_image], 1)
        rows.state["focus"] = to_image
        text = columns - to_image.shape[1]
        first = None
        if self.first:
            words = real & ~visual
            first = (words & (words.cumsum(1) == 1))[:, text:]
        values = focus(mean[..., text:].masked_fill(visual[:, None, text:], 0), to_image, first)
        inhibited = unfocused(values, visual, self.rho) & rows.changing[..., None]
        place = rows.place()[:, :columns].expand(len(visual), -1)
        spread = inhibited.new_zeros(*inhibited.shape[:2], rows.tokens())
        rows.carried["inhibited"] = spread.scatter(2, place[:, None].expand_as(inhibited), inhibited)

    @staticmethod
    def _before(known: Tensor, rows: AttentionRows, past: int, between: int) -> Tensor:
        """What was noted, for the columns that there are now; samples with new visuals start anew."""
        kept = max(0, past - known.shape[2] + known.shape[1])  # fewer than there are, if the cache was cropped
        known = widened(known[:, :kept, :past], kept + between)
        if any(rows.fresh):
            known = known.masked_fill(torch.tensor(rows.fresh).to(known.device, non_blocking=True)[:, None, None], 0)
        return widened(known.transpose(1, 2), past + rows.stream.shape[1]).transpose(1, 2)
