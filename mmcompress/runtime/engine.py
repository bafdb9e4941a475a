# SPDX-License-Identifier: Apache-2.0
"""The engine: compression of a stock transformers model by hooks on three module boundaries.

    base model        pre-hook opens a call, post-hook closes it
    language model    pre-hook: input stages, packing, position ids, mask; post-hook: cache ledgers, logical length back
    decoder layer i   pre-hook: layer stages, and mask and rotary tables of the tokens that are left
    its attention     post-hook, where a stage rewrites attention: its rows in place of those that the kernel gave

Outside the language model everything keeps its logical length (ids, masks, positions, `cache.get_seq_length()`, rows of
the output); only inside is the sequence shorter. Nothing of the model is replaced but the methods that encode pixels,
which get a recorder around them on this one instance.
"""

from __future__ import annotations

import functools
import inspect
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..kernels.compact import compact
from ..stage import FrameStage, Pipeline
from .adapter import Adapter, Encoded
from .around import Around, pixels_in
from .attention import GIVEN, keep_notes, rewriters
from .cache import CACHE, Ledger, book, cache_of, held_bytes, is_pruned, ledger_of, lengths
from .calibration import calibrated_mask, check_calibration
from .call import Call, Own, Sight, alike, cells_of
from .channel import BIAS, Wide
from .clip import Clip
from .cuts import Cutter, of_words, words_meant
from .deepstack import NAMES, Levels, give_levels, leading, levels_of
from .encoder import RESTS, EncoderFacade
from .frames import FILMS, FrameFacade, films_in
from .hooks import Following
from .inputs import InputStages, Prompt
from .labels import VISUAL, loss
from .layers import OF_TEXT
from .locate import locate, on_host, placeholder_masks
from .masks import (
    carried,
    check_masks,
    is_static,
    layers_differ,
    logical_mask,
    mask_of,
    packed_samples,
    ready_made,
    validity,
)
from .mass import has_masses, is_step, row_of, takes_mask, weigh, weighs
from .needs import (
    VISION_SIGNALS,
    check_causal,
    check_language_model,
    check_mass,
    check_modalities,
    check_positions,
    names_of,
    resolve_needs,
    sees_behind,
    stateful,
)
from .packing import Array, Group, follow, pack, renumbered, sent, take
from .pixels import PixelFacade
from .probe import Forms, attention_in
from .prompt import PromptTap
from .record import CallRecord, Span
from .rotary import layer_tables, shifted
from .scope import ENCODE, Scope, current, enter, leave, notes, remember
from .signals import VisionTap, kind_of
from .windows import cuts_off, windows_of

CALL = "mmcompress_call"
"""Private keyword that carries the call from the language model to its layers. Gradient checkpointing replays layers
with their keywords when the call is over, and in a thread of their own."""
BY_THEMSELVES = frozenset(
    {
        "inputs_embeds",
        "hidden_states",
        "attention_mask",
        "position_ids",
        "position_embeddings",
        CACHE,
        CALL,
    }
)
"""Keywords of the language model and its layers that the engine packs in a way of their own; all others follow the tokens."""

STEPS = ("second_per_grid_ts", "video_second_per_grid")
"""Keywords that tell the base model how many seconds there are from one frame of a video to the next."""

Facade = PixelFacade | FrameFacade | EncoderFacade
Eye = tuple[Adapter, Facade | None, VisionTap | None]
"""Who knows a vision encoder, what stands behind it, and what listens to it."""


