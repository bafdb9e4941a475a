# SPDX-License-Identifier: Apache-2.0
"""Signals of the vision encoder as vLLM runs it: queries and keys picked up where its attention is given them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

from ...runtime.adapter import CLS_FEATURES, Adapter
from ...runtime.signals import KEYS, VisionTap, kind_of, of_rows


class ServedTap(VisionTap):
    """Listens to the layers of vLLM's tower, which stand where the blocks of the twin's do. All heads are gathered where they are
    spread over devices, so that each device computes the same."""

    def __init__(self, owner: Any, adapter: Adapter, names: set[str], tower: nn.Module) -> None:
        super().__init__(owner, adapter, names, None)
        self.layers = layers_of(tower)
        for index in {*self.at, *(adapter.feature_blocks if names.intersection(CLS_FEATURES) else ())}:
            if index >= len(self.layers):
                asked = ", ".join(self.at.get(index, ()))
                raise NotImplementedError(
                    f"{asked} comes from block {index + 1} of the vision encoder, and vLLM builds the first {len(self.layers)}, "
                    f"as far as its features are needed: choose a method that reads features, or attention of those"
                )
            windowed = adapter.packed and adapter.windowed and index not in adapter.tower.fullatt_block_indexes
            if windowed and not KEYS.issuperset(map(kind_of, self.at[index])):
                raise NotImplementedError(f"{', '.join(self.at[index])}: block {index + 1} attends within windows only")

    def install(self) -> list[RemovableHandle]:
        handles: list[RemovableHandle] = []
        for index in self.at:
            attention = _one(self.layers[index], MMEncoderAttention)
            keep = functools.partial(self._keep_handed, index, self.adapter.blocks[index].heads)
            handles.append(attention.register_forward_pre_hook(keep, with_kwargs=True))
            rotary = _one(self.layers[index], ApplyRotaryEmb)
            if rotary is not None:
                before = functools.partial(self._keep_before, index, self.adapter.blocks[index].heads)
                handles.append(rotary.register_forward_pre_hook(before))
        if "encoder_features" in self.names:
            _listen(self.adapter.projector, lambda given, made: self._keep_features(given))
        for index in self.adapter.feature_blocks if self.names.intersection(CLS_FEATURES) else ():
            _listen(self.layers[index], functools.partial(self._keep_made, f"output {index}"))
        return handles

    def _keep_made(self, name: str, given: Any, made: Any) -> None:
        self._keep_output(name, None, (), made)

    def _keep_handed(self, index: int, heads: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        q, k = (kwargs[name] if name in kwargs else args[place] for place, name in enumerate(("query", "key")))
        for name, x in (("q", q), ("k", k)):
            self._keep(f"{name} {index}", _all_heads(x, module.head_size, heads))

    def _keep_before(self, index: int, heads: int, module: Any, args: tuple) -> None:
        x = args[0]  # [2, T, heads, d], queries and keys, before any rotation
        self._keep(f"keys {index}", _all_heads(x[len(x) // 2 :], x.shape[-1], heads))

    def collect(self, encoded: Any, arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
        self._arguments = arguments
        return super().collect(encoded, arguments)

    def _heard(self, index: int, names: list[str]) -> dict[str, Tensor]:
        return self._found(index, names)

    def _batched(self, index: int, q: Tensor, k: Tensor, names: list[str]) -> dict[str, Tensor]:
        return self._found(index, names)

    def _packed(self, index: int, q: Tensor, k: Tensor, names: list[str]) -> dict[str, Tensor]:
        return self._found(index, names)

    def _found(self, index: int, names: list[str]) -> dict[str, Tensor]:
        """Signals of every patch: [n, P] or [n, P, d], packed [P] or [P, d]."""
        scale, prefix, found = self.adapter.blocks[index].scale, self.adapter.prefix, {}
        for name in names:
            q, k = (self._recorded(f"{n} {index}").detach() for n in "qk")
            if kind_of(name) in KEYS and f"keys {index}" in (self._seen() or {}):
                k = self._recorded(f"keys {index}").detach()
            q, k = q.transpose(1, 2), k.transpose(1, 2)
            if not self.adapter.packed:
                found[name] = of_rows(name, q, k, scale, None, prefix)[:, prefix:]
                continue
            lengths = self._arguments["image_grid_thw"].prod(-1).tolist()
            parts = zip(*(x.split(lengths, 2) for x in (q, k)), strict=True)
            found[name] = torch.cat([of_rows(name, *part, scale, None, 0)[0] for part in parts])
        return found


def _all_heads(x: Tensor, width: int, heads: int) -> Tensor:
    """Queries or keys [n, T, heads here * d] or [n, T, heads here, d] with all heads: [n, T, heads, d]."""
    x = x.unflatten(-1, (-1, width)) if x.dim() == 3 else x
    return x if x.shape[2] == heads else tensor_model_parallel_all_gather(x.contiguous(), dim=2)


def _listen(module: nn.Module, record: Callable[[Any, Any], None]) -> None:
    """Call `record` with the first argument and the result of a module. Modules that vLLM may compile run no hooks."""
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        record(args[0] if args else next(iter(kwargs.values())), made)
        return made

    module.forward = forward  # type: ignore[method-assign]


def _one(layer: nn.Module, kind: type) -> Any:
    return next((part for part in layer.modules() if isinstance(part, kind)), None)


def layers_of(tower: nn.Module) -> list[nn.Module]:
    """The longest list of layers in a tower, each with an attention."""
    lists = [part for part in tower.modules() if isinstance(part, nn.ModuleList)]
    found = [list(part) for part in lists if all(_one(layer, MMEncoderAttention) for layer in part)]
    return max(found, key=len, default=[])
