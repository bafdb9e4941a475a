# SPDX-License-Identifier: Apache-2.0
"""Signals: attention and features picked up on the way, recomputed for just the rows that are needed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from ..ops import attention_received, attention_rows
from ..selection import gather
from .adapter import Adapter
from .cache import PrunedLayer
from .encoder import EncoderFacade


class VisionTap:
    """Records what the signals `names` need while the tower runs, and computes them afterwards.

    Attention and keys are those of the block whose output becomes the LLM's tokens (of the last one if there are
    several). Where an encoder stage has merged tokens, every patch shows the value of its cluster.
    """

    def __init__(self, adapter: Adapter, names: set[str], facade: EncoderFacade | None) -> None:
        self.adapter, self.names, self.facade = adapter, names, facade
        self.block = adapter.feature_blocks[-1]
        if self.block < 0:
            raise NotImplementedError("signals need vision features from a block; this model takes its embeddings")
        self.seen: dict[str, Tensor] | None = None

    def install(self) -> list[RemovableHandle]:
        handles: list[RemovableHandle] = []
        attention = self.adapter.blocks[self.block].attention
        if self.names & {"cls_attention", "received_attention", "keys"}:
            handles.append(attention.q_proj.register_forward_hook(self._record("q")))
            handles.append(attention.k_proj.register_forward_hook(self._record("k")))
            handles.append(attention.register_forward_pre_hook(self._record_mask, with_kwargs=True))
        if "encoder_features" in self.names:
            handles.append(self.adapter.projector.register_forward_pre_hook(self._record_features))
        if "cls_feature" in self.names:
            for i in self.adapter.feature_blocks:
                handles.append(self.adapter.blocks[i].module.register_forward_hook(self._record(f"block {i}")))
        return handles

    def start(self) -> None:
        """Begin to record; before `start` and after `stop` the hooks do nothing (replays of gradient checkpointing)."""
        self.seen = {}

    def stop(self) -> None:
        self.seen = None

    def collect(self) -> dict[str, Tensor]:
        """The signals of all images of the encoder call, each [images, N, ...] (`cls_feature` [images, De])."""
        seen = self.seen or {}
        prefix = self.adapter.prefix
        signals: dict[str, Tensor] = {}
        if "encoder_features" in self.names:
            signals["encoder_features"] = seen["features"]
        if "cls_feature" in self.names:
            signals["cls_feature"] = torch.cat([seen[f"block {i}"][:, 0] for i in self.adapter.feature_blocks], -1)
        if "k" not in seen:
            return signals
        attention = self.adapter.blocks[self.block].attention
        q, k = (seen[n].detach().unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for n in "qk")
        mask = seen.get("mask")
        if "cls_attention" in self.names:
            signals["cls_attention"] = attention_rows(q[:, :, :1], k, attention.scale, mask).mean(1)[:, 0]
        if "received_attention" in self.names:
            signals["received_attention"] = attention_received(q, k, attention.scale, mask)
        if "keys" in self.names:
            signals["keys"] = k.mean(1)
        source = self.facade.source(self.block) if self.facade else None
        for name in {"cls_attention", "received_attention", "keys"} & self.names:
            full = signals[name] if source is None else gather(signals[name], source)
            signals[name] = full[:, prefix:]
        return signals

    def _record(self, name: str) -> functools.partial[None]:
        """A forward hook that keeps the output of a module under `name` (a partial survives deepcopy, a closure does not)."""
        return functools.partial(self._keep, name)

    def _keep(self, name: str, module: Any, args: tuple, output: Any) -> None:
        if self.seen is not None:
            self.seen[name] = output[0] if isinstance(output, tuple) else output

    def _record_mask(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if self.seen is not None and mask is not None:
            self.seen["mask"] = mask

    def _record_features(self, module: Any, args: tuple) -> None:
        # the first call is the family's own; later ones project rows that a method has made
        if self.seen is not None and "features" not in self.seen:
            (layout,) = self.adapter.layouts([args[0].shape[1]])
            self.seen["features"] = args[0][:, layout.patch_tokens()] if layout.structural else args[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split form: x [B, heads, S, d], tables [B, S, d]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None] + turned * sin[:, None]


class LayerTap:
    """Keeps the input of one LLM attention module and recomputes rows of its attention.

    Projections are called, never their weights used: LoRA, quantisation and offloading live in the call.
    """

    def __init__(self, attention: Any, index: int) -> None:
        self.attention, self.index = attention, index
        self.armed = False
        self.seen: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def install(self) -> list[RemovableHandle]:
        return [self.attention.register_forward_pre_hook(self._record, with_kwargs=True)]

    def _record(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.armed:
            self.seen = (args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"])

    def signal(self, name: str, valid: Tensor | None, cache: Cache | None, past_valid: Tensor | None) -> Tensor:
        """`last_attention` or `mean_attention` of all tokens of the call, [B, S] float32, heads averaged.

        valid [B, S] or None; the last token of every row is its last prompt token (rows are right-aligned). Keys that the
        cache held before this call take part in the softmax; past_valid says which are real in a cache not yet pruned.
        """
        assert self.seen is not None
        hidden, (cos, sin) = self.seen
        batch, length, _ = hidden.shape
        cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
        k = self._heads("k", hidden, cos, sin)
        visible = (
            torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
            if valid is None
            else valid.to(hidden.device)
        )
        new = visible
        past = self._past_keys(cache, length, past_valid)
        if past is not None:
            keys, past_visible = past
            k = torch.cat([keys.to(k), k], 2)
            visible = torch.cat([past_visible.to(visible.device).expand(batch, -1), visible], 1)
        scale = self.attention.scaling
        if name == "last_attention":
            q = self._heads("q", hidden[:, -1:], cos[:, -1:], sin[:, -1:])
            return attention_rows(q, k, scale, visible[:, None, None]).mean(1)[:, 0, -length:]
        if name == "mean_attention":
            if past is not None:
                raise NotImplementedError(
                    "mean_attention (fastv query='all') in a later turn on a cache: use query='last'"
                )
            q = self._heads("q", hidden, cos, sin)
            return attention_received(q, k, scale, new[:, None, None], causal=True)
        raise ValueError(f"unknown attention signal {name!r}: there is last_attention and mean_attention")

    def _heads(self, which: str, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys after norm and rotation, [B, heads, S, d]."""
        x = getattr(self.attention, f"{which}_proj")(hidden).unflatten(-1, (-1, self.attention.head_dim))
        norm = getattr(self.attention, f"{which}_norm", None)
        x = norm(x) if norm is not None else x
        return rotate(x.transpose(1, 2), cos, sin)

    def _past_keys(self, cache: Cache | None, new: int, past_valid: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Keys [B, kv_heads, P, d] that the cache held before this call, and which of them are real [B or 1, P]."""
        if cache is None:
            return None
        layer: Any = cache.layers[self.index]
        stored = int(layer.physical if isinstance(layer, PrunedLayer) else layer.get_seq_length())
        before = stored - new  # this layer has run already
        if before <= 0:
            return None
        known = layer.ledger.valid if isinstance(layer, PrunedLayer) else past_valid
        if known is None:
            known = torch.ones(1, before, dtype=torch.bool)
        visible = torch.cat([known, known.new_ones(known.shape[0], before - known.shape[1])], 1)
        return layer.keys[:, :, :before], visible
