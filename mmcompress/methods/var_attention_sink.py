# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..ops.sinks import check_dims, find_sinks, image_centric, redistribute, sink_dims
from ..plan import register
from ..stage import AttentionStage, Rewrite
from ..visuals import AttentionRows


def check_part(name: str, value: Any, meaning: str, least: float = 0.0) -> None:
    """Raise unless `value` is a number in [least, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 1:
        raise ValueError(f"{name}={value!r}: give {meaning}, a number in [{least:g}, 1]")


def check_tau(tau: Any) -> None:
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not tau > 0:
        raise ValueError(f"tau={tau!r}: give the |x_d| / rms above which a token is a sink, above 0 (20 in the paper)")


@register("var_attention_sink")
@dataclass(frozen=True, repr=False)
class VARAttentionSink(AttentionStage):
    """In heads that look at the image, move attention from sinks to the other visual tokens; nothing is dropped.

    Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025, arXiv 2503.03321 (VAR).
    Sinks are tokens whose hidden state, as it enters the layer, has |x_d| / rms(x) above `tau` in one of the dimensions
    `dims`; each layer looks for them in calls with visuals, among all tokens of the call (without a cache, generated ones
    too). A head is rewritten in a row if it gives the visual tokens at least `image_mass`, and tokens among them that are no
    sinks at least the part `rho` of that; never in a layer where no visual token is a sink. The part `p` of its attention
    on all sinks, those of text too, goes to the visual tokens that are no sinks, in the proportions they have. Rows behind
    the last visual are rewritten, in prefill and decode.

    rho, p  as in the paper: `rho` is the least share of NON-sinks in the visual attention (0.8 in the paper for general
            questions, 0.5 for hallucination, 0.9 for vision-centric ones), `p` the share of sink attention that is MOVED. The
            reference calls rho the largest share of SINKS and p the share that is KEPT: its rho=0.5, p=0.6 are rho=0.5,
            p=0.4 here.
    dims    None: those known for LLaMA-2-7B and -13B (LLaVA), Qwen2-VL-7B and InternVL2-8B; for other language models give what
            `mm.find_sink_dims(model, inputs)` finds.
    layers  `first` and all behind it but the last one; `last=True` includes that, as the reference does by mistake.

    The reference takes the 7B dimensions for 13B too; newline tokens count as text here. Cost: heads * T * S * d for T rows of
    each layer, and as much memory for 256 of them; attention kernels stay on. Returned attention maps are those before.
    """

    rho: float = 0.8
    p: float = 0.6
    tau: float = 20.0
    image_mass: float = 0.2
    dims: tuple[int, ...] | None = None
    first: int = 2
    last: bool = False
    paper: ClassVar[str] = "arXiv 2503.03321"

    def __post_init__(self) -> None:
        check_part("rho", self.rho, "the least share of non-sinks in the attention on visual tokens")
        check_part("p", self.p, "the share of the attention on sinks that is moved")
        check_part("image_mass", self.image_mass, "the least attention on visual tokens")
        check_tau(self.tau)
        object.__setattr__(self, "dims", check_dims(self.dims))
        if type(self.first) is not int or self.first < 0:
            raise ValueError(
                f"first={self.first!r}: give the number of the first layer to act in, an int of at least 0"
            )
        if type(self.last) is not bool:
            raise ValueError(f"last={self.last!r}: choose False (the paper) or True (the last layer too)")

    def fit(self, config: Any) -> VARAttentionSink:
        return dataclasses.replace(self, dims=sink_dims(config, self.dims))

    def layers(self, depth: int) -> range:
        return range(self.first, depth if self.last else depth - 1)

    def rewriting(self, rows: AttentionRows) -> Rewrite:
        assert self.dims is not None
        sinks = rows.columns("sinks", find_sinks(rows.stream, self.dims, self.tau) if any(rows.fresh) else None)

        def rewrite(weights: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            chosen = image_centric(weights, rows.visual, sinks, self.rho, self.image_mass)
            return redistribute(weights, rows.visual, sinks, chosen, self.p), chosen.any(1)

        return rewrite
