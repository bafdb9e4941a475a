# SPDX-License-Identifier: Apache-2.0
"""Whether a plan on an architecture is exact: equal to the stock model on what is kept, or refused by `compress`.

The reference is the stock model whose language model is given everything gathered at the kept places, whatever it is: masks
of any form, positions, keywords (input and encoder stages); or whose layers see no key of a dropped token (layer stages).
Layers with windows see of the kept tokens those that they see in the whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import transformers
from mmcompress.adapters import adapter_for
from torch import Tensor

import mmcompress as mm
from mmcompress.budget import resolve

from .architectures import CLASSES, IMAGE, LAYERS, VIDEO, base_of, build, prompts
from .sounds import AUDIO

PLANS = {
    "input": "divprune(keep={})",
    "video": "divprune(keep={})",
    "audio": "divprune(keep={}, on='audio')",
    "layer": "fastv(layer=1, keep={})",
    "signal": "visionzip(keep={})",
    "encoder": "tome(keep={})",
}
"""One plan for each kind of stage, and for signals of the vision encoder; and what an input stage does to videos and sounds."""
ROW: list[int | str] = [4, "1", 2, "2", 6]
RAGGED: list[list[int | str]] = [[5, "3", 4], ROW]
FILM: list[int | str] = [4, "v1", 6]
HEARD: list[list[int | str]] = [[5, "a3", 4], [4, "a1", 2, "a2", 6]]
STEPS = 4
LOOSE = {"nemotron_h_omni": 3e-3}
"""Where steps of stock differ from its own longer prompts (a recurrence that is rounded otherwise than its scan): how far, of
the largest logit."""


@dataclass
class Outcome:
    """What a plan did: "ok", "refused" (by compress), "wrong" or "crash"; and what was said."""

    verdict: str
    said: str = ""

    def __str__(self) -> str:
        return self.verdict if not self.said else f"{self.verdict}: {self.said}"


def visual_in(ids: Tensor) -> Tensor:
    return (ids == IMAGE) | (ids == VIDEO) | (ids == AUDIO)


def gathered(value: Any, kept: Tensor, length: int, visual: Tensor) -> Any:
    """`value` at the places `kept` of a prompt of `length` tokens, along every dimension of that length; rows of visual
    tokens alone at those that are kept."""
    if isinstance(value, dict):
        return {name: gathered(part, kept, length, visual) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(part, kept, length, visual) for part in value)
    if not isinstance(value, Tensor):
        return value
    places = visual.nonzero()[:, 0]
    if value.dim() == 2 and len(value) == len(places) and length not in value.shape:
        rows = torch.searchsorted(places, kept[visual[kept]])
        return value[rows]
    for dim, size in enumerate(value.shape):
        if size == length:
            value = value.index_select(dim, kept)
    return value


@contextmanager
def shortened(
    model: Any, kept: Tensor, ids: Tensor, start: int | None, given: Callable[[Tensor], Tensor], instead: dict[str, Any]
) -> Iterator[None]:
    """The language model of a stock model (one row) sees only the places `kept`; `given` changes the embeddings there, and
    `instead` takes the place of other keywords. start: first of position ids that are numbered anew."""
    language_model, length = adapter_for(model).language_model, ids.shape[1]
    visual = (visual_in(ids) & (ids != AUDIO))[0]  # DeepStack levels are of pictures and videos

    def pre(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        assert not args and kwargs["inputs_embeds"].shape[1] == length
        given_now = {**kwargs, **instead}
        # who sees whom goes by the order in which tokens are given, as without a ready-made mask
        places = {"attention_mask": kept.sort().values}
        kwargs = {name: gathered(value, places.get(name, kept), length, visual) for name, value in given_now.items()}
        kwargs["inputs_embeds"] = given(kwargs["inputs_embeds"])
        if start is not None:
            kwargs["position_ids"] = torch.arange(start, start + len(kept))[None]
        return (), kwargs

    def post(module: Any, args: tuple, output: Any) -> Any:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden.new_zeros(1, length, hidden.shape[-1]).index_copy(1, kept, hidden)
        return output

    handles = [
        language_model.register_forward_pre_hook(pre, with_kwargs=True),
        language_model.register_forward_hook(post),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def looks_back(config: Any) -> bool:
    """Whether layers of a language model look back only so far."""
    kinds = getattr(config, "layer_types", None) or ["sliding"] * bool(getattr(config, "sliding_window", None))
    return any("sliding" in kind or "chunk" in kind for kind in kinds)


@contextmanager
def seeing(model: Any, masks: list[Any], places: Tensor) -> Iterator[None]:
    """The layers of a shortened language model, whose tokens stand at `places`, see what `masks` of the whole prompt let them see
    there, in the order in which they run."""
    left = iter(masks)

    def pre(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        mask = next(left)
        if isinstance(mask, Tensor):
            mask = mask.index_select(2, places).index_select(3, places)
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        layer.register_forward_pre_hook(pre, with_kwargs=True) for layer in adapter_for(model).language_model.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def masked(model: Any, gone: Tensor, layer: int) -> Iterator[None]:
    """From `layer` on no token of a stock model (one row) sees the places `gone`."""

    def pre(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        length = (args[0] if args else kwargs["hidden_states"]).shape[1]
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        keys = torch.zeros(length, dtype=torch.bool).index_fill(0, gone, True)
        away = keys[None] & ~torch.eye(length, dtype=torch.bool)
        mask = mask & ~away if mask.dtype == torch.bool else mask.masked_fill(away, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    layers = adapter_for(model).language_model.layers[layer:]
    handles = [part.register_forward_pre_hook(pre, with_kwargs=True) for part in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(module: Any, seen: list[dict[str, Any]]) -> Iterator[None]:
    """The keywords of the calls of `module` from now on, behind all hooks that are there."""

    def look(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append({**kwargs, **({"hidden_states": args[0]} if args else {})})

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def close(got: Tensor, wanted: Tensor, what: str, tolerance: float) -> None:
    worst, most = float((got - wanted).abs().max()), float(wanted.abs().max())
    assert worst <= tolerance * most, f"{what}: off by {worst:.2g} of {most:.2g}"


def extended(inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The inputs of a longer prompt `ids` [1, S], which goes on with text."""
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    found = {**inputs, "input_ids": ids}
    for name, value in inputs.items():
        if name != "input_ids" and isinstance(value, Tensor) and value.shape[:2] == inputs["input_ids"].shape:
            fill = torch.full((1, more), 1 if name == "attention_mask" else 0, dtype=value.dtype)
            found[name] = torch.cat([value, fill], 1)
    return found


