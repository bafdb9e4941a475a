# SPDX-License-Identifier: Apache-2.0
"""What a plan asks of a model, checked when it is compressed: which signals serve which needs, and what cannot work."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ..plan import methods
from ..stage import MODALITIES, USUAL, ExitStage, InputStage, LayerStage, Need, Pipeline
from .adapter import CLS_FEATURES, PER_TOKEN, Adapter
from .clip import CLIP_PATCHES, CLIP_SIGNALS
from .layers import SIGNALS
from .masks import ATTENTION_OF
from .mass import way_of
from .probe import Forms
from .prompt import PROMPT_SIGNALS, check_prompt_signals
from .signals import kind_of
from .windows import SLIDING, windows_of

VISION_SIGNALS = frozenset({*PER_TOKEN, "encoder_features", *CLS_FEATURES, *CLIP_PATCHES})
TEXT_SIGNALS = ("text_embeddings",)
STATES = frozenset({"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"})
"""Kinds of layers that carry a state from token to token."""


def stateful(config: Any) -> set[int]:
    """Numbers of the layers of a language model that carry a state and do not attend."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return {index for index, kind in enumerate(kinds) if kind in STATES - ATTENTION_OF.keys()}


REFERENCE = "reference_sliding_attention"
"""Kind of layers that see all of the first call and so many of the tokens behind it: what is dropped is not among those."""


def names_of(needs: Iterable[Need]) -> list[str]:
    """All signals that may serve `needs`."""
    return [name for need in needs for name in ((need,) if isinstance(need, str) else need) if name]


def check_language_model(config: Any, plan: Pipeline) -> None:
    """Raise for layers in which tokens cannot be dropped."""
    kinds = kinds_of(config)
    inside = (*plan.layer_stages, *plan.exit_stages)
    if "chunked_attention" in kinds or (not kinds and getattr(config, "attention_chunk_size", None)):
        raise NotImplementedError(
            "the language model has layers of type chunked_attention, as only Llama 4 has: it does not run in stock transformers "
            "5.24 (its forward reads image_outputs of an output that has none), so what could be done with it could not be tried"
        )
    unknown = sorted(kind for kind in kinds - SLIDING if "sliding" in kind and (inside or kind != REFERENCE))
    if unknown:
        raise NotImplementedError(
            f"the language model has layers of type {', '.join(unknown)}: how far back they look is of a form that is not known"
            + (": only stages before the language model are supported" if unknown == [REFERENCE] else "")
        )
    if inside and getattr(config, "altup_num_inputs", None):
        raise NotImplementedError(
            f"{inside[0]!r}: the language model has several residual streams (AltUp), which are not cut: only stages before the "
            f"language model are supported"
        )
    if inside and "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise NotImplementedError(
            f"{inside[0]!r}: layers of the language model share keys and values with earlier ones, which hold other tokens behind "
            f"a cut: only stages before the language model are supported"
        )
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "sdpa", "eager") and any(windows_of(config)):
        raise NotImplementedError(
            f"the language model has layers that look back only so far, and attn_implementation={attention!r} counts for that the "
            f"tokens that are left: load the model with attn_implementation='sdpa'"
        )
    states = sorted(kinds & STATES)
    if states and inside:
        raise NotImplementedError(
            f"{inside[0]!r}: the language model has layers of type {', '.join(states)}, whose state cannot forget tokens: only "
            f"stages before the language model are supported"
        )
    if inside and has_indexers(config):
        raise NotImplementedError(
            f"{inside[0]!r}: the language model has indexers, which choose the tokens that a query sees: only stages before the "
            f"language model are supported"
        )


def sees_behind(language_model: Any) -> bool:
    """Whether tokens of a language model see those behind them (it is an encoder): by which masks its forward pass asks for."""
    names = inspect.unwrap(type(language_model).forward).__code__.co_names
    return any(name.startswith("create_bidirectional") for name in names)


def check_causal(language_model: Any, plan: Pipeline) -> None:
    """Raise for what reads or rewrites attention as that of a decoder, where tokens see those behind them."""
    inside = (*plan.layer_stages, *plan.exit_stages, *plan.attention_stages)
    asking = [stage for stage in plan.parts if any(kind_of(name) in PROMPT_SIGNALS for name in names_of(stage.needs))]
    if (inside or asking) and sees_behind(language_model):
        raise NotImplementedError(
            f"{(*inside, *asking)[0]!r} presumes that tokens see those before them only, but {type(language_model).__name__} is an "
            f"encoder, whose tokens see each other: choose a method that acts before the language model and reads features"
        )


def check_mass(forms: Forms, attending: Sequence[int], plan: Pipeline) -> str:
    """How masses come to attention in the layers `attending`, "mask" or "channel"; raises where they cannot."""
    language_model = forms.language_model
    config = language_model.config
    attention = getattr(config, "_attn_implementation", None)
    if sees_behind(language_model):
        raise NotImplementedError(
            f"{plan!r}: {type(language_model).__name__} is an encoder, whose masks are not those of a decoder, so merged tokens "
            f"cannot weigh what they stand for: use plan(..., mass=False)"
        )
    if has_indexers(config):
        raise NotImplementedError(
            f"{plan!r}: the language model has indexers, which choose the tokens that a query sees by scores of their own, so "
            f"merged tokens cannot weigh what they stand for: use plan(..., mass=False)"
        )
    if not attending:
        raise NotImplementedError(
            f"{plan!r}: no layer of the language model attends, and a layer that carries a state sees every token once, so merged "
            f"tokens cannot weigh what they stand for: use plan(..., mass=False)"
        )
    way = way_of(config, plan.mass)
    seen = set()
    for index in attending if way == "channel" else ():
        kind = forms.kind_of(index)
        if kind not in seen:
            forms.check_wide(index, plan, str(attention))
        seen.add(kind)
    return way


