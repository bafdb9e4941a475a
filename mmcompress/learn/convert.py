# SPDX-License-Identifier: Apache-2.0
"""convert, unconvert, conversion: models whose layers are rebuilt for training, and back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..adapters import Adapter, adapter_for
from ..api import CONVERTED, _stock, is_compressed
from ..flops import layer_costs
from ..weights import Saved, base_of, load_into
from .depth import ROUTER, DepthEngine, MixtureOfDepths
from .gamma_mod import GammaMoD
from .p_mod import PMoD

M = TypeVar("M")
METHODS: dict[str, type[MixtureOfDepths]] = {"gamma_mod": GammaMoD, "p_mod": PMoD}


@torch.no_grad()
def _sum_of_bits(weight: Tensor) -> int:
    """The same for equal weights, on any device."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(weight.detach().contiguous().view(whole).sum(dtype=torch.int64))


class Conversion:
    """A converted model: `conversion(model)`."""

    def __init__(self, model: Any, config: MixtureOfDepths) -> None:
        adapter = adapter_for(model)
        if not isinstance(adapter, Adapter):
            raise NotImplementedError(f"{type(model).__name__} has no language model, whose layers could be converted")
        self.model, self.config = model, config
        self.engine = DepthEngine(adapter, config)
        self.base = base_of(model)
        self.before = {name: _sum_of_bits(weight) for name, weight in model.named_parameters()}
        self.replaced: dict[str, Tensor] = {}
        self.engine.install()

    @property
    def routers(self) -> nn.ModuleDict:
        """The routers by the number of their layer; one that several layers share is there once."""
        found: dict[int, tuple[str, nn.Module]] = {}
        for layer, router in self.engine.routers.items():
            found.setdefault(id(router), (str(layer), router))
        return nn.ModuleDict(dict(found.values()))

    def router_loss(self) -> Tensor:
        """What the routers add to the loss of the last call: the sum over the layers, weighted; 0 where they have no loss."""
        losses = list(self.engine.losses.values())
        if not losses:
            return torch.zeros((), device=next(self.model.parameters()).device)
        device = losses[0].device
        return getattr(self.config, "loss_weight", 1.0) * torch.stack([loss.to(device) for loss in losses]).sum()

    def tokens_per_layer(self, row: int = 0) -> list[int]:
        """How many tokens of batch row `row` (padding not counted) ran each LLM layer in the last prefill that was routed."""
        if not self.engine.tokens:
            raise ValueError("no call with something to route yet: run the model on a prompt with an image first")
        return [layer[row] for layer in self.engine.tokens]

    def report(self) -> str:
        """The last prefill in a line: tokens per layer, FLOPs and KV bytes, of what they are without conversion."""
        rows = range(len(self.engine.tokens[0]) if self.engine.tokens else 1)
        now, costs = [self.tokens_per_layer(row) for row in rows], layer_costs(self.engine.language_model)
        full = [[row[0]] * len(row) for row in now]  # the first layer runs everything
        flops, full_flops = (
            sum(cost.flops(n) for row in tokens for cost, n in zip(costs, row, strict=True)) for tokens in (now, full)
        )
        held = sum(map(sum, now)) / sum(map(sum, full))
        layers = ", ".join(str(sum(row[i] for row in now)) for i in range(len(now[0])))
        share = 100 * flops / full_flops
        return f"tokens per layer {layers}; LLM layers {share:.1f} % of the FLOPs, {100 * held:.1f} % of the KV cache"

    def changed(self) -> dict[str, Tensor]:
        """The parameters of the model that are not as they were before it was converted, by name."""
        named = {name: p for name, p in self.model.named_parameters() if name in self.before}
        return {name: p for name, p in named.items() if _sum_of_bits(p) != self.before[name]}

    def save(
        self,
        folder: str | os.PathLike[str],
        training: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """Write routers and changed weights (in `dtype`, default: as they are) to a folder, which `convert(..., weights=folder)`
        reads on the same base model; returns it."""
        tensors = {f"router.{name}": t for name, t in self.routers.state_dict().items()}
        tensors |= {f"model.{name}": p.detach() for name, p in self.changed().items()}
        tensors = {name: t.to(dtype) if dtype else t for name, t in tensors.items()}
        options = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}
        return Saved(self.config.name, self.base, tensors, options, training or {}).save(folder)

    def fill(self, saved: Saved) -> None:
        """Take over routers and weights."""
        load_into(self.routers, saved, "router.")
        named = dict(self.model.named_parameters())
        for name, tensor in saved.tensors.items():
            own = name.removeprefix("model.")
            if not name.startswith("model."):
                continue
            if own not in named or named[own].shape != tensor.shape:
                raise ValueError(f"the weights for {saved.method!r} do not fit: {own} {tuple(tensor.shape)}")
            self.replaced[own] = named[own].detach().clone()
            named[own].data.copy_(tensor)

    def undo(self) -> None:
        self.engine.remove()
        named = dict(self.model.named_parameters())
        for name, before in self.replaced.items():
            named[name].data.copy_(before)


