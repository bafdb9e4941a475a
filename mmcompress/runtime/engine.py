# SPDX-License-Identifier: Apache-2.0
"""The engine: compression of a stock transformers model by hooks on three module boundaries.

    base model        pre-hook opens a call, post-hook closes it
    language model    pre-hook: input stages, packing, position ids, mask; post-hook: cache ledgers, logical length back
    decoder layer i   pre-hook: layer stages, and mask and rotary tables of the tokens that are left

Outside the language model everything keeps its logical length (ids, masks, positions, `cache.get_seq_length()`, rows of
the output); only inside is the sequence shorter. Nothing of the model is replaced but the methods that encode pixels,
which get a recorder around them on this one instance.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import create_causal_mask

from ..selection import Selection, gather
from ..stage import LayerStage, Pipeline, Selecting
from ..visuals import Layout, Visuals
from .adapter import PER_TOKEN, Adapter, Encoded
from .cache import Ledger, book, is_pruned, ledger_of
from .call import Call, alike, locate, placeholder_masks
from .encoder import EncoderFacade
from .masks import layers_differ, logical_mask, validity
from .packing import Group, pack, take, take_last
from .record import CallRecord, Span
from .signals import LayerTap, VisionTap, kind_of

CALL = "mmcompress_call"
"""Private keyword that carries the call from the language model to its layers. Gradient checkpointing replays layers
with their keywords when the call is over; engine state would be gone then."""

VISION_SIGNALS = frozenset({*PER_TOKEN, "encoder_features", "cls_feature"})
TEXT_SIGNALS = ("text_embeddings",)
LAYER_SIGNALS = ("last_attention", "mean_attention")


class Engine:
    """Compresses one model by one plan, from `install` to `remove`."""

    def __init__(self, adapter: Adapter, plan: Pipeline, timing: bool = False) -> None:
        self.adapter, self.plan, self.timing = adapter, plan, timing
        self.base, self.language_model = adapter.base, adapter.language_model
        self._check_language_model()
        self.positions = self._position_policy()
        self.substitutes = self._resolve_needs()
        self.facade = EncoderFacade(adapter, plan.encoder_stages[0]) if plan.encoder_stages else None
        self.reads_text = any(name in TEXT_SIGNALS for name in self.substitutes.values())
        names = {name for name in self.substitutes.values() if kind_of(name) in VISION_SIGNALS}
        self.vision_tap = VisionTap(adapter, names, self.facade) if names else None
        self.layer_stages = {stage.layer: stage for stage in plan.layer_stages}
        self.layer_taps = {
            layer: LayerTap(self.language_model.layers[layer - 1].self_attn, layer - 1)
            for layer, stage in self.layer_stages.items()
            if any(name in LAYER_SIGNALS for name in self._names(stage))
        }
        self.parameters = list(inspect.signature(self.base.forward).parameters)
        self.handles: list[RemovableHandle] = []
        self.wrapped: list[tuple[str, Any]] = []
        self.encoding = False
        self.encoded_last: dict[str, Encoded] = {}
        self.call: Call | None = None
        self.last: CallRecord | None = None
        self.vision_seconds = float("nan")

    # ------------------------------------------------------------------ checks at compress time
    def _check_language_model(self) -> None:
        config = self.language_model.config
        kinds = set(getattr(config, "layer_types", None) or ())
        if "linear_attention" in kinds and self.plan.layer_stages:
            raise NotImplementedError(
                f"{self.plan.layer_stages[0]!r}: the language model has linear attention layers, whose state cannot forget "
                f"tokens: only stages before the language model are supported"
            )
        if not kinds and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            kinds = {f"sliding_attention (sliding_window={config.sliding_window})"}
        if kinds - {"full_attention", "linear_attention"}:
            raise NotImplementedError(
                f"the language model has layers of type {', '.join(sorted(kinds))}: only full attention is supported, since "
                f"a window counts tokens that may be gone"
            )
        layers = len(self.language_model.layers)
        for stage in self.plan.layer_stages:
            if stage.layer >= layers:
                raise ValueError(
                    f"{stage!r}: the language model has {layers} layers, cut before one of 1 to {layers - 1}"
                )

    def _position_policy(self) -> str:
        if self.adapter.reindexes:
            return self.plan.position_policy()
        if self.plan.positions == "reindex":
            raise NotImplementedError(
                f"positions='reindex' is not defined for {self.adapter.family}: use positions='keep'"
            )
        return "keep"

    @staticmethod
    def _names(stage: Any) -> list[str]:
        return [name for need in stage.needs for name in ((need,) if isinstance(need, str) else need) if name]

    def _resolve_needs(self) -> dict[str, str]:
        """The signal that serves each need of each stage; raises if there is none."""
        found: dict[str, str] = {}
        for stage in self.plan.stages:
            there = set(LAYER_SIGNALS) if isinstance(stage, LayerStage) else self.adapter.signals | set(TEXT_SIGNALS)
            for need in stage.needs:
                names = (need,) if isinstance(need, str) else need
                name = next((n for n in names if n is None or kind_of(n) in there), "")
                if name == "":
                    raise NotImplementedError(
                        f"{stage!r} needs {' or '.join(map(str, names))}, which this model cannot give "
                        f"({self.adapter.lacks or self.adapter.family}; it has {', '.join(sorted(there))})"
                    )
                if name is not None:
                    found[str(names[0])] = name
        return found

    # ------------------------------------------------------------------ install, remove
    def install(self) -> None:
        """Put the hooks in. If anything fails half-way, everything is taken out again."""
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        add = self.handles.append
        add(self.base.register_forward_pre_hook(self._base_pre, with_kwargs=True))
        add(self.base.register_forward_hook(self._base_post, always_call=True))
        add(self.language_model.register_forward_pre_hook(self._language_pre, with_kwargs=True))
        add(self.language_model.register_forward_hook(self._language_post))
        for i, layer in enumerate(self.language_model.layers):
            add(layer.register_forward_pre_hook(functools.partial(self._layer_pre, i), with_kwargs=True))
        for part in (self.facade, self.vision_tap, *self.layer_taps.values()):
            if part is not None:
                self.handles += part.install()
        for name in self.adapter.encoders:
            original = getattr(self.base, name)
            self.wrapped.append((name, self.base.__dict__.get(name)))
            # A partial of a bound method survives deepcopy and pickle (a closure does not), and generate() reads the
            # signature of this method.
            wrapper = functools.partial(self._encode, original, name)
            setattr(self.base, name, functools.update_wrapper(wrapper, original))

    def remove(self) -> None:
        """Take everything out again; the model is as it was."""
        for handle in self.handles:
            handle.remove()
        for name, before in self.wrapped:
            if before is None:
                delattr(self.base, name)
            else:
                setattr(self.base, name, before)
        self.handles, self.wrapped = [], []

    # ------------------------------------------------------------------ base model
    def _base_pre(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}  # some families pass input_ids by position
        outputs = {m: o for m, o in (given.get("mm_encoder_outputs") or {}).items() if o is not None}
        encoded = [self._encoded_before(modality, output) for modality, output in outputs.items()]
        self.call = Call(given.get("input_ids"), given.get("inputs_embeds"), encoded)

    def _encoded_before(self, modality: str, output: Any) -> Encoded:
        """The record of features that `generate` encoded before the forward pass."""
        if hasattr(output, "mmcompress"):
            return output.mmcompress
        last = self.encoded_last.get(modality)
        # accelerate's hooks copy outputs from device to device, and only the tensors in them
        if last is not None and hasattr(self.adapter.model, "_hf_hook"):
            return last
        raise NotImplementedError(
            "mm_encoder_outputs that were not made by this compressed model: generate(prefill_chunk_size=...) cuts them into "
            "chunks, which compression does not support (budgets are per image, not per chunk); leave it out. Features "
            "encoded before compress() have to be encoded again"
        )

    def _base_post(self, module: Any, args: tuple, output: Any) -> None:
        self.call = None
        self.encoded_last.clear()

    def _encode(self, original: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        """Runs an encoder method and records what it encoded, on its output: `generate` may call it before the forward."""
        if self.encoding:  # some families' video method calls their image method
            return original(*args, **kwargs)
        bound = inspect.signature(original).bind_partial(*args, **kwargs).arguments
        arguments = {**bound, **bound.pop("kwargs", {})}
        self.adapter.check_encoder_call(arguments)
        self.encoding = True
        if self.vision_tap is not None:
            self.vision_tap.start()
        start = self._now()
        try:
            output = original(*args, **kwargs)
            features = output.pooler_output if hasattr(output, "pooler_output") else output[1]
            lengths = [f.numel() // f.shape[-1] for f in features]
            if not lengths:
                raise ValueError(f"{name} was given no images: leave the pixels out for a text-only prompt")
            encoded = self.adapter.encoded(self.adapter.encoders[name], arguments, lengths)
            if self.vision_tap is not None:
                encoded.signals = self.vision_tap.collect(encoded, arguments)
        finally:
            self.encoding = False
            if self.vision_tap is not None:
                self.vision_tap.stop()
        self.vision_seconds = self._since(start)
        if self.facade is not None and (clusters := self.facade.clusters()) is not None:
            rows = self.adapter.arrange(encoded, arguments, clusters[..., None], nearest=True)
            encoded.clusters = [row[:, 0] for row in rows]
            encoded.left = [self.facade.left(layout.cells, layout.views[0].cells) for layout in encoded.layouts]
        self.encoded_last[encoded.modality] = encoded
        if hasattr(output, "pooler_output"):
            output.mmcompress = encoded
        if self.call is not None:
            self.call.encoded.append(encoded)
        return output

    # ------------------------------------------------------------------ language model, before
    def _language_pre(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        call = self.call
        if call is None or kwargs.get("inputs_embeds") is None:
            return None
        call.cache = kwargs.get("past_key_values")
        if not call.encoded and not is_pruned(call.cache):
            self._check_text(call)
            return None  # no visuals in call or cache: the stock path, untouched
        kwargs = dict(kwargs)
        call.batch, length, _ = kwargs["inputs_embeds"].shape
        call.past = call.cache.get_seq_length() if call.cache is not None else 0
        valid, call.past_valid = validity(call, kwargs.get("attention_mask"), length)
        if call.encoded and self._compress(call, kwargs, valid):
            kwargs[CALL] = call
            return args, kwargs
        if not is_pruned(call.cache):
            return None
        self._follow(call, kwargs, valid)
        if layers_differ(call, length):
            kwargs[CALL] = call
        return args, kwargs

    def _check_text(self, call: Call) -> None:
        """A prompt with placeholders but without features would run uncompressed, on the embeddings of the placeholders."""
        if call.input_ids is None or call.input_ids.shape[1] == 1 or torch.compiler.is_compiling():
            return
        for modality, mask in placeholder_masks(call, self.adapter).items():
            if bool(mask.any()):
                raise ValueError(
                    f"the prompt has {modality} placeholders, but no {modality} came with it: pass its pixels. "
                    f"generate(prefill_chunk_size=...), which loses them, is not supported"
                )

    def _compress(self, call: Call, kwargs: dict[str, Any], valid: Tensor | None) -> bool:
        """Run the stages before the LLM and pack what is left; False (and nothing changed) if no stage drops anything."""
        call.start = self._now()
        embeds: Tensor = kwargs["inputs_embeds"]
        device = embeds.device
        host_valid, spans = locate(call, self.adapter, valid, device, self.reads_text)
        for span in spans:
            span.kept = self._budget(call, span)
        counts = host_valid.sum(1).tolist()
        call.record = self.last = CallRecord(call.batch, embeds.shape[1], list(counts), spans, signals=self.substitutes)
        call.record.seconds = {"vision": self.vision_seconds, "select": 0.0}
        if self.facade is not None:
            call.record.merged = self.facade.merged
        if not self._drops_anything(spans):
            call.record.groups = [Group(0, embeds.shape[1], embeds.shape[1], counts)]
            return False

        start = self._now()
        places = torch.arange(embeds.shape[1]).masked_fill(~host_valid, -1)
        patches = torch.zeros_like(host_valid)
        for span in spans:
            patches[span.row, span.patches] = True
            places[span.row, span.patches] = -1
            counts[span.row] += span.kept - len(span.patches)
        places, patches = places.to(device), patches.to(device)
        levels = self._deepstack_levels(kwargs, embeds)
        for batch in alike(spans):
            places, embeds, levels = self._select(call, batch, places, embeds, levels)
        packed = pack(places, counts)
        call.record.seconds["select"] = self._since(start)

        length, physical = embeds.shape[1], packed.source.shape[1]
        last_patch = max((int(span.patches[-1]) for span in spans), default=-1)
        padded = length - int((host_valid.flip(1).cumsum(1) > 0).sum(1).min())  # padding on the right of any row
        tail = min(length - 1 - last_patch, physical) if padded == 0 else 0
        group = Group(0, length, physical, counts, packed.valid, packed.source, tail=tail)
        call.groups = call.record.groups = [group]
        call.patches = patches.gather(1, packed.source)
        if packed.valid is not None:
            call.patches = call.patches & packed.valid
        call.patch_counts = [sum(s.kept for s in spans if s.row == row) for row in range(call.batch)]
        kwargs["position_ids"] = self._packed_positions(call, kwargs.get("position_ids"), places, packed, valid)
        kwargs["inputs_embeds"] = take(embeds, packed.source)
        if levels:
            self._pack_deepstack(call, kwargs, [take(level, packed.source) for level in levels])
        kwargs["attention_mask"] = logical_mask(call, group, 0, device)
        for tap in self.layer_taps.values():
            tap.armed = True
        return True

    def _follow(self, call: Call, kwargs: dict[str, Any], valid: Tensor | None) -> None:
        """Nothing is dropped in this call, but the cache is pruned: mask and positions that fit it."""
        device, length = kwargs["inputs_embeds"].device, kwargs["inputs_embeds"].shape[1]
        if valid is not None and bool(valid.all()):
            valid = None
        call.groups = [Group(0, length, length, [length] * call.batch, valid)]
        kwargs["attention_mask"] = logical_mask(call, call.groups[0], 0, device)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (torch.arange(length, device=device) + call.past)[None]
        ledger = ledger_of(call.cache, 0)
        if ledger is not None and ledger.shift is not None:
            positions = positions - ledger.shift.to(positions.device)[:, None]
        kwargs["position_ids"] = positions

    # ------------------------------------------------------------------ visuals of a call
    def _budget(self, call: Call, span: Span) -> int:
        """How many tokens of a visual enter the LLM: known before anything is computed."""
        tokens = span.layout.cells
        encoded, index = call.origin(span)
        if encoded.clusters is not None:
            tokens = encoded.left[index]
        for stage in self.plan.input_stages:
            tokens = stage.budget(tokens)
        return tokens

    def _drops_anything(self, spans: list[Span]) -> bool:
        left: dict[int, int] = defaultdict(int)
        for span in spans:
            if span.kept < len(span.patches):
                return True
            left[span.row] += span.kept
        return any(stage.budget(n) < n for stage in self.plan.layer_stages for n in left.values())

    def _select(
        self, call: Call, spans: list[Span], places: Tensor, embeds: Tensor, levels: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Run encoder clusters and input stages on visuals of one layout; returns the new `places`, `embeds` and DeepStack
        levels (merged like the embeddings; where a method makes its tokens anew, the levels of the slots they stand for)."""
        device = embeds.device
        rows = torch.tensor([span.row for span in spans], device=device)[:, None]
        at = torch.stack([span.patches for span in spans]).to(device)
        origin = [call.origin(span) for span in spans]
        first, number = origin[0]
        signals = {
            name: torch.stack([encoded.signals[name][i] for encoded, i in origin]).to(device) for name in first.signals
        }
        if self.reads_text:
            signals["text_embeddings"] = embeds[rows, torch.stack([span.text for span in spans]).to(device)]
        visuals = Visuals(embeds[rows, at], spans[0].layout, spans[0].kept, signals, road=self.adapter.project)
        stacked = [level[rows, at] for level in levels]
        tokens = visuals.n
        total = Selection(torch.arange(tokens, device=device).expand(len(spans), -1))
        remade = False
        if first.clusters is not None:
            clusters = torch.stack([e.clusters[i] for e, i in origin if e.clusters is not None]).to(device)
            chosen = Selection.of_clusters(clusters, first.left[number])
            visuals, total = visuals.take(chosen), chosen
            stacked = [chosen.apply(level) for level in stacked]
        for stage in self.plan.input_stages:
            k = stage.budget(visuals.n)
            if k == visuals.n:
                continue
            chosen = self._checked(stage, stage.select(replace(visuals, k=k)), visuals, k)
            visuals, total = visuals.take(chosen), total.then(chosen, tokens)
            stacked = [chosen.apply(level) for level in stacked]
            remade = remade or chosen.rows is not None or chosen.weight is not None
        for i, span in enumerate(spans):
            span.selection, span.selection_row = total, i
        slots = gather(at, total.keep)
        places = places.index_put((rows.expand_as(slots), slots), slots.sort(dim=1).values)
        if remade:
            at_slots = (rows.expand_as(slots), slots)
            embeds = embeds.index_put(at_slots, visuals.features.to(embeds.dtype))
            levels = [
                level.index_put(at_slots, new.to(level.dtype)) for level, new in zip(levels, stacked, strict=True)
            ]
        return places, embeds, levels

    # ------------------------------------------------------------------ DeepStack
    @staticmethod
    def _deepstack_levels(kwargs: dict[str, Any], embeds: Tensor) -> list[Tensor]:
        """The levels as full sequences [B, S, H], zero where there is no visual token."""
        levels = kwargs.get("deepstack_visual_embeds")
        if levels is None:
            return []
        mask = kwargs["visual_pos_masks"].to(embeds.device)
        where = mask[..., None].expand_as(embeds)
        return [torch.zeros_like(embeds).masked_scatter(where, level.to(embeds)) for level in levels]

    def _pack_deepstack(self, call: Call, kwargs: dict[str, Any], levels: list[Tensor]) -> None:
        """Give the model the levels [B, M, H] of the packed tokens: those before the first cut in its own form, the others
        are added by the hooks of the layers."""
        assert call.patches is not None
        cut = min(self.layer_stages, default=len(levels))
        call.deepstack = {j + 1: level for j, level in enumerate(levels) if j >= cut}
        count = sum(call.patch_counts)
        order = call.patches.flatten().to(torch.uint8).sort(descending=True, stable=True).indices[:count]
        kwargs["visual_pos_masks"] = call.patches
        kwargs["deepstack_visual_embeds"] = [level.flatten(0, 1)[order] for level in levels[:cut]]

    @staticmethod
    def _checked(stage: Selecting, selection: Selection, visuals: Visuals, k: int) -> Selection:
        """A selection with the promised shape; a third-party method that breaks the budget must not get further."""
        if selection.keep.shape != (visuals.features.shape[0], k):
            raise ValueError(
                f"{stage!r} returned keep of shape {tuple(selection.keep.shape)}, its budget is "
                f"{(visuals.features.shape[0], k)}"
            )
        return selection

    def _packed_positions(
        self, call: Call, positions: Any, places: Tensor, packed: Any, valid: Tensor | None
    ) -> Tensor:
        """Position ids of the packed tokens, by the policy of the plan; also the new total shift for the cache."""
        device, length = places.device, places.shape[1]
        if positions is None:
            positions = (torch.arange(length, device=device) + call.past)[None]
        ledger = ledger_of(call.cache, 0)
        before = ledger.shift if ledger is not None else None
        if self.positions == "keep":
            call.shift = before
            positions = take_last(positions, packed.source)
        else:
            gone = places < 0
            gone = (gone if valid is None else gone & valid.to(device)).long().cumsum(1)
            place = packed.place.clamp_min(0)
            positions = take_last(positions, place) - gone.gather(1, place).to(positions.device)
            call.shift = gone[:, -1] if before is None else before.to(device) + gone[:, -1]
        return positions if before is None else positions - before.to(positions.device)[:, None]

    # ------------------------------------------------------------------ language model, after
    def _language_post(self, module: Any, args: tuple, output: Any) -> Any:
        call = self.call
        if call is None:
            return None
        if call.record is not None:
            call.record.seconds["language"] = self._since(call.start) - call.record.seconds["select"]
        if not call.groups:
            return None
        for tap in self.layer_taps.values():
            tap.armed, tap.seen = False, None
        last = call.groups[-1]
        cache = getattr(output, "past_key_values", None)
        compressed = last.source is not None
        if cache is not None and (compressed or any(group.valid is not None for group in call.groups)):
            book(cache, call.group_of, call.past_valid, call.shift if compressed else None, call.batch)
        if compressed:
            output.last_hidden_state = last.restore(output.last_hidden_state)
        return output

    # ------------------------------------------------------------------ decoder layers
    def _layer_pre(self, index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if CALL not in kwargs:
            return None
        kwargs = dict(kwargs)
        call: Call = kwargs.pop(CALL)
        hidden = args[0] if args else kwargs["hidden_states"]
        if index in call.deepstack:
            level, before = call.deepstack[index], call.group_of(index - 1)
            level = level if before.from_base is None else take(level, before.from_base)
            hidden = hidden + level.to(hidden)
        stage = self.layer_stages.get(index)
        if stage is not None and call.patches is not None and index not in call.cuts:
            call.cuts.add(index)  # decided once; gradient checkpointing replays layers and only applies it again
            start = self._now()
            with torch.no_grad():
                self._cut(call, stage, hidden)
            if call.record is not None:
                call.record.seconds["select"] += self._since(start)
        group = call.group_of(index)
        if group.start == index and group.from_previous is not None:
            hidden = take(hidden, group.from_previous)
        if group.from_base is not None:
            kwargs["position_embeddings"] = tuple(take(t, group.from_base) for t in kwargs["position_embeddings"])
        mine, first = ledger_of(call.cache, index), ledger_of(call.cache, 0)
        if group.from_base is not None or mine is not first:  # other tokens than layer 0 has: an own mask
            kwargs["attention_mask"] = self._layer_mask(call, group, index, mine, hidden)
        if call.groups[0].source is not None:
            kwargs["position_ids"] = None  # gaps would be taken for packed sequences by flash attention
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _cut(self, call: Call, stage: LayerStage, hidden: Tensor) -> None:
        """Decide a layer stage and append the group of tokens that is left."""
        assert call.patches is not None and call.record is not None
        before = call.groups[-1]
        counts, patch_counts = list(before.counts), list(call.patch_counts)
        device = call.patches.device
        places = torch.arange(before.physical, device=device).expand(call.batch, -1)
        if before.valid is not None:
            places = places.masked_fill(~before.valid, -1)
        batches: dict[int, list[int]] = defaultdict(list)
        for row, tokens in enumerate(call.patch_counts):
            if tokens and stage.budget(tokens) < tokens:
                batches[tokens].append(row)
        if not batches:
            return
        tap = self.layer_taps.get(stage.layer)
        signals = {
            name: tap.signal(name, before.valid, call.cache, call.past_valid).to(device)
            for name in self._names(stage)
            if tap is not None
        }
        for tokens, members in batches.items():
            k = stage.budget(tokens)
            rows = torch.tensor(members, device=device)[:, None]
            at = call.patches[rows[:, 0]].to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :tokens]
            layout = Layout.raster(1, 1, tokens)
            own = {name: signal[rows, at] for name, signal in signals.items()}
            visuals = Visuals(hidden[rows.to(hidden.device), at.to(hidden.device)], layout, k, own)
            chosen = self._checked(stage, stage.select(visuals), visuals, k)
            if chosen.rows is not None or chosen.weight is not None:
                raise NotImplementedError(f"{stage!r}: merging inside the LLM is not supported")
            slots = gather(at, chosen.keep.sort(dim=1).values)
            gone = torch.full_like(at, -1)
            places = places.index_put((rows.expand_as(at), at), gone).index_put((rows.expand_as(slots), slots), slots)
            for row in members:
                counts[row] += k - tokens
                patch_counts[row] = k
        packed = pack(places, counts)

        def follow(index: Tensor | None) -> Tensor:
            return packed.source if index is None else index.gather(1, packed.source)

        call.patches = call.patches.gather(1, packed.source)
        if packed.valid is not None:
            call.patches = call.patches & packed.valid
        call.patch_counts = patch_counts
        group = Group(
            stage.layer, before.logical, packed.source.shape[1], counts, packed.valid,
            follow(before.source), follow(before.from_base), packed.source, min(before.tail, packed.source.shape[1]),
        )  # fmt: skip
        call.groups.append(group)

    def _layer_mask(self, call: Call, group: Group, index: int, ledger: Ledger | None, hidden: Tensor) -> Any:
        key = (id(group), id(ledger))
        if key not in call.masks:
            call.masks[key] = create_causal_mask(
                config=self.language_model.config,
                inputs_embeds=hidden,
                attention_mask=logical_mask(call, group, index, hidden.device),
                past_key_values=call.cache,
                position_ids=None,
                layer_idx=index,
            )
        return call.masks[key]

    # ------------------------------------------------------------------ timing
    def _now(self) -> float | None:
        """Seconds on a clock: always on the CPU; on an accelerator, which has to be waited for, only with timing=True."""
        if torch.compiler.is_compiling():
            return None
        device = next(self.base.parameters()).device
        if device.type not in ("cpu", "meta"):
            if not self.timing:
                return None
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def _since(self, start: float | None) -> float:
        """Seconds since `start`, nan where that is not measured."""
        now = self._now() if start is not None else None
        return now - start if now is not None and start is not None else float("nan")
