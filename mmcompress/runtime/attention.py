# SPDX-License-Identifier: Apache-2.0
"""Attention stages at work: behind the attention module of a layer, the rows that may change are computed once more from its
projections and the cached keys and values, rewritten, and put in the place of what the kernel gave."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from ..ops.attention import masked_softmax
from ..stage import AttentionStage, Pipeline
from ..visuals import AttentionRows, widened
from .cache import PrunedLayer, cache_of, is_plain
from .call import Call
from .layers import Heads
from .masks import who_sees
from .mass import mass_of, weighs
from .packing import Group
from .probe import Form, Forms
from .shards import check_unit

GIVEN = "mmcompress_attention"
"""Private keyword that a layer hands on to its attention: gradient checkpointing replays both with their keywords."""
BLOCK = 256
"""How many rows are computed at a time."""


class _Here(threading.local):
    """What the attention module that runs in this thread was given: no scope is open where checkpointing replays it."""

    given: tuple[Call, Group, Tensor] | None = None


_HERE = _Here()


def rewriters(plan: Pipeline, forms: Forms) -> dict[int, Rewriter]:
    """A rewriter for each layer in which stages of `plan` act. Raises NotImplementedError where attention cannot be computed once
    more, down to the output of the module."""
    stages, depth = plan.attention_stages, len(forms.language_model.layers)
    found: dict[int, Rewriter] = {}
    for stage in stages:
        layers = stage.layers(depth)
        if not layers or layers[0] < 0 or layers[-1] >= depth:
            raise ValueError(
                f"{stage!r} acts in layers {layers.start} to {layers.stop - 1}; the model has 0 to {depth - 1}"
            )
        for i in layers:
            form = forms.of(i, repr(stage), "cached", "out", "boundless")
            check_unit(form.attention)
            found.setdefault(i, Rewriter(form, i)).stages.append(stage)
    return found


class Rewriter:
    """Rewrites the attention of one layer where that is given the keyword GIVEN: (the call, the group of tokens that the layer
    has, the residual stream [B, S, D] that enters it)."""

    def __init__(self, form: Form, index: int) -> None:
        self.form, self.index = form, index
        self.stages: list[AttentionStage] = []

    def install(self) -> list[RemovableHandle]:
        return [
            self.form.attention.register_forward_pre_hook(self._before, with_kwargs=True),
            self.form.attention.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        _HERE.given = kwargs.get(GIVEN)
        return None if _HERE.given is None else (args, {name: x for name, x in kwargs.items() if name != GIVEN})

    def _after(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if _HERE.given is None:
            return None
        (call, group, stream), _HERE.given = _HERE.given, None
        hidden = args[0] if args else kwargs["hidden_states"]
        positions, tables = kwargs.get("position_ids"), kwargs["position_embeddings"]
        columns = Columns(self.form, hidden, tables, positions, group, call, self.index, cache_of(kwargs))
        with torch.autocast(hidden.device.type, enabled=False):
            todo = self._read(columns, stream)
        if not todo:
            return None
        made, first = [output[0][:, : columns.first]], columns.first
        for start in range(0, columns.count, BLOCK):
            part = slice(start, min(start + BLOCK, columns.count))
            with torch.autocast(hidden.device.type, enabled=False):
                weights = columns.weights(part)
                changed = torch.zeros_like(columns.changing[:, part])
                for rewrite in todo:
                    weights, now = rewrite(weights, part)
                    changed = changed | now
            changed = (changed & columns.changing[:, part])[..., None]
            kernel = output[0][:, first + part.start : first + part.stop]
            made.append(torch.where(changed, self.form.mix(columns.mixed(weights)).to(kernel), kernel))
        return (torch.cat(made, 1), *output[1:])

    @torch.no_grad()
    def _read(self, columns: Columns, stream: Tensor) -> list[Any]:
        """What each stage wants to do with the rows."""
        call, state = columns.call, columns.state()
        if "visual" not in state:
            return []
        before = dict(columns.noted)
        rows = AttentionRows(
            layer=self.index,
            stream=stream,
            changing=columns.changing,
            visual=widened(state["visual"], columns.total),
            real=columns.real,
            fresh=call.sight.fresh if call.sight is not None else (False,) * call.batch,
            mean=columns.mean,
            before=lambda: int(columns.past),
            tokens=lambda: int(call.past) + columns.group.logical,
            place=lambda: columns.place(state),
            state=state,
            carried=call.carried,
        )
        todo = [stage.rewriting(rows) for stage in self.stages]
        if any(before.get(name) is not values for name, values in state.items()):
            call.notes[self.index] = state
        return [rewrite for rewrite in todo if rewrite is not None]


class Columns:
    """Rows and columns of one attention module in one call: Q queries of the call by K keys of cache and call."""

    def __init__(
        self,
        form: Form,
        hidden: Tensor,
        tables: Any,
        positions: Tensor | None,
        group: Group,
        call: Call,
        index: int,
        cache: Cache | None,
    ) -> None:
        self.group, self.call = group, call
        self.heads = Heads(form, hidden, tables, group.valid, call, index, True, positions)
        self.length, self.device = hidden.shape[1], hidden.device
        self.autocast = torch.is_autocast_enabled(hidden.device.type)
        layer: Any = cache.layers[index] if cache is not None else None
        self.layer = layer
        self.noted: dict[str, Tensor] = self.layer.state if isinstance(self.layer, PrunedLayer) else {}
        if layer is not None and is_plain(layer):
            self.keys, self.values = (t.to(self.device) for t in (layer.keys, layer.values))
        elif layer is not None and self._stored > self.length:
            raise NotImplementedError(
                f"rewriting attention over a cache of type {type(layer).__name__}: its keys and values are not stored as they "
                f"are; use a DynamicCache or a StaticCache"
            )
        else:
            self.keys, self.values = self.heads.project("k"), self.heads.project("v")
        self.total = self.keys.shape[2]
        self.past = self._past()
        self.count = self.length if call.sight is None else call.sight.counts[group.source is not None]
        self.first = self.length - self.count
        self.at = torch.arange(self.first, self.length, device=self.device) + self.past
        """Column of each row, [Q]."""
        self.bias = self._bias()
        self.changing, self.real = self._changing(), self._real()
        """Which rows may change, [B, Q]; which columns are no padding, [B, K]."""

    @property
    def _stored(self) -> Any:
        return self.layer.physical if isinstance(self.layer, PrunedLayer) else self.layer.get_seq_length()

    def _past(self) -> Any:
        """How many columns there were before the call; on the device where the cache is static, so that nothing waits."""
        if self.layer is None or not is_plain(self.layer):
            return 0
        return (self._stored if self.layer.is_compileable else self.total) - self.length

    def _here(self, tokens: Tensor) -> Tensor:
        """Values of the tokens that the caller passed [B, S], for those that are here."""
        source = self.group.source
        return (tokens if source is None else tokens.gather(1, source)).to(self.device)

    def _changing(self) -> Tensor:
        valid, sight = self.group.valid, self.call.sight
        may = torch.ones(self.call.batch, self.length, dtype=torch.bool, device=self.device)
        if valid is not None:
            may = may & valid.to(self.device)
        if sight is not None:
            may = may & self._here(sight.behind)
        return may[:, self.first :]

    def _real(self) -> Tensor:
        valid, pruned = self.group.valid, isinstance(self.layer, PrunedLayer)
        known = self.layer.ledger.valid if pruned else self.call.past_valid
        if known is None:
            known = torch.ones(self.call.batch, 0, dtype=torch.bool)
        known = known.to(self.device)
        if valid is not None:
            known = torch.cat([widened(known, int(self.past), True), valid.to(self.device)], 1)
        return widened(known, self.total, True)

    def state(self) -> dict[str, Tensor]:
        """What is noted in this layer: which columns are `visual`, and their `place`, and what stages added. Those of this call
        are put in if it has visuals."""
        state = {name: values.to(self.device) for name, values in self.noted.items()}
        sight = self.call.sight
        if sight is None:
            return state
        visual = self._here(sight.visual)
        if self.group.valid is not None:
            visual = visual & self.group.valid.to(self.device)
        old, past = state.get("visual", visual[:, :0]), int(self.past)
        state["visual"] = torch.cat([widened(old, past), visual], 1)
        source = self.group.source
        here = torch.arange(self.length, device=self.device).expand(self.call.batch, -1) if source is None else source
        old = self.place(self.noted)[:, :past].expand(self.call.batch, -1)
        state["place"] = torch.cat([old, int(self.call.past) + here.to(self.device)], 1)
        return state

    def place(self, noted: dict[str, Tensor]) -> Tensor:
        """Number in the conversation of each column, [B or 1, K]; behind those in `noted` nothing has been dropped."""
        known = noted.get("place")
        dropped = self.layer.ledger.dropped if isinstance(self.layer, PrunedLayer) else 0
        place = (torch.arange(self.total, device=self.device) + dropped)[None]
        if known is None:
            return place
        known = known.to(self.device)[:, : self.total]
        return torch.cat([known, place[:, known.shape[1] :].expand(len(known), -1)], 1)

    def _bias(self) -> Tensor | None:
        """What the masses of the columns add to their logits, [B, 1, 1, K]; None: nothing."""
        if not weighs(self.call, self.group, self.heads.index):
            return None
        known = mass_of(self.call, self.group, self.heads.index, int(self.past), self.device)
        return None if known is None else widened(known, self.total)[:, None, None]

    def _queries(self, part: slice) -> Tensor:
        """Queries of some of the rows, [B, heads, q, d]."""
        heads, rows = self.heads, slice(self.first + part.start, self.first + part.stop)
        with torch.autocast(self.device.type, enabled=self.autocast):  # projections as the model runs them
            return heads.project("q", lambda x: x[:, rows]).to(self.keys)

    def _seen(self, part: slice) -> Tensor:
        """Which columns some of the rows see, [B, 1, q, K]."""
        sees = who_sees(self.call, self.heads.index, self.device)
        if sees is not None:
            rows = slice(self.first + part.start, self.first + part.stop)
            return sees[:, :, rows, : self.total] & self.real[:, None, None]
        before = torch.arange(self.total, device=self.device) <= self.at[part, None]
        return (before & self.real[:, None])[:, None]

    def weights(self, part: slice) -> Tensor:
        """Softmax attention of some of the rows, [B, heads, q, K] float32. It has a gradient."""
        q, kv = self._queries(part), self.keys.shape[1]
        grouped = q.unflatten(1, (kv, -1)).flatten(2, 3)  # the queries that share a key head, in one product
        logits = (grouped @ self.keys.transpose(2, 3)).float() * self.heads.form.scaling
        logits = logits.unflatten(2, (-1, q.shape[2])).flatten(1, 2)
        return masked_softmax(logits, self._seen(part), self.heads.form.softcap, self.heads.sinks, self.bias)

    def mean(self) -> Tensor:
        """Attention of all rows, mean over heads, [B, Q, K]; it has no gradient."""
        parts = [slice(i, min(i + BLOCK, self.count)) for i in range(0, self.count, BLOCK)]
        none = self.keys.new_zeros(len(self.keys), 0, self.total, dtype=torch.float32)
        made = (self.heads.rows(self._queries(part), self.keys, self._seen(part), self.bias).mean(1) for part in parts)
        return torch.cat([none, *made], 1)

    def mixed(self, weights: Tensor) -> Tensor:
        """Values mixed by weights [B, heads, q, K], heads side by side, [B, q, heads * d]."""
        kv = self.values.shape[1]
        grouped = weights.to(self.values.dtype).unflatten(1, (kv, -1)).flatten(2, 3)
        mixed = (grouped @ self.values).unflatten(2, (-1, weights.shape[2])).flatten(1, 2)
        return mixed.transpose(1, 2).flatten(2)


def keep_notes(cache: Cache, call: Call) -> None:
    """Write down in the layers of the cache what stages noted in this call."""
    for index, state in call.notes.items():
        layer: Any = cache.layers[index]
        layer.state = state
        layer.ledger.bound = layer.ledger.bound or "its attention is rewritten"