def convert(model: M, method: str, *, weights: str | os.PathLike[str] | None = None, **options: Any) -> M:
    """Rebuild LLM layers of a stock Hugging Face model for training, in place; returns the same model.

    method   "p_mod" or "gamma_mod": mixture of depths, tokens pass by layers that they do not need.
    weights  a folder that `conversion(model).save` (or `mmcompress learn`) wrote for this very model: routers, and all weights that
             were trained with them. Without it routers are fresh, and the model has to be trained; its parameters include theirs.
    options  of the method; with `weights` they are those of the folder.

    Everything else works as before: generate, batches, any attention implementation, gradient checkpointing. `unconvert` is the way
    back. Raises ValueError for weights of another model or a model that is converted already, NotImplementedError for one that
    cannot be converted or is compressed.
    """
    if method not in METHODS:
        raise ValueError(f"unknown conversion {method!r}: there is {', '.join(METHODS)}")
    cls = METHODS[method]
    fields = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in fields:
            raise ValueError(f"{method} has no option {option!r}: its options are: {', '.join(fields)}")
    saved = None
    if weights is not None:
        if options:
            raise ValueError(
                f"options {sorted(options)} are those of the weights in {os.fspath(weights)!r}: leave them out"
            )
        saved = Saved.load(weights, method)
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.options.items()}
    config = cls(**options)
    stock = _stock(model)
    if CONVERTED in stock.__dict__:
        raise ValueError(
            f"the model is converted already, by {conversion(model).config!r}: mmcompress.unconvert(model) first"
        )
    if is_compressed(stock):
        raise NotImplementedError(
            "a compressed model cannot be converted: both give layers fewer tokens; mmcompress.uncompress(model) first"
        )
    if saved is not None:
        saved.check(stock)
    made = Conversion(stock, config)
    try:
        if saved is not None:
            made.fill(saved)
    except BaseException:
        made.undo()
        raise
    setattr(stock, CONVERTED, made)
    return model


def unconvert(model: M) -> M:
    """Take a conversion out again: hooks and routers are gone, and weights that `convert` put in are as they were. Weights that
    were trained since stay as trained. Nothing happens if there is none."""
    stock = _stock(model)
    made: Conversion | None = stock.__dict__.get(CONVERTED)
    if made is not None:
        made.undo()
        delattr(stock, CONVERTED)
    return model


def conversion(model: Any) -> Conversion:
    """The conversion of a model: its routers and their loss, what the last call did, `save`."""
    made: Conversion | None = _stock(model).__dict__.get(CONVERTED)
    if made is None:
        raise ValueError("this model is not converted: call mmcompress.convert(model, method) first")
    return made


__all__ = ["METHODS", "ROUTER", "Conversion", "conversion", "convert", "unconvert"]
