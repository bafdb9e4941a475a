# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.sinks import check_dims, of_image_heads, sink_dims, sink_magnitude, without_columns
from ..plan import as_pipeline, register
from ..selection import Selection
from ..stage import LayerStage, Need
from ..visuals import Visuals
from .var_attention_sink import check_part, check_tau

MEANS = ("last_attention", "text_attention", "mean_attention")
HEADS = ("last_attention_heads", "text_attention_heads")
MODES = ("drop", "mask", "heads")


def _split(name: str) -> tuple[str, str]:
    """A signal and where it is taken: "last_attention", "@next"."""
    kind, at, where = name.partition("@")
    return kind, at + where


@functools.lru_cache
def _host(plan: str) -> LayerStage:
    stages = as_pipeline(plan).parts
    if len(stages) != 1 or not isinstance(stages[0], LayerStage) or isinstance(stages[0], SinkCorrection):
        raise ValueError(
            f"host={plan!r}: give one method that acts in the layers of the language model, like 'fastv(keep=0.25)'"
        )
    return stages[0]


@register("sink_correction")
@dataclass(frozen=True, repr=False)
class SinkCorrection(LayerStage):
    """A method that scores visual tokens by attention, told which of them are attention sinks.

    From the findings of Kang et al., ICLR 2025, arXiv 2503.03321 (`var_attention_sink`): sinks get much attention and give the
    output almost nothing, so that they take the place of evidence in a top-k. `host` is the method as a plan string, with its
    budget: fastv, pyramiddrop, sparsevlm, transprune, or any other that reads attention. Sinks are visual tokens whose hidden
    state before the cut has |x_d| / rms(x) above `tau` in one of the dimensions `dims` (None: the known ones, see
    `var_attention_sink`). They are there from layer 2 on; scores from earlier layers need no correction. Departs from the
    paper, which corrects no method: this is a proposal, and in no reference.

    mode    "drop": sinks come last. "mask": their columns are removed and each row of each head brought back to the sum 1
            before the mean over heads; they come last. "heads": the mean is only over heads that give visual tokens at least
            `image_mass`, of which at least the part `rho` is not for sinks; over all heads for a sample without such heads, or
            without sinks. "mask" and "heads" need a host that reads the rows of the last or of the text tokens.
    retain  so many sinks, those with the largest values, are kept in any case: they may carry what the whole image says.

    A host that chooses by scores alone is made to obey; one that merges (sparsevlm) is shown attention in which sinks have the
    least of the row, and those to retain the most. Cost as the host, and N reads for each dimension.
    """

    host: str = "fastv"
    mode: str = "drop"
    retain: int = 0
    rho: float = 0.5
    image_mass: float = 0.2
    tau: float = 20.0
    dims: tuple[int, ...] | None = None
    paper: ClassVar[str] = "arXiv 2503.03321"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: choose one of {', '.join(MODES)}")
        if type(self.retain) is not int or self.retain < 0:
            raise ValueError(f"retain={self.retain!r}: give how many sinks are kept in any case, an int of at least 0")
        check_part("rho", self.rho, "the least share of non-sinks in the attention on visual tokens")
        check_part("image_mass", self.image_mass, "the least attention on visual tokens")
        check_tau(self.tau)
        object.__setattr__(self, "dims", check_dims(self.dims))
        read = [_split(name)[0] for name in self._read()]
        if not read:
            raise ValueError(f"host={self.host!r} reads no attention of LLM layers, so there is nothing to correct")
        if self.mode != "drop" and "mean_attention" in read:
            raise ValueError(
                f"mode={self.mode!r}: host={self.host!r} reads the mean of all rows, not heads: choose mode='drop'"
            )

    def stage(self) -> LayerStage:
        """The host."""
        return _host(self.host)

    def fit(self, config: Any) -> SinkCorrection:
        return dataclasses.replace(self, dims=sink_dims(config, self.dims))

    @property
    def keep(self) -> float | int:  # type: ignore[override]
        return self.stage().keep

    @property
    def positions(self) -> str:  # type: ignore[override]
        return self.stage().positions

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        needs = (((n,) if isinstance(n, str) else n) for n in self.stage().needs)
        return tuple(tuple(n and self._source(n) for n in names) for names in needs)

    def cuts(self, depth: int) -> tuple[int, ...]:
        return self.stage().cuts(depth)

    def budgets(self, tokens: int, depth: int) -> tuple[int, ...]:
        return self.stage().budgets(tokens, depth)

    def _read(self) -> list[str]:
        """Names of the attention that the host reads."""
        names = [n for need in self.stage().needs for n in ((need,) if isinstance(need, str) else need) if n]
        return [n for n in names if _split(n)[0] in (*MEANS, *HEADS)]

    def _source(self, name: str) -> str:
        """The signal that a signal of the host is made from."""
        kind, where = _split(name)
        return f"{kind}_heads{where}" if self.mode != "drop" and kind in MEANS else name

    def select(self, visuals: Visuals) -> Selection:
        if self.dims is None:
            raise ValueError("the sink dimensions depend on the language model: give dims=, or call fit(config) first")
        phi = sink_magnitude(visuals.features.detach(), self.dims)
        sinks = phi > self.tau
        order = phi.masked_fill(~sinks, float("-inf")).sort(dim=1, descending=True, stable=True).indices
        rank = torch.arange(visuals.n, device=order.device).expand_as(order)
        retained = sinks & (torch.zeros_like(order).scatter(1, order, rank) < self.retain)
        out = sinks & ~retained if self.mode != "heads" else torch.zeros_like(sinks)
        signals = dict(visuals.signals)
        for name in self._read():
            if (source := self._source(name)) in signals:
                signals[name] = self._corrected(name, visuals[source].float(), sinks, out, retained)
        chosen = self.stage().select(replace(visuals, signals=signals))
        if chosen.merges or chosen.scores is None:
            return chosen
        scores = chosen.scores.float().masked_fill(out, float("-inf")).masked_fill(retained, float("inf"))
        return replace(Selection.top(scores, visuals.k), scores=chosen.scores)

    def _corrected(self, name: str, values: Tensor, sinks: Tensor, out: Tensor, retained: Tensor) -> Tensor:
        """The attention `name` as the host sees it, from `values` [U, ..., N] of each head, or of their mean in the mode "drop"."""
        if self.mode == "mask":
            values = without_columns(values, out)
        elif self.mode == "heads":
            values = of_image_heads(values, sinks, self.rho, self.image_mass)
        kind = _split(name)[0]
        if self.mode != "drop" and kind in MEANS:
            values = values.mean(1)
            values = values[:, 0] if kind == "last_attention" else values
        shape = (len(values), *[1] * (values.dim() - 2), values.shape[-1])
        values = torch.where(out.view(shape), values.amin(-1, keepdim=True), values)
        return torch.where(retained.view(shape), values.amax(-1, keepdim=True), values)
