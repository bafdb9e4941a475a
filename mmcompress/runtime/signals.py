# SPDX-License-Identifier: Apache-2.0
"""Signals of the vision encoder: features and attention picked up on the way, recomputed for just the rows needed."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..ops import attention_received, attention_rows
from ..ops.marginals import attention_marginals, hub_attention
from ..selection import gather
from .adapter import CLS_FEATURES, OF_CLS, PER_TOKEN, Adapter, Encoded
from .clip import CLIP_PATCHES, Clip
from .encoder import EncoderFacade
from .frames import FrameFacade
from .hooks import running
from .pixels import PixelFacade
from .probe import Heard, heard
from .rotary import rotate
from .scope import ENCODE, current

KEYS = frozenset({"keys", "joint_keys"})
"""Signals that are keys, before any rotation."""


def kind_of(name: str) -> str:
    """The signal without its block and its number: "keys" of "keys@0.25", "hub_attention" of "hub_attention:9.0"."""
    return name.partition("@")[0].partition(":")[0]


class VisionTap:
    """Records what the signals `names` need while the tower runs, and computes them afterwards.

    Attention and keys are those of the block whose output becomes the LLM's tokens (of the deepest if there are several),
    or of the one that the name gives: "keys@0" is the first block, "keys@-1" the last, "keys@0.375" the one at that part of
    the depth. Keys are taken before any rotation. Where several patches make one LLM token, it has their mean. Where an
    encoder stage has merged tokens, every patch shows the value of its cluster. What is recorded is in the scope of the call of
    the encoder, which `owner` opens.
    """

    def __init__(
        self,
        owner: Any,
        adapter: Adapter,
        names: set[str],
        facade: PixelFacade | FrameFacade | EncoderFacade | None,
        clip: Clip | None = None,
    ) -> None:
        self.owner, self.adapter, self.names, self.facade, self.clip = owner, adapter, names, facade, clip
        self.at: dict[int, list[str]] = defaultdict(list)
        """Names of the signals of each block that is listened to."""
        for name in sorted(names):
            if kind_of(name) in PER_TOKEN:
                self.at[self._block(name)].append(name)
        self.joint = {name: self._block(name) for name in names if kind_of(name) in CLIP_PATCHES}
        """Block of each signal in CLIP's joint space."""

    def _block(self, name: str) -> int:
        """Index of the block that a signal comes from."""
        where, count = name.partition("@")[2], len(self.adapter.blocks)
        if "." in where:
            index = min(count - 1, round(float(where) * count))
        else:
            index = int(where) if where else max(self.adapter.feature_blocks)
            if not where and index < 0:
                raise NotImplementedError("signals need vision features from a block; this model takes its embeddings")
            index += count if index < 0 else 0
        if not 0 <= index < count:
            raise ValueError(f"signal {name!r}: the vision encoder has {count} blocks")
        return index

    def install(self) -> list[RemovableHandle]:
        handles: list[RemovableHandle] = []
        for index, names in self.at.items():
            block = self.adapter.blocks[index]
            if not block.heard or KEYS & set(map(kind_of, names)):
                handles += block.tap(functools.partial(self._keep_heads, index))
            record = functools.partial(self._keep_arguments, index)
            handles.append(block.attention.register_forward_pre_hook(record, with_kwargs=True))
        if "encoder_features" in self.names:
            handles.append(self.adapter.tap_features(self._keep_features))
        of_cls = self.adapter.feature_blocks if self.names.intersection(CLS_FEATURES) else []
        for i in sorted({*of_cls, *self.joint.values()}):
            output = functools.partial(self._keep_output, f"output {i}")
            handles.append(self.adapter.blocks[i].module.register_forward_hook(output))
        return handles

    def _recorded(self, name: str) -> Any:
        """What was recorded in this call. Raises RuntimeError if nothing was."""
        seen = self._seen()
        if seen is None or name not in seen:
            raise RuntimeError(
                f"{', '.join(sorted(self.names))}: the vision encoder did not run the modules that were found in it ({name} was "
                f"not recorded), so there is no such signal: call mmcompress.compress(model, plan) again"
            )
        return seen[name]

    def collect(self, encoded: Encoded, arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
        """The signals of all visuals of the encoder call, one tensor [N, ...] for each (`cls_feature`: [De],
        `cls_features`: [views, De])."""
        rows: dict[str, Tensor] = {}
        if "encoder_features" in self.names:
            features = self._recorded("features")
            features = features[0] if len(features) == 1 else torch.cat(features, -2 if self.adapter.packed else 0)
            rows["encoder_features"] = self.adapter.feature_rows(features, arguments)
        for name, index in self.joint.items():
            assert self.clip is not None
            patches = self._recorded(f"output {index}")[:, self.adapter.prefix :]
            rows[name] = self.clip.project(patches, plain=kind_of(name) == CLIP_PATCHES[1])
        for index, names in self.at.items():
            found: dict[str, Tensor] = {}
            if self.adapter.blocks[index].heard:
                found = self._heard(index, [name for name in names if kind_of(name) not in KEYS])
                names = [name for name in names if kind_of(name) in KEYS]
            if names:
                q, k = (self._recorded(f"{n} {index}").detach() for n in "qk")
                found |= (self._packed if self.adapter.packed else self._batched)(index, q, k, names)
            rows |= {name: self._per_token(patches, arguments) for name, patches in found.items()}
        arrange = functools.partial(self.adapter.arrange, encoded, arguments)
        flat = self.adapter.packed or self.adapter.padded
        signals = {
            name: [v[:, 0] for v in arrange(x[..., None])] if x.dim() < 2 + (not flat) else arrange(x)
            for name, x in rows.items()
        }
        if self.names.intersection(CLS_FEATURES):
            cls = torch.cat([self._recorded(f"output {i}")[:, 0] for i in self.adapter.feature_blocks], -1)
            if CLS_FEATURES[0] in self.names:
                signals[CLS_FEATURES[0]] = self._of_first_view(cls, encoded, arguments)
            if CLS_FEATURES[1] in self.names:
                signals[CLS_FEATURES[1]] = list(cls.split(self.adapter.views(encoded, arguments)))
        return signals

    def _batched(self, index: int, q: Tensor, k: Tensor, names: list[str]) -> dict[str, Tensor]:
        """Signals of every patch of the tower, from queries and keys [n, T, heads, d]: [n, P] or [n, P, d]."""
        q, k, scale = q.transpose(1, 2), k.transpose(1, 2), self.adapter.blocks[index].scale
        mask = self._recorded(f"arguments {index}")[1].get("attention_mask")
        found = {name: of_rows(name, q, k, scale, mask, self.adapter.prefix) for name in names}
        spread = self.facade.spread(index) if self.facade else None
        if spread is not None:
            found = {name: gather(x, spread) for name, x in found.items()}
        return {name: x[:, self.adapter.prefix :] for name, x in found.items()}

    def _heard(self, index: int, names: list[str]) -> dict[str, Tensor]:
        """The same from what the attention module hands to its attention function: [n, P], packed [P]; 0 in padding."""
        if not names:
            return {}
        parts = heard(running(self.adapter.blocks[index].attention), *self._recorded(f"arguments {index}"))
        found = {name: torch.cat([_of_parts(name, part, self.adapter.prefix) for part in parts], 1) for name in names}
        spread = self.facade.spread(index) if self.facade else None
        if spread is not None:
            found = {name: gather(x, spread) for name, x in found.items()}
        return {n: x[0] if self.adapter.packed else x[:, self.adapter.prefix :] for n, x in found.items()}

    def _packed(self, index: int, q: Tensor, k: Tensor, names: list[str]) -> dict[str, Tensor]:
        """The same for a packed sequence: queries and keys [T, heads, d]; attention stays within its segments."""
        found: dict[str, Tensor] = {}
        q, k = (x[0] if x.dim() == 4 else x for x in (q, k))  # some have a batch of one
        turned: list[Tensor] = []
        for name in names:
            if kind_of(name) in KEYS:
                found[name] = k.mean(1) if kind_of(name) == "keys" else k.flatten(1)
            else:
                (_, arguments), scale = self._recorded(f"arguments {index}"), self.adapter.blocks[index].scale
                turned = turned or _turned(q, k, arguments)
                found[name] = self._in_segments(name, turned, arguments, scale)
        spread = self.facade.spread(index) if self.facade else None
        return found if spread is None else {name: x[spread[0]] for name, x in found.items()}

    @staticmethod
    def _in_segments(name: str, turned: list[Tensor], arguments: dict[str, Any], scale: float) -> Tensor:
        """What the patches of a packed sequence, of queries and keys `turned` [1, heads, T, d], say of each other within its
        segments, [T]."""
        if kind_of(name) == "received_attention":
            return attention_received(*turned, scale, cu_seqlens=arguments["cu_seqlens"])[0]
        bounds = arguments["cu_seqlens"].tolist()
        lengths = [b - a for a, b in itertools.pairwise(bounds)]
        if len(lengths) == 1 and bounds == [0, turned[0].shape[2]]:
            return _among_patches(name, turned[0], turned[1], scale, None, 0)[0]
        parts: list[Tensor] = [torch.empty(0)] * len(lengths)
        for length in set(lengths):
            same = [i for i, n in enumerate(lengths) if n == length]
            queries, keys = (torch.cat([x[:, :, bounds[i] : bounds[i + 1]] for i in same]) for x in turned)
            for i, values in zip(same, _among_patches(name, queries, keys, scale, None, 0), strict=True):
                parts[i] = values
        return torch.cat(parts)

    def _per_token(self, patches: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Mean over the patches that make one token: [n, P, ...] to [n, N, ...] (packed: [P, ...] to [N, ...]; padded: [n, P, ...]
        to [N, ...] for all that are there)."""
        unit = self.adapter.unit_in(arguments)
        if self.adapter.padded:
            patches = patches.flatten(0, 1)
        elif unit == 1:
            return patches
        axis = 0 if self.adapter.packed or self.adapter.padded else 1
        order = self.adapter.order(patches.shape[axis], arguments)
        if order is not None:
            patches = patches.index_select(axis, order.to(patches.device, non_blocking=True))
        return patches.unflatten(axis, (-1, unit)).mean(axis + 1)

    def _of_first_view(self, rows: Tensor, encoded: Encoded, arguments: dict[str, Any]) -> list[Tensor]:
        """One row [De] per visual, that of its first view, which shows it whole (of its first frame, in a video)."""
        views = self.adapter.views(encoded, arguments)
        return [rows[sum(views[:i])] for i in range(len(views))]

    def _seen(self) -> dict[str, Any] | None:
        """What this call has recorded; None outside of one, where blocks are replayed by gradient checkpointing."""
        scope = current(self.owner, ENCODE)
        return None if scope is None else scope.state.setdefault(self, {})

    def _keep(self, name: str, value: Any) -> None:
        seen = self._seen()
        if seen is not None:
            seen[name] = value

    def _keep_heads(self, index: int, name: str, value: Tensor) -> None:
        self._keep(f"{name} {index}", value)

    def _keep_output(self, name: str, module: Any, args: tuple, output: Any) -> None:
        self._keep(name, output[0] if isinstance(output, tuple) else output)

    def _keep_arguments(self, index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._keep(f"arguments {index}", (args, kwargs))

    def _keep_features(self, features: Tensor) -> None:
        # some project picture after picture; rows that a method has made are projected outside of the encoder's call
        seen = self._seen()
        if seen is not None:
            features = features[:, self.adapter.structural :] if self.adapter.structural else features
            seen.setdefault("features", []).append(features)


def _turned(q: Tensor, k: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    """Queries and keys [T, heads, d] of a packed sequence behind the rotation, [1, heads, T, d]."""
    cos, sin = (t[None].float() for t in arguments["position_embeddings"])
    if q.shape == k.shape and q.dtype == k.dtype:  # at once
        return list(rotate(torch.stack([q, k]).float().transpose(1, 2), cos, sin).to(q.dtype).split(1))
    return [rotate(x.float().transpose(0, 1)[None], cos, sin).to(x.dtype) for x in (q, k)]


def of_rows(name: str, q: Tensor, k: Tensor, scale: float, mask: Tensor | None, prefix: int) -> Tensor:
    """A signal of attention from queries and keys [n, heads, T, d], each row by itself: [n, T], of keys [n, T, d]."""
    kind = kind_of(name)
    if kind == "cls_attention":
        return attention_rows(q[:, :, :1], k, scale, mask).mean(1)[:, 0]
    if kind == "cls_joint_attention":
        one, all_keys = (x.transpose(1, 2).flatten(2)[:, None] for x in (q[:, :, :1], k))  # heads side by side
        return attention_rows(one, all_keys, one.shape[-1] ** -0.5)[:, 0, 0]
    if kind in OF_CLS:
        products = (q[:, :, :1] @ k.transpose(2, 3)).float()[:, :, 0]
        return products.mean(1) * scale
    return _among_patches(name, q, k, scale, mask, prefix)


def _of_parts(name: str, part: Heard, prefix: int) -> Tensor:
    """A signal of attention [n, T] of tokens that see each other in parts: those that the mask allows; 0 for padding."""
    if part.mask is None:
        return of_rows(name, part.q, part.k, part.scale, None, prefix).float()
    n, _, tokens, _ = part.q.shape
    mask = part.mask.expand(n, -1, tokens, -1)[:, 0]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    alike: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for row, sight in enumerate(seen):
        change = (sight[1:] != sight[:-1]).any(1).nonzero()[:, 0] + 1  # neighbours that see the same are one part
        for first, last in itertools.pairwise([0, *change.tolist(), tokens]):
            members = sight[first].nonzero()[:, 0]
            if len(members) and (int(members[0]) < first or int(members[-1]) >= last):
                if bool(sight[first, first]):
                    raise NotImplementedError(f"{name}: the vision encoder does not attend within parts of its tokens")
                continue  # padding, which sees what is there
            alike[len(members)].append((row, members))
    found = part.q.new_zeros(n, tokens, dtype=torch.float32)
    for members in alike.values():
        rows, places = torch.tensor([row for row, _ in members]), torch.stack([at for _, at in members])
        q, k = (x[rows[:, None], :, places].transpose(1, 2) for x in (part.q, part.k))
        bias = None
        if mask.dtype != torch.bool:
            bias = mask[rows[:, None], places[:, :1], places][:, None, None]
            bias = bias if bool(bias.any()) else None
        found[rows[:, None], places] = of_rows(name, q, k, part.scale, bias, prefix).float()
    return found


def _among_patches(name: str, q: Tensor, k: Tensor, scale: float, mask: Tensor | None, prefix: int) -> Tensor:
    """A signal of OF_PATCHES from queries and keys [n, heads, T, d]: [n, T] or [n, T, d], 0 for the first `prefix` tokens
    where they take no part."""
    kind = kind_of(name)
    if kind == "keys":
        return k.mean(1)
    if kind == "joint_keys":
        return k.transpose(1, 2).flatten(2)
    if kind == "received_attention":
        return attention_received(q, k, scale, key_bias=None if mask is None else mask[:, 0, 0])
    if mask is not None:
        raise NotImplementedError(f"{kind} behind an encoder stage with proportional attention: use proportional=False")
    if kind == "hub_attention":
        threshold = float(name.partition("@")[0].partition(":")[2])
        return _behind(prefix, hub_attention(q, k, scale, threshold, prefix))
    received, given = attention_marginals(q, k, scale, prefix, softmax=kind.endswith("attention"))
    return _behind(prefix, received if kind.startswith("received") else given)


def _behind(prefix: int, x: Tensor) -> Tensor:
    return F.pad(x, (prefix, 0)) if prefix else x