class Engine(Following):
    """Compresses one model by one plan, from `install` to `remove`."""

    kept = (*Following.kept, "timing", "clip", "last")
    clip: Clip | None = None
    last: CallRecord | None = None
    told: frozenset[str] = frozenset()
    """What has been warned of once."""

    def __init__(self, adapter: Adapter, plan: Pipeline, timing: bool = False, forms: Forms | None = None) -> None:
        super().__init__()
        self.plan, self.timing = plan.fit(adapter.language_model.config).load(adapter.model), timing
        self.find(adapter, forms)

    def find(self, adapter: Adapter, forms: Forms | None = None) -> None:
        """Ask the model for all that the plan needs; raises where it cannot give it. `forms`: of its attention, if found before."""
        plan = self.plan
        self.adapter, self.base, self.language_model = adapter, adapter.base, adapter.language_model
        check_modalities(adapter, plan)
        check_language_model(self.language_model.config, plan)
        check_causal(self.language_model, plan)
        self.windows = windows_of(self.language_model.config, sees_behind(self.language_model))
        check_positions(adapter, plan)
        if plan.calibrates:
            check_calibration(self.language_model, plan)
        self.clip = Clip.of(adapter, plan, self.clip)
        self.around = Around.of(self)
        self.forms = Forms(self.language_model, adapter.model) if forms is None else forms
        self.stateful = stateful(self.language_model.config)
        self.attending = [i for i in range(len(self.language_model.layers)) if i not in self.stateful]
        self.wide = plan.weighs and check_mass(self.forms, self.attending, plan) == "channel"
        """Whether masses come to attention in more channels, where nothing else needs a mask."""
        self.substitutes = resolve_needs(adapter, self.forms, plan, self.clip is not None)
        self.cutter = Cutter(self, self.forms, plan, adapter.reindexes)
        inside = (*plan.layer_stages, *plan.exit_stages)
        self.layer_kinds = {kind_of(name) for stage in inside for name in names_of(stage.needs)}
        self.inputs = InputStages(adapter, plan, self.clip, self.substitutes.values())
        self.reads_text = bool(self.layer_kinds & OF_TEXT) or self.inputs.reads_text
        names = {name for name in self.substitutes.values() if kind_of(name) in VISION_SIGNALS}
        reading = [stage for stage in plan.parts if VISION_SIGNALS.intersection(map(kind_of, names_of(stage.needs)))]
        self.seen = {modality for stage in reading for modality in stage.modalities}
        self.eyes = self._eyes(names)
        self.facade = next((facade for _, facade, _ in self.eyes.values()), None)
        self.rewriters = rewriters(plan, self.forms)
        self.parameters = list(inspect.signature(self.base.forward).parameters)
        self.signatures = {name: inspect.signature(getattr(self.base, name)) for name in adapter.encoders}
        by_method = [name for name, modality in adapter.encoders.items() if modality == "audio"]
        self.sounds = {
            next(iter(inspect.signature(getattr(self.base, name)).parameters)): "audio" for name in by_method
        }
        """The keyword that brings sound to its encoder."""
        self.counting = [_counts(layer) for layer in self.language_model.layers]
        self.kinds = self._kinds()

    def _kinds(self) -> list[int]:
        """A number for each layer of the language model, the same for those that differ in nothing that their keywords hang on."""
        types = getattr(self.language_model.config, "layer_types", None)
        unlike = [
            (
                self.windows[i] if self.windows else None,
                types[i] if types else None,
                i in self.stateful,
                self.counting[i],
                self.plan.calibrates and i == 0,
            )
            for i in range(len(self.counting))
        ]
        return [unlike.index(one) for one in unlike]

    # ------------------------------------------------------------------ checks at compress time
    def _eyes(self, names: set[str]) -> dict[str, Eye]:
        """The vision encoder of each modality."""
        found: dict[str, Eye] = {}
        for modality in {*self.adapter.encoders.values()} - {"audio"} or {"image"}:
            adapter = self.adapter.eye(modality)
            same = next((eye for eye in found.values() if eye[0] is adapter), None)
            found[modality] = same or self._eye(adapter, names)
        return found

    def _eye(self, eye: Adapter, names: set[str]) -> Eye:
        """A vision encoder with what stands between it and the rest, where its tokens become fewer, and what listens to it."""
        for stage in (*self.plan.pixel_stages, *self.plan.encoder_stages):
            eye.check_stage(stage)
        facade: Facade | None = None
        if self.plan.pixel_stages:
            first = self.plan.pixel_stages[0]
            facade = FrameFacade(self, eye, first) if isinstance(first, FrameStage) else PixelFacade(self, eye, first)
        elif self.plan.encoder_stages:
            facade = EncoderFacade(self, eye, self.plan.encoder_stages[0])
        return eye, facade, VisionTap(self, eye, names, facade, self.clip) if names else None

    # ------------------------------------------------------------------ hooks
    def doors(self) -> Iterator[RemovableHandle]:
        yield self.base.register_forward_pre_hook(self._base_pre, with_kwargs=True)
        if self.base is not self.adapter.model:
            yield self.adapter.model.register_forward_pre_hook(self._model_pre, with_kwargs=True)

    def hooks(self) -> Iterator[RemovableHandle]:
        yield self.base.register_forward_hook(self._base_post, always_call=True)
        yield self.language_model.register_forward_pre_hook(self._language_pre, with_kwargs=True)
        yield self.language_model.register_forward_hook(self._language_post)
        for i, layer in enumerate(self.language_model.layers):
            yield layer.register_forward_pre_hook(functools.partial(self._layer_pre, i), with_kwargs=True)
        for i in self.attending if self.wide else ():
            attention = attention_in(self.language_model.layers[i], self.plan)
            yield attention.register_forward_pre_hook(self._attention_pre, with_kwargs=True)
            self.replace(attention, "config", Wide(attention.config))
        watching = {id(part): part for _, *parts in self.eyes.values() for part in parts}
        for part in (self.around, *watching.values(), *self.rewriters.values(), self.cutter):
            if part is not None:
                yield from part.install()
        for name in self.adapter.encoders:
            original = getattr(self.base, name)
            # A partial of a bound method survives deepcopy and pickle (a closure does not), and generate() reads the
            # signature of this method.
            wrapper = functools.partial(self._encode, original, name)
            self.replace(self.base, name, functools.update_wrapper(wrapper, original))
        for modality, module in self.adapter.listened.items():
            yield module.register_forward_hook(functools.partial(self._heard, modality))
        model = self.adapter.model
        if hasattr(model, "loss_function"):
            self.replace(model, "_loss_function", functools.partial(loss, self, model.loss_function))

    def remove(self) -> None:
        super().remove()
        notes(self).clear()

    # ------------------------------------------------------------------ base model
    def _model_pre(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.whole:
            return
        if self.doors_at is None or self.doors_at.changed():
            self.follow()
        if self.around is not None:
            self.around.enter(args, kwargs)

    def _base_pre(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.whole:
            return
        if self.places is None:
            self.follow()  # the first call of a copy
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}  # some families pass input_ids by position
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        step = ids is not None and ids.shape[1] == 1
        if not step and (given.get("mm_encoder_outputs") or is_pruned(cache_of(given))):
            self.follow()
        outputs = {m: o for m, o in (given.get("mm_encoder_outputs") or {}).items() if o is not None}
        encoded = [self._encoded_before(modality, output) for modality, output in outputs.items()]
        pixels = pixels_in(given)
        if not step and "audio" in self.plan.modalities:
            pixels |= {modality: name for name, modality in self.sounds.items() if given.get(name) is not None}
        if self.around is not None:
            ids, before, more = self.around.seen(ids, embeds)
            encoded, pixels = encoded + before, {**more, **pixels}
        for modality in pixels.keys() - set(self.adapter.modalities):
            raise self._unseen(modality, pixels[modality], "has no")
        seconds = next((given[name] for name in STEPS if given.get(name) is not None), None)
        enter(Call(ids, embeds, encoded, self, pixels, mask=given.get("attention_mask"), seconds=seconds))

    def _encoded_before(self, modality: str, output: Any) -> Encoded:
        """The record of features that `generate` encoded before the forward pass."""
        if hasattr(output, "mmcompress"):
            return output.mmcompress
        last = notes(self).get(modality)
        # accelerate's hooks copy outputs from device to device, and only the tensors in them
        if last is not None and hasattr(self.adapter.model, "_hf_hook"):
            return last
        raise NotImplementedError(
            "mm_encoder_outputs that were not made by this compressed model: generate(prefill_chunk_size=...) cuts them into "
            "chunks, which compression does not support (budgets are per image, not per chunk); leave it out. Features "
            "encoded before compress() have to be encoded again"
        )

    def _base_post(self, module: Any, args: tuple, output: Any) -> None:
        call = self.call
        leave(self)
        if call is not None and call.encoded:
            if output is not None and not call.batch:
                raise self._passed("the language model")
            kept = notes(self)
            kept.clear()
            if call.groups and call.groups[-1].source is not None:
                assert call.visual is not None
                kept[VISUAL] = torch.from_numpy(call.visual)
                if self.around is not None:
                    self.around.note(call.groups[-1])

    def _passed(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{self.plan!r}: {what} ran past its hooks, so tokens that should be dropped were not: call "
            f"mmcompress.compress(model, plan) again"
        )

    @property
    def call(self) -> Call | None:
        """The forward pass that runs in this thread."""
        call = current(self)
        return call if isinstance(call, Call) and not call.asleep else None

    def _encode(self, original: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        """Runs an encoder method and records what it encoded, on its output: `generate` may call it before the forward."""
        if current(self, ENCODE) is not None or not self.whole:  # some families' video method calls their image method
            return original(*args, **kwargs)
        self.follow()
        bound = self.signatures[name].bind_partial(*args, **kwargs).arguments
        arguments = {**bound, **bound.pop("kwargs", {})}
        self.adapter.check_encoder_call(arguments)
        modality = self.adapter.encoders[name]
        adapter, facade, tap = self.eyes.get(modality, (self.adapter, None, None))
        scope = enter(Scope(self, ENCODE))
        films = modality == "video" or not isinstance(facade, FrameFacade)
        if facade is not None and not (films and modality in facade.stage.modalities):
            scope.state[RESTS] = True
        scope.state[FILMS] = films_in(arguments)
        start = self._now()
        try:
            output = original(*args, **kwargs)
            arguments = on_host(arguments)
            if modality == "audio":
                return self._note(Encoded(modality, [], seconds=self._since(start)), output)
            features = adapter.features(output, arguments)
            counts = [f.numel() // f.shape[-1] for f in features]
            if not counts:
                raise ValueError(f"{name} was given no images: leave the pixels out for a text-only prompt")
            encoded = adapter.encoded(modality, arguments, counts)
            adapter.mark(encoded, features)
            if tap is not None and modality in self.seen:
                encoded.signals = tap.collect(encoded, arguments)
            encoded.seconds = self._since(start)
            if facade is not None and RESTS not in scope.state:
                encoded.merged = facade.merged
                encoded.clusters = facade.clusters(encoded, arguments)
            if facade is not None and (encoded.clusters is not None or encoded.chosen is not None):
                encoded.left = facade.left(encoded.layouts)
        finally:
            leave(self, ENCODE)
        return self._note(encoded, output)

    def _heard(self, modality: str, module: Any, args: tuple, output: Any) -> None:
        """A module that encodes a modality has run."""
        if self.call is not None:
            self._note(Encoded(modality, []), output)

    def _note(self, encoded: Encoded, output: Any) -> Any:
        """Keep what was encoded for the call that runs or comes; returns `output`."""
        if hasattr(output, "pooler_output"):
            output.mmcompress = encoded
        call = self.call
        if call is not None:
            call.encoded.append(encoded)
        else:
            notes(self)[encoded.modality] = encoded
        return output

    # ------------------------------------------------------------------ language model, before
    def _language_pre(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        call = self.call
        if call is None or kwargs.get("inputs_embeds") is None:
            return None
        call.cache, call.config, call.windows = cache_of(kwargs), self.language_model.config, self.windows
        if call.pixels:
            self._check_encoded(call)
        if not call.encoded and not is_pruned(call.cache):
            self._check_text(call)
            return None  # no visuals in call or cache: the stock path, untouched
        kwargs = dict(kwargs)
        call.caches = call.cache is not None or _makes_cache(self.language_model, kwargs)
        call.batch, length, _ = kwargs["inputs_embeds"].shape
        # + 0: a copy, for static caches count in place
        call.past = call.cache.get_seq_length() + 0 if call.cache is not None else 0
        valid, call.past_valid = validity(call, length)
        if call.encoded and self._compress(call, kwargs, valid):
            if self._acts_inside(call):
                kwargs[CALL] = call
            return args, kwargs
        if is_pruned(call.cache):
            if self._follow(call, kwargs, valid):
                return args, kwargs
        elif call.sight is not None and call.record is not None:
            call.groups = call.record.groups
        else:
            return None
        windowed = any(self.windows) and any(cuts_off(call, i, length) for i in range(len(self.windows)))
        if (
            self.rewriters
            or windowed
            or has_masses(call.cache)
            or layers_differ(call, length, call.config._attn_implementation)
        ):
            kwargs[CALL] = call
        return args, kwargs

    def _acts_inside(self, call: Call) -> bool:
        """Whether any layer of a call whose prompt was packed gets something else than the language model gives it."""
        group = call.groups[0]
        return bool(
            self.cutter.acts
            or self.rewriters
            or self.stateful
            or any(self.counting)
            or call.ready is not None
            or group.mass is not None
            or group.calibration is not None
            or is_pruned(call.cache)
            or not takes_mask(call.config)  # flash attention would take gaps in position ids for packed sequences
            or any(cuts_off(call, index, group.logical) for index in range(len(self.windows)))
        )

    def _step(self, call: Call, kwargs: dict[str, Any], length: int) -> bool:
        """Weigh all keys of a step of decoding at once, where every layer adds the same to its logits. False where not."""
        if not has_masses(call.cache):
            return False
        self._check_way()
        call.step = is_step(call, length)
        leaders = sum(getattr(layer, "leads", False) for layer in call.cache.layers)  # type: ignore[union-attr]
        if not call.step or leaders > 1 or self.stateful or self.rewriters:
            return False
        row = row_of(call, self.attending[0], kwargs["inputs_embeds"].dtype)
        kwargs |= {"attention_mask": row} if takes_mask(call.config) else {"attention_mask": None, BIAS: row}
        return True

    def _check_way(self) -> None:
        """Raise where masses would not come to attention."""
        config = self.language_model.config
        if not self.wide and not takes_mask(config):
            raise RuntimeError(
                f"{self.plan!r}: attn_implementation={config._attn_implementation!r} was set when the model was compressed "
                f"already, and it takes no mask by which merged tokens weigh what they stand for: call "
                f"mmcompress.compress(model, plan) again"
            )

    def _check_encoded(self, call: Call) -> None:
        """Pixels that went to the language model by another road than the encoder methods would stay uncompressed."""
        there = {encoded.modality for encoded in call.encoded}
        for modality, name in call.pixels.items():
            if modality not in there:
                raise self._unseen(modality, name, "did not encode it by")

    def _unseen(self, modality: str, name: str, why: str) -> NotImplementedError:
        return NotImplementedError(
            f"{name} was given, but {type(self.base).__name__} {why} get_{modality}_features, so nothing of it would be "
            f"compressed: uncompress the model for prompts with {modality}s"
        )

    def _check_text(self, call: Call) -> None:
        """A prompt with placeholders but without features would run uncompressed, on the embeddings of the placeholders; so
        would features that the caller has put among the embeddings."""
        if torch.compiler.is_compiling():
            return
        if call.input_ids is None:
            if call.inputs_embeds is not None and call.inputs_embeds.shape[1] > 1 and "embeds" not in self.told:
                self.told |= {"embeds"}
                warnings.warn(
                    "inputs_embeds came without pixels: if visual features are among them, they are not compressed. Give "
                    "input_ids and pixel_values, or mm_encoder_outputs of this model's encoder methods",
                    stacklevel=2,
                )
            return
        if call.input_ids.shape[1] == 1:
            return
        masks = placeholder_masks(call, self.adapter)
        asked = [m for m in masks if m != "audio" or "audio" in self.plan.modalities]
        there = torch.stack([masks[m].any() for m in asked]).tolist() if asked else []
        for modality in (m for m, found in zip(asked, there, strict=True) if found):
            raise ValueError(
                f"the prompt has {modality} placeholders, but no {modality} came with it: pass its "
                f"{'sound' if modality == 'audio' else 'pixels'}. "
                f"generate(prefill_chunk_size=...), which loses them, is not supported"
            )

    def _compress(self, call: Call, kwargs: dict[str, Any], valid: Tensor | None) -> bool:
        """Run the stages before the LLM and pack what is left; False (and nothing changed) if no stage drops anything."""
        embeds: Tensor = kwargs["inputs_embeds"]
        device, length = embeds.device, embeds.shape[1]
        call.start = self._now(device)
        config = self.language_model.config
        call.ready = ready_made(kwargs.get("attention_mask"))
        call.samples, packed_mask = packed_samples(call, kwargs, config)
        if packed_mask is not None:
            call.ready = packed_mask
        host_valid, spans = locate(call, self.adapter, valid, embeds, self.reads_text)
        for span in spans:
            span.kept = self.inputs.budget(call, span)
        whole = bool(host_valid.all())
        counts = [length] * call.batch if whole else host_valid.sum(1).tolist()
        call.hidden = 0 if whole else int((~host_valid * np.arange(1, length + 1)).max())
        call.record = self.last = CallRecord(call.batch, length, list(counts), spans, signals=self.substitutes)
        remember(self, call.record)
        call.record.seconds = {"vision": 0.0, "select": 0.0}
        for encoded in call.encoded:
            part = "audio" if encoded.modality == "audio" else "vision"
            call.record.seconds[part] = call.record.seconds.get(part, 0.0) + encoded.seconds
        call.record.merged = next((e.merged for e in reversed(call.encoded) if e.merged is not None), None)
        if call.cache is not None and int(call.past):
            call.record.before = lengths(call.cache, len(self.language_model.layers))
        if self.rewriters:
            looked_at = self.plan.attention_stages[0].modalities
            shown = [span for span in spans if span.modality in looked_at]
            call.sight = Sight.of(host_valid, shown, int(call.past), device)
        if not self._drops_anything(spans):
            known = None if call.sight is None or whole else sent(host_valid, device)
            call.record.groups = [Group(0, length, length, counts, known)]
            return False
        check_masks(kwargs)
        if self.plan.weighs:
            self._check_way()
        counted = any(self.counting) and self._given_positions(call, kwargs, embeds).dim() == 2
        if counted and "flash" in (config._attn_implementation or ""):
            raise NotImplementedError(
                f"{config._attn_implementation} takes gaps in position ids for packed sequences, and the layers of "
                f"{type(self.language_model).__name__} read position ids: use attn_implementation='sdpa'"
            )
        places = np.where(host_valid, np.arange(length), -1)
        self._check_ends(places.max(1), spans)
        if call.samples is not None:
            self._check_packed()

        start = self._now(device)
        pools, texts = np.zeros(places.shape, np.int8), np.zeros(places.shape, bool)
        call.pool_counts = {pool: [0] * call.batch for pool in sorted(set(self.cutter.pools.values()))}
        call.text_counts = [0] * call.batch
        scored, deciding, last_patch = "input_scores" in self.layer_kinds, [], -1
        for span in spans:
            row, patches, structural = span.row, span.places, span.apart
            last_patch = max([last_patch, *patches[-1:].tolist(), *structural[-1:].tolist()])
            if self._loses_structural(span):
                places[row, structural] = -1
                counts[row] -= len(structural)
            else:
                call.structural += len(structural)
            pool = self.cutter.pools[span.modality]
            pools[row, patches] = pool
            texts[row, span.words] = True
            if scored or span.kept < len(patches):  # else it stays as it is
                deciding.append(span)
                places[row, patches] = -1
            counts[row] += span.kept - len(patches)
            call.pool_counts[pool][row] += span.kept
            call.text_counts[row] = len(span.words)
        if any(stage.lays for stage in self.plan.layer_stages):
            call.kept["cells"] = sent(cells_of(call, spans, places.shape), device)
        scores = torch.zeros(places.shape, device=device) if scored else None
        prompt = Prompt(sent(places, device), embeds, levels_of(kwargs, embeds), scores, leading(kwargs))
        if self.plan.weighs or self.plan.calibrates:
            prompt.mass = torch.ones(places.shape, device=device)
        if self.plan.calibrates:
            prompt.mean = torch.ones(places.shape, device=device)
        tap = None
        if self.inputs.of_prompt:
            tap = PromptTap(self.adapter, self.forms, call, kwargs, self._given_positions(call, kwargs, embeds), valid)
            call.asleep = True  # what it asks of the language model runs as if there were no engine
        try:
            for batch in alike(deciding):
                self.inputs.select(call, batch, prompt, tap)
        finally:
            call.asleep = False
        packed = pack(prompt.places, counts)
        call.record.seconds["select"] = self._since(start)

        physical = packed.source.shape[1]
        padded = not (whole or host_valid[:, -1].all())  # on the right of any row
        tail = 0 if padded else min(length - 1 - last_patch, physical)
        positions, gone = renumbered(
            call.past if kwargs.get("position_ids") is None else kwargs["position_ids"],
            prompt.places,
            packed,
            valid,
            self.adapter.reindexes and self.plan.position_policy() == "reindex",
            call.samples,
        )
        group = Group(
            0, length, physical, counts, packed.valid, packed.source, packed.place, tail=tail, positions=positions, gone=gone,
            mass=None if prompt.mass is None else prompt.mass.gather(1, packed.source),
        )  # fmt: skip
        if prompt.mean is not None:
            assert group.mass is not None
            group.calibration = torch.stack([prompt.mean.gather(1, packed.source), group.mass], 1)
            group.mass = None
        call.groups = call.record.groups = [group]
        told: list[Any] = call.cache.layers if call.cache is not None else []
        for layer in told:
            if getattr(layer, "prefill_length", None) is not None:  # generate() has told it how long the prompt is
                layer.prefill_length -= length - physical
        for name in kwargs.keys() - BY_THEMSELVES - (frozenset() if prompt.levels is None else NAMES):
            kwargs[name] = follow(kwargs[name], packed.source, length, name)
        marks: list[Tensor] = []
        if self.cutter.first is not None:
            marks += [sent(pools, device), sent(texts, device)]
        if prompt.levels is not None:
            assert call.visual is not None
            marks += [sent(call.visual, device), prompt.levels.rows]
        kwargs["inputs_embeds"], *marks = compact([prompt.embeds, *marks], packed.source, packed.valid)
        levels = None if prompt.levels is None else Levels(prompt.levels.layers, marks[-1])
        if self.cutter.first is not None:
            call.pools, call.texts = marks[:2]
        kwargs["position_ids"] = shifted(positions, ledger_of(call.cache, 0))
        call.kept = {name: values.gather(1, packed.source) for name, values in call.kept.items()}
        if prompt.scores is not None:
            call.kept["input_scores"] = prompt.scores.gather(1, packed.source)
        for stage in (*self.plan.layer_stages, *self.plan.exit_stages):
            if "text_relevance" in map(kind_of, names_of(stage.needs)):
                read = self.cutter.pools_in(stage)
                lead = levels.of(prompt.lead) if levels is not None and prompt.lead is not None else 0
                call.kept[of_words(read)] = words_meant(call, read, kwargs["inputs_embeds"] + lead)
        if levels is not None:
            give_levels(call, kwargs, levels, marks[-2], self.cutter.first)
        self._give_mask(call, kwargs, group)
        self.cutter.arm()
        return True

    def _give_mask(self, call: Call, kwargs: dict[str, Any], group: Group) -> None:
        """The mask of the tokens that enter the language model."""
        embeds = kwargs["inputs_embeds"]
        if call.ready is None:
            mask = logical_mask(call, group, 0, embeds.device)
            if mask is None and not call.caches:  # then gaps in position ids would be taken for packed sequences
                mask = torch.ones(call.batch, group.physical, dtype=torch.bool, device=embeds.device)
            kwargs["attention_mask"] = mask
        else:
            kwargs["attention_mask"] = carried(call.config, call, group, 0, call.ready, embeds)

    def _check_packed(self) -> None:
        """Raise for what decides by rows, where rows hold several samples."""
        deciding = (*self.plan.layer_stages, *self.plan.exit_stages, *self.plan.attention_stages)
        if deciding or self.inputs.of_prompt:
            raise NotImplementedError(
                f"{self.plan!r} on rows that hold several samples (position_ids that start again): cuts in layers and attention "
                f"signals of the language model are decided per row; give one sample per row, or a stage before the language model"
            )

    def _check_ends(self, last: Array, spans: list[Span]) -> None:
        """The answer begins at the last token of a prompt, so that one must not be dropped."""
        for span in spans:
            if span.modality not in self.plan.modalities:
                continue
            ends = [int(span.places[-1]), *(span.apart[-1:].tolist() if self._loses_structural(span) else [])]
            if last[span.row] in ends:
                raise ValueError(
                    f"the prompt in batch row {span.row} ends with {span.modality} tokens, which compression may drop, and nothing "
                    f"could follow: put text behind the {span.modality}, as chat templates do"
                )

    def _loses_structural(self, span: Span) -> bool:
        return self.plan.structural == "drop" and span.modality in self.plan.modalities and len(span.apart) > 0

    @staticmethod
    def _given_positions(call: Call, kwargs: dict[str, Any], embeds: Tensor) -> Tensor:
        """Position ids of the whole prompt as the model would use them, [..., B or 1, S]."""
        positions: Tensor | None = kwargs.get("position_ids")
        if positions is None:
            positions = (torch.arange(embeds.shape[1], device=embeds.device) + call.past)[None]
        return positions

    def _follow(self, call: Call, kwargs: dict[str, Any], valid: Tensor | None) -> bool:
        """Nothing is dropped in this call, but the cache is pruned: mask and positions that fit it. Whether that is all."""
        length = kwargs["inputs_embeds"].shape[1]
        if valid is not None and bool(valid.all()):
            valid = None
        call.groups = [Group(0, length, length, [length] * call.batch, valid)]
        ready = ready_made(kwargs.get("attention_mask"))
        if ready is not None and (length > 1 or (ready_made(call.mask) is not None and not is_static(call))):
            check_masks(kwargs)
            call.ready = ready
        settled = self._step(call, kwargs, length)
        if not settled:
            self._give_mask(call, kwargs, call.groups[0])
        call.groups[0].positions = positions = self._given_positions(call, kwargs, kwargs["inputs_embeds"])
        kwargs["position_ids"] = shifted(positions, ledger_of(call.cache, 0))
        return settled

    def _drops_anything(self, spans: list[Span]) -> bool:
        left: dict[int, Counter[int]] = defaultdict(Counter)
        for span in spans:
            if span.kept < len(span.places) or self._loses_structural(span):
                return True
            left[span.row][self.cutter.pools[span.modality]] += span.kept
        return any(map(self.cutter.drops, left.values()))

    # ------------------------------------------------------------------ language model, after
    def _language_post(self, module: Any, args: tuple, output: Any) -> Any:
        call = self.call
        if call is None:
            return None
        if call.record is not None:
            call.record.seconds["language"] = self._since(call.start) - call.record.seconds["select"]
        cache = cache_of(output)
        if not call.groups:
            self._weigh(call, cache)
            return None
        last = call.groups[-1]
        compressed = last.source is not None
        for index in sorted(({*self.cutter.at} | self.cutter.exits) - call.cuts) if call.pools is not None else ():
            raise self._passed(f"layer {index} of the language model")
        held = compressed or call.sight is not None or any(group.valid is not None for group in call.groups)
        if cache is not None and held:
            book(
                cache,
                call.group_of,
                call.past_valid,
                call.batch,
                call.hidden,
                any(self.windows),
                _fed(call, last.logical),
            )
        if cache is not None:
            keep_notes(cache, call)
        self._weigh(call, cache)
        # else the last tokens alone were asked for
        if compressed and output.last_hidden_state.shape[1] == last.physical:
            assert call.visual is not None
            if self.around is None:
                ends = call.visual.copy()
                ends[:, :-1] &= ~call.visual[:, 1:]
            else:  # nothing is generated: each token shows its own
                ends = np.zeros_like(call.visual)
            output.last_hidden_state = last.restore(output.last_hidden_state, ends)
        return output

    @staticmethod
    def _weigh(call: Call, cache: Any) -> None:
        if call.record is not None:
            call.record.held = held_bytes(cache, _fed(call, call.record.length))

    # ------------------------------------------------------------------ decoder layers
    def _layer_pre(self, index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        call: Call | None = kwargs.get(CALL)
        if call is None:
            return None
        kwargs = dict(kwargs)
        del kwargs[CALL]
        hidden = args[0] if args else kwargs["hidden_states"]
        if index in call.deepstack:
            level, before = call.deepstack[index], call.group_of(index - 1)
            level = level if before.from_base is None else take([level], before.from_base)[0]
            hidden = hidden + level.to(hidden)
        tables, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        if index in self.cutter.acts and call.pools is not None and index not in call.cuts:
            self._cut(call, index, hidden, tables)
        own = call.own.get(index)
        group = call.group_of(index) if own is None else own.group
        if group.start == index:
            hidden = group.enter(hidden)
        if own is None or own.tables is not tables or own.positions is not positions or own.names != (*kwargs,):
            own = self._lay_ready(call, index, group, hidden, kwargs)
        if group.from_base is not None:
            length = call.groups[0].physical
            for name in own.others:
                kwargs[name] = follow(kwargs[name], group.from_base, length, name)
            if len(args) > 1:
                args = (args[0], *(follow(x, group.from_base, length, "an argument of the layer") for x in args[1:]))
        kwargs |= own.keywords
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] not in hidden.shape[:-1]:
            # layers that share keys may be given the last tokens alone
            kwargs["attention_mask"] = mask[:, :, -hidden.shape[1] :]
        if index in self.rewriters:
            kwargs[GIVEN] = (call, group, hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _cut(self, call: Call, index: int, hidden: Tensor, tables: Any) -> None:
        """Decide the cut before a layer, once: gradient checkpointing replays layers and only applies it again."""
        call.cuts.add(index)
        start = self._now(hidden.device)
        decide = self.cutter.cut if index in self.cutter.at else self.cutter.leave
        decide(call, index, hidden, tables)
        call.own.clear()
        if call.record is not None:
            call.record.seconds["select"] += self._since(start)

    def _lay_ready(self, call: Call, index: int, group: Group, hidden: Tensor, kwargs: dict[str, Any]) -> Own:
        """What a layer gets for its tokens, `hidden` [B, M, H], in the place of `kwargs`: made once for all layers of its kind that
        hold the same."""
        ledger, kind = ledger_of(call.cache, index), self.kinds[index]
        tables, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        made = self._made(call, index, group, ledger, hidden, tables, positions)
        others = (n for n, value in kwargs.items() if n not in BY_THEMSELVES and not isinstance(value, bool))
        own = Own(group, (*kwargs,), tables, positions, made, (*others,))
        end = min((later.start for later in call.groups if later.start > index), default=len(self.kinds))
        for i in range(index, end):
            if self.kinds[i] == kind and (ledger is None or ledger_of(call.cache, i) is ledger):
                call.own[i] = own
        return own

    def _made(
        self, call: Call, index: int, group: Group, mine: Ledger | None, hidden: Tensor, tables: Any, positions: Any
    ) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if tables is not None:
            tables = layer_tables(self.language_model, index, call, group, mine, hidden, tables)
            made["position_embeddings"] = tables
        # other tokens than layer 0 has, or a window that the language model would have count them: an own mask
        if weighs(call, group, index):
            if index not in self.stateful:
                weigh(made, call.config, self.wide, call, group, index, hidden)
        elif group.calibration is not None:
            if index not in self.stateful:
                made["attention_mask"] = calibrated_mask(call.config, call, group, index, hidden, tables)
        elif (
            group.from_base is not None or mine is not ledger_of(call.cache, 0) or cuts_off(call, index, group.logical)
        ):
            made["attention_mask"] = mask_of(call.config, call, group, index, hidden)
        if call.groups[0].source is not None:
            made["position_ids"] = self._layer_positions(index, group, mine, positions)
        return made

    def _attention_pre(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if BIAS in kwargs and not isinstance(module.config, Wide):
            raise self._passed("an attention module of the language model")

    def _layer_positions(self, index: int, group: Group, ledger: Ledger | None, given: Any) -> Any:
        """Position ids for a layer that reads them. None for others: flash attention would take gaps for packed sequences."""
        if given is None or not self.counting[index]:
            return None
        if group.positions is not None:
            # numbers of another form (of text, beside those of M-RoPE) are for flash attention alone
            same = group.positions.dim() == given.dim()
            return shifted(group.positions, ledger).to(given.device) if same else None
        return given if group.from_base is None else follow(given, group.from_base, given.shape[-1], "position_ids")

    # ------------------------------------------------------------------ timing
    def _now(self, device: torch.device | None = None) -> float | None:
        """Seconds on a clock: always on the CPU; on an accelerator, which has to be waited for, only with timing=True. `device`: by
        default that of the model."""
        if torch.compiler.is_compiling():
            return None
        if device is None:
            device = next(self.base.parameters()).device
        if device.type not in ("cpu", "meta"):
            if not self.timing:
                return None
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def _since(self, start: float | None) -> float:
        """Seconds since `start`, nan where that is not measured."""
        if start is None:
            return float("nan")
        now = self._now() if self.timing else time.perf_counter()  # else it is the CPU, where nothing is waited for
        return float("nan") if now is None else now - start


def _fed(call: Call, length: int) -> int | None:
    """How many tokens all calls have passed, the `length` of this one included; None where only the device knows."""
    return call.past + length if isinstance(call.past, int) else None


def _makes_cache(language_model: Any, given: dict[str, Any]) -> bool:
    """Whether a language model that is given no cache makes one, as most do. Training with checkpoints does without."""
    asked = given.get("use_cache")
    if language_model.training and getattr(language_model, "is_gradient_checkpointing", False):
        return False
    wanted = getattr(language_model.config, "use_cache", False) if asked is None else asked
    return bool(wanted) and "DynamicCache" in _names_in(type(language_model).forward)


@functools.cache
def _names_in(forward: Any) -> tuple[str, ...]:
    """The names that a function uses, behind its decorators."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code.co_names if code is not None else ()


def _counts(layer: Any) -> bool:
    """Whether a part of a decoder layer reads position ids by name (to scale queries, say)."""
    parts = (part for part in layer.modules() if part is not layer)
    return any("position_ids" in inspect.signature(part.forward).parameters for part in parts)