Shared: TypeAlias = "tuple[Any, dict[str, Any]]"


class Case:
    """One architecture and one kind of stage. Cases of one architecture may share its model, and `known`: what the stock
    model makes of the samples."""

    def __init__(self, name: str, kind: str, attention: str | None = None, shared: Shared | None = None) -> None:
        self.name, self.kind = name, kind
        self.model, self.known = shared or (build(name, attention=attention), {})

    def compress(self, keep: float) -> None:
        mm.compress(self.model, PLANS[self.kind].format(keep))

    def last(self, inputs: dict[str, Any]) -> Tensor:
        """Logits behind the last token of every row."""
        return self.model(**inputs, use_cache=False).logits[:, -1]

    def layer_masks(self, inputs: dict[str, Any]) -> list[Any]:
        """The masks of the layers of the stock model, in the order in which they run."""
        seen: list[dict[str, Any]] = []
        with ExitStack() as stack:
            for layer in adapter_for(self.model).language_model.layers:
                stack.enter_context(watched(layer, seen))
            self.last(inputs)
        return [given.get("attention_mask") for given in seen]

    def generate(self, inputs: dict[str, Any]) -> Any:
        return self.model.generate(
            **inputs, do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=[IMAGE, VIDEO, AUDIO],
        )  # fmt: skip

    def prepare(self) -> None:
        """Inputs of two rows alone and together, and what the stock model makes of them."""
        what = self.kind if self.kind in ("video", "audio") else "image"
        if what not in self.known:
            samples = {"video": [FILM], "audio": HEARD, "image": RAGGED}[what]
            try:
                self._prepare(samples, 2)
            except (RuntimeError, StopIteration, ValueError):  # frames of a video in one run
                self._prepare(samples, 1)
            steady = self.steady()
            self.known[what] = (self.rows, self.batch, self.stock, self.positions, self.even, steady)
        self.rows, self.batch, self.stock, self.positions, self.even, self.decodes = self.known[what]

    def _prepare(self, samples: list[list[int | str]], runs: int) -> None:
        self.rows = [prompts(self.model, [sample], first=i, runs=runs) for i, sample in enumerate(samples)]
        self.batch = prompts(self.model, samples, runs=runs)
        seen: list[dict[str, Any]] = []
        with watched(adapter_for(self.model).language_model, seen):
            self.stock = [self.model(**inputs).logits for inputs in (*self.rows, self.batch)]
        self.positions: Tensor | None = seen[len(samples) - 1].get("position_ids")
        assert torch.isfinite(self.stock[-2][:, -1]).all(), "stock is not finite"
        alone = torch.cat([logits[:, -1] for logits in self.stock[:-1]])
        # not where positions count padding (mistral_large4), or pictures over all rows (hunyuan_vl)
        self.even = bool((alone - self.stock[-1][:, -1]).abs().max() < 1e-3)

    def unchanged(self, what: str) -> None:
        for inputs, logits in zip((*self.rows, self.batch), self.stock, strict=True):
            assert torch.equal(self.model(**inputs).logits, logits), what

    def check(self) -> None:
        """Raises AssertionError with the first thing that is wrong."""
        model, row = self.model, self.rows[-1]
        ids, language_model = row["input_ids"], adapter_for(model).language_model
        visual = visual_in(ids)[0]
        self.compress(1.0)
        self.unchanged("keep=1.0 changes logits")
        mm.uncompress(model)

        before: list[dict[str, Any]] = []
        behind: list[dict[str, Any]] = []
        with watched(language_model, before):  # in front of the hooks of the engine
            self.compress(0.5)
            with watched(language_model, behind):
                got = self.last(row)
        trace = mm.trace(model)
        str(mm.report(model))
        kept, place = (x[0].cpu() for x in (trace.call.groups[-1].source, trace.call.groups[-1].place))
        gone = torch.ones(len(visual), dtype=torch.bool).index_fill(0, kept, False).nonzero()[:, 0]
        self.check_budget(trace, visual, gone)
        generated = self.generate(row)
        if self.kind != "video":
            self.check_batch()
        mm.uncompress(model)
        self.unchanged("uncompress does not restore")

        # DeepStack levels come from an encoder that has merged
        levels = {name: value for name, value in before[0].items() if isinstance(value, list | tuple)}
        packed = behind[0]["inputs_embeds"]

        def given(embeds: Tensor) -> Tensor:
            mine = embeds[:, : len(kept)]
            same = (
                torch.ones(len(kept), dtype=torch.bool) if self.kind in ("input", "video", "audio") else ~visual[kept]
            )
            assert torch.equal(mine[:, same], packed[:, same]), "other embeddings enter the language model"
            return torch.cat([packed, embeds[:, len(kept) :]], 1)

        def reference(ids: Tensor) -> Tensor:
            inputs, more = extended(row, ids), torch.arange(len(visual), ids.shape[1])
            if self.kind == "layer":
                with masked(model, gone, 1):
                    return self.last(inputs)
            here = torch.cat([kept, more])
            with ExitStack() as stack:
                if looks_back(language_model.config):
                    stack.enter_context(seeing(model, self.layer_masks(inputs), torch.cat([place, more])))
                stack.enter_context(shortened(model, here, ids, self.start(trace), given, levels))
                return self.last(inputs)

        close(got, reference(ids), "prefill", 1e-4 if self.kind == "layer" else 0.0)
        if self.decodes:
            for step, logits in enumerate(generated.logits):
                wanted = reference(generated.sequences[:, : len(visual) + step])
                close(logits, wanted, f"step {step} of generate", LOOSE.get(self.name, 2e-4))
        if self.kind == "layer":
            patches = torch.cat([shown.span.patches for shown in trace.visuals])
            self.check_attention(patches, set(kept.tolist()) & set(patches.tolist()))

    def check_budget(self, trace: Any, visual: Tensor, gone: Tensor) -> None:
        tokens = [shown.tokens for shown in trace.visuals]
        assert self.kind == "video" or len(tokens) == 2, f"{len(tokens)} visuals for 2 pictures or sounds"
        structural = sum(len(shown.layout.structural) for shown in trace.visuals)
        assert sum(tokens) + structural == int(visual.sum()), "visuals do not add up"
        wanted = resolve(0.5, sum(tokens)) if self.kind == "layer" else sum(resolve(0.5, n) for n in tokens)
        assert bool(visual[gone].all()), "text is gone"
        assert len(gone) == sum(tokens) - wanted, f"{len(gone)} of {sum(tokens)} tokens are gone"

    def start(self, trace: Any) -> int | None:
        """The first of position ids that are numbered anew: where the plan does that, and they are a plain count."""
        if trace.plan.position_policy() != "reindex":
            return None
        if self.positions is None:
            return 0
        plain = self.positions.dim() == 2 and bool((self.positions.diff() == 1).all())
        return int(self.positions[0, 0]) if plain else None

    def steady(self) -> bool:
        """Whether the stock model decodes as it computes a longer prompt (PaliGemma reads prompts in both directions)."""
        found = self.generate(self.rows[-1])
        again = self.last(extended(self.rows[-1], found.sequences[:, :-1]))
        return bool((again - found.logits[-1]).abs().max() < 1e-2)

    def check_batch(self) -> None:
        """A padded batch does what its rows do alone."""
        alone, chosen, greedy = [], [], []
        for inputs in self.rows:
            alone.append(self.last(inputs))
            chosen.append(self.kept_of(0))
            greedy.append(self.generate(inputs).logits)
        together = self.last(self.batch)
        assert [self.kept_of(row) for row in range(len(chosen))] == chosen, "a padded batch keeps other tokens"
        if self.even:
            close(together, torch.cat(alone), "ragged batch", 1e-4)
            for step, logits in enumerate(self.generate(self.batch).logits):
                close(logits, torch.cat([row[step] for row in greedy]), f"step {step} of a ragged batch", 2e-4)

    def kept_of(self, row: int) -> list[list[int]]:
        """What the last layer sees of each visual of a row, in the last call."""
        return [shown.kept_cells(LAYERS - 1).tolist() for shown in mm.trace(self.model).visuals if shown.row == row]

    def check_attention(self, patches: Tensor, kept: set[int]) -> None:
        """FastV keeps the visual tokens that the last token attends to most in layer 0."""
        model = build(self.name, attention="eager")
        seen: list[Any] = []
        attention = adapter_for(model).language_model.layers[0].self_attn
        handle = attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
        model(**self.rows[-1])
        handle.remove()
        scores = seen[0][0, :, -1].mean(0)
        best = patches[scores[patches].topk(len(kept)).indices].tolist()
        mine, most = scores[sorted(kept)].sort().values, scores[best].sort().values  # equal ones: behind a window, say
        assert torch.equal(mine, most), f"{len(kept & set(best))} of the {len(kept)} most attended tokens are kept"


@torch.no_grad()
def judge(name: str, kind: str, shared: Shared | None = None) -> Outcome:
    """What a plan of the kind `kind` of PLANS does on the architecture `name`; shared: with other cases of it."""
    if kind == "audio" and "audio" not in getattr(transformers, CLASSES[name]).input_modalities:
        return Outcome("none", "no audio of which tokens could be dropped")
    case = Case(name, kind, shared=shared)
    if kind == "video" and not hasattr(base_of(case.model), "get_video_features"):
        return Outcome("none", "no videos")
    try:
        case.compress(0.5)
    except NotImplementedError as refusal:
        return Outcome("refused", str(refusal))
    mm.uncompress(case.model)
    try:
        case.prepare()
        case.check()
    except AssertionError as wrong:
        return Outcome("wrong", str(wrong))
    except Exception as error:
        return Outcome("crash", f"{type(error).__name__}: {error}")
    return Outcome("ok")


def judge_all(name: str, kinds: Iterable[str] = PLANS) -> dict[str, Outcome]:
    """What plans of all kinds do, one after the other on one model: what one leaves behind would show in the next."""
    shared: Shared = build(name), {}
    return {kind: judge(name, kind, shared) for kind in kinds}
