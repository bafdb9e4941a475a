# SPDX-License-Identifier: Apache-2.0
"""Whether a plan on an architecture is exact: equal to the stock model on what is kept, or refused by `compress`.

The reference is the stock model whose language model is given everything gathered at the kept places, whatever it is: masks
of any form, positions, keywords (input and encoder stages); or whose layers see no key of a dropped token (layer stages).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmcompress.adapters import adapter_for
from torch import Tensor

import mmcompress as mm
from mmcompress.budget import resolve

from .architectures import IMAGE, VIDEO, base_of, build, prompts

PLANS = {
    "input": "divprune(keep={})",
    "video": "divprune(keep={})",
    "layer": "fastv(layer=1, keep={})",
    "signal": "visionzip(keep={})",
    "encoder": "tome(keep={})",
}
"""One plan for each kind of stage, and for signals of the vision encoder; and what an input stage does to a video."""
ROW: list[int | str] = [4, "1", 2, "2", 6]
RAGGED: list[list[int | str]] = [[5, "3", 4], ROW]
FILM: list[int | str] = [4, "v1", 6]
STEPS = 4


@dataclass
class Outcome:
    """What a plan did: "ok", "refused" (by compress), "wrong" or "crash"; and what was said."""

    verdict: str
    said: str = ""

    def __str__(self) -> str:
        return self.verdict if not self.said else f"{self.verdict}: {self.said}"


def visual_in(ids: Tensor) -> Tensor:
    return (ids == IMAGE) | (ids == VIDEO)


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
    language_model, length, visual = adapter_for(model).language_model, ids.shape[1], visual_in(ids)[0]

    def pre(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        assert not args and kwargs["inputs_embeds"].shape[1] == length
        kwargs = {name: gathered(value, kept, length, visual) for name, value in {**kwargs, **instead}.items()}
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


class Case:
    """One architecture and one kind of stage."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind
        self.model = build(name)
        self.language_model: Any = None

    def plan(self, keep: float) -> str:
        return PLANS[self.kind].format(keep)

    @functools.cached_property
    def stock(self) -> dict[str, Any]:
        """Inputs of one row and of a ragged batch, and what the stock model makes of them."""
        samples = [FILM] if self.kind == "video" else RAGGED
        found: dict[str, Any] = {}
        try:
            found |= self.of(samples, 2)
        except (RuntimeError, StopIteration, ValueError):  # frames of a video in one run
            found |= self.of(samples, 1)
        seen: list[dict[str, Any]] = []
        with watched(adapter_for(self.model).language_model, seen):
            self.model(**found["row"])
        found["seen"] = seen[0]
        return found

    def of(self, samples: list[list[int | str]], runs: int) -> dict[str, Any]:
        last = len(samples) - 1
        found: dict[str, Any] = {"row": prompts(self.model, samples[last:], first=last, runs=runs)}
        found["alone"] = prompts(self.model, samples[:1], runs=runs)
        found["batch"] = prompts(self.model, samples, runs=runs)
        found["logits"] = {name: self.model(**found[name]).logits for name in ("row", "batch")}
        return found

    def check(self) -> None:
        """Raises AssertionError with the first thing that is wrong."""
        model, stock = self.model, self.stock
        row, ids = stock["row"], stock["row"]["input_ids"]
        assert torch.isfinite(stock["logits"]["row"][:, -1]).all(), "stock is not finite"
        mm.compress(model, self.plan(1.0))
        for name in ("row", "batch"):
            assert torch.equal(model(**stock[name]).logits, stock["logits"][name]), f"keep=1.0 changes the {name}"
        seen: list[dict[str, Any]] = []
        mm.uncompress(model)
        entered: list[dict[str, Any]] = []
        with watched(adapter_for(model).language_model, entered):  # in front of the hooks of the engine
            mm.compress(model, self.plan(0.5))
            with watched(adapter_for(model).language_model, seen):
                got = model(**row, use_cache=False).logits[:, -1]
        trace = mm.trace(model)
        str(mm.report(model))
        visual = visual_in(ids)[0]
        if self.kind != "video":
            assert len(trace.visuals) == 2, f"{len(trace.visuals)} visuals for 2 pictures"
        assert sum(v.tokens + len(v.layout.structural) for v in trace.visuals) == int(visual.sum()), (
            "visuals do not add up"
        )
        group = trace.call.groups[-1]
        kept = group.source[0].cpu()
        gone = torch.ones(ids.shape[1], dtype=torch.bool).index_fill(0, kept, False).nonzero()[:, 0]
        tokens = [visual.tokens for visual in trace.visuals]
        wanted = resolve(0.5, sum(tokens)) if self.kind == "layer" else sum(resolve(0.5, n) for n in tokens)
        assert bool(visual[gone].all()) and len(gone) == sum(tokens) - wanted, (
            f"{len(gone)} of {tokens} tokens are gone"
        )
        generated = self.generate(row)
        policy = trace.plan.position_policy()
        plain = stock["seen"].get("position_ids")
        plain = torch.arange(ids.shape[1])[None] if plain is None else plain
        plain = plain if plain.dim() == 2 and bool((plain.diff() == 1).all()) else None
        self.check_batch()
        mm.uncompress(model)
        for name in ("row", "batch"):
            assert torch.equal(model(**stock[name]).logits, stock["logits"][name]), "uncompress does not restore"

        # DeepStack levels come from an encoder that has merged
        levels = {name: value for name, value in entered[0].items() if isinstance(value, list | tuple)}
        start = int(plain[0, 0]) if policy == "reindex" and plain is not None and self.kind != "layer" else None
        packed = seen[0]["inputs_embeds"]

        def given(embeds: Tensor) -> Tensor:
            if self.kind in ("input", "video"):
                assert torch.equal(embeds, packed), "other embeddings enter the language model"
                return embeds
            assert torch.equal(embeds[:, ~visual[kept]], packed[:, ~visual[kept]]), (
                "other text enters the language model"
            )
            return packed

        def reference(ids: Tensor) -> Tensor:
            more = torch.arange(row["input_ids"].shape[1], ids.shape[1])
            inputs = extended(row, ids)
            if self.kind == "layer":
                with masked(model, gone, 1):
                    return model(**inputs, use_cache=False).logits[:, -1]

            def grown(embeds: Tensor) -> Tensor:
                return torch.cat([given(embeds[:, : len(kept)]), embeds[:, len(kept) :]], 1)

            with shortened(model, torch.cat([kept, more]), ids, start, grown, levels):
                return model(**inputs, use_cache=False).logits[:, -1]

        close(got, reference(ids), "prefill", 1e-4 if self.kind == "layer" else 0.0)
        for step, logits in enumerate(generated.logits):
            close(logits, reference(generated.sequences[:, : ids.shape[1] + step]), f"step {step} of generate", 2e-4)
        if self.kind == "layer":
            patches = torch.cat([visual.span.patches for visual in trace.visuals])
            self.check_attention(patches, set(kept.tolist()) & set(patches.tolist()))

    def check_batch(self) -> None:
        """A padded batch does what its rows do alone."""
        logits, chosen, greedy = [], [], []
        for name in ("alone", "row"):
            logits.append(self.model(**self.stock[name], use_cache=False).logits[0, -1])
            chosen.append(self.kept_of(mm.trace(self.model), 0))
            greedy.append(self.generate(self.stock[name]).logits)
        batch = self.model(**self.stock["batch"], use_cache=False).logits[:, -1]
        rows = range(len(batch))
        together = [self.kept_of(mm.trace(self.model), row) for row in rows]
        assert together == chosen[-len(batch) :], "a padded batch keeps other tokens than its rows alone"
        stock = self.stock["logits"]
        if float((stock["batch"][-1, -1] - stock["row"][0, -1]).abs().max()) > 1e-3:
            return  # hunyuan_vl counts pictures over all rows
        close(batch, torch.stack(logits[-len(batch) :]), "ragged batch", 1e-4)
        for step, got in enumerate(self.generate(self.stock["batch"]).logits):
            close(
                got, torch.cat([alone[step] for alone in greedy[-len(batch) :]]), f"step {step} of a ragged batch", 2e-4
            )

    def generate(self, inputs: dict[str, Any]) -> Any:
        return self.model.generate(
            **inputs, do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=[IMAGE, VIDEO],
        )  # fmt: skip

    def kept_of(self, trace: Any, row: int) -> list[list[int]]:
        return [visual.kept_cells(3).tolist() for visual in trace.visuals if visual.row == row]

    def check_attention(self, patches: Tensor, kept: set[int]) -> None:
        """FastV keeps the visual tokens that the last token attends to most in layer 0."""
        model = build(self.name, attention="eager")
        seen: list[Any] = []
        attention = adapter_for(model).language_model.layers[0].self_attn
        handle = attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
        model(**self.stock["row"])
        handle.remove()
        scores = seen[0][0, :, -1].mean(0)
        best = patches[scores[patches].topk(len(kept)).indices].tolist()
        assert kept == set(best), f"{len(kept & set(best))} of the {len(kept)} most attended tokens are kept"


@torch.no_grad()
def judge(name: str, kind: str) -> Outcome:
    """What a plan of the kind `kind` of PLANS does on the architecture `name`."""
    case = Case(name, kind)
    if kind == "video" and not hasattr(base_of(case.model), "get_video_features"):
        return Outcome("none", "no videos")
    try:
        mm.compress(case.model, case.plan(0.5))
    except NotImplementedError as refusal:
        return Outcome("refused", str(refusal))
    except Exception as error:
        return Outcome("crash", f"compress: {type(error).__name__}: {error}")
    mm.uncompress(case.model)
    try:
        _ = case.stock
    except Exception as error:
        return Outcome("crash", f"stock: {type(error).__name__}: {error}")
    try:
        case.check()
    except AssertionError as wrong:
        return Outcome("wrong", str(wrong))
    except Exception as error:
        return Outcome("crash", f"{type(error).__name__}: {error}")
    return Outcome("ok")