def kinds_of(config: Any) -> set[str]:
    """The kinds of layers of a language model."""
    return set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())


def has_indexers(config: Any) -> bool:
    """Whether parts of a language model choose the tokens that a query sees."""
    return "indexed_attention" in kinds_of(config) or any(name.startswith("index_") for name in vars(config))


def check_positions(adapter: Adapter, plan: Pipeline) -> None:
    """Raise where position ids cannot be numbered anew."""
    if plan.positions == "reindex" and not adapter.reindexes:
        raise NotImplementedError(f"positions='reindex' is not defined for {adapter.family}: use positions='keep'")


def _of_tower(adapter: Adapter) -> frozenset[str]:
    """Signals that are taken inside the vision encoder."""
    return PER_TOKEN | {"encoder_features"} if adapter.packed else PER_TOKEN | set(CLIP_PATCHES)


def check_modalities(adapter: Adapter, plan: Pipeline) -> None:
    """Raise for a stage that names what a model does not take, and for a plan with nothing to act on."""
    there = adapter.modalities
    for stage in plan.parts:
        if stage.on != USUAL and (missing := [m for m in stage.modalities if m not in there]):
            raise NotImplementedError(
                f"{stage!r}: {type(adapter.model).__name__} takes {' and '.join(there)}, and no {' or '.join(missing)} of which "
                f"tokens could be dropped"
            )
    if not plan.modalities.intersection(there):
        raise NotImplementedError(
            f"{plan!r} acts on {' and '.join(m for m in MODALITIES if m in plan.modalities)}, and "
            f"{type(adapter.model).__name__} takes {' and '.join(there)}: name it, as in divprune(keep=0.25, on={there[0]!r})"
        )


def _serving(need: Need, there: Collection[str]) -> str | None:
    """The first signal of a need that is there, None if it can do without; "" if there is none."""
    names = (need,) if isinstance(need, str) else need
    return next((name for name in names if name is None or kind_of(name) in there), "")


def _of_features(there: Collection[str]) -> str:
    """The input stages that with their defaults need no more than the signals `there`."""
    stages = {name: cls() for name, cls in methods().items() if issubclass(cls, InputStage)}
    return ", ".join(
        name for name, stage in stages.items() if "" not in (_serving(need, there) for need in stage.needs)
    )


def resolve_needs(adapter: Adapter, forms: Forms, plan: Pipeline, clip: bool) -> dict[str, str]:
    """The signal that serves each need of each stage; raises if there is none, and where `forms` cannot give it."""
    found: dict[str, str] = {}
    pairs = [(stage, m) for stage in plan.parts for m in adapter.modalities if m in stage.modalities]
    for stage, modality in pairs:
        inside, heard = isinstance(stage, LayerStage | ExitStage), modality == "audio"
        of_encoder = set() if heard else adapter.signals
        there = set(SIGNALS) if inside else {*of_encoder, *TEXT_SIGNALS, *PROMPT_SIGNALS}
        if clip and not inside and not heard:
            there |= CLIP_SIGNALS
        if not any(modality in before.modalities for before in plan.input_stages):
            there.discard("input_scores")
        for need in stage.needs:
            names = (need,) if isinstance(need, str) else need
            name = _serving(need, there)
            if name == "" and heard and not inside:
                raise NotImplementedError(
                    f"{stage!r} needs {' or '.join(map(str, names))}, which only a vision encoder gives; for audio choose one of: "
                    f"{_of_features(there)}"
                )
            if name == "":
                hint = "; give clip=, the CLIP of its vision tower" if kind_of(str(names[0])) in CLIP_SIGNALS else ""
                raise NotImplementedError(
                    f"{stage!r} needs {' or '.join(map(str, names))}, which this model cannot give{hint} "
                    f"({adapter.lacks or adapter.family}; it has {', '.join(sorted(there))})"
                )
            if (
                name is not None
                and kind_of(name) == "answer_relevance"
                and adapter.model.get_output_embeddings() is None
            ):
                raise NotImplementedError(
                    f"{stage!r} reads what matters to the answer of the model, but a {type(adapter.model).__name__} has no "
                    f"language model head and gives none: compress the model with its head"
                )
            if name is not None and plan.pixel_stages and kind_of(name) in _of_tower(adapter):
                raise NotImplementedError(
                    f"{stage!r} reads {name} of the vision encoder, which {plan.pixel_stages[0]!r} gives smaller "
                    f"pictures: there is no such signal for the tokens as they were; choose a method that reads features"
                )
            if name is not None:
                key = str(names[0])
                found[key if found.get(key, name) == name else f"{key} of {modality}"] = name
                check_prompt_signals(forms, {kind_of(name)}, repr(stage))
    return found
