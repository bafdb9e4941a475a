# SPDX-License-Identifier: Apache-2.0
"""Explanations by gradients against whole attention maps and their gradients, as autograd gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmcompress as mm

from . import reference  # noqa: F401 - registers by_feature, by_hidden
from .families import FAMILIES, build
from .test_explain_maps import ANSWER, cells_of, prompt, scaled, with_answer


def relevance(logit: Tensor, attentions: tuple[Tensor, ...], cuts: dict[int, Tensor] | None = None) -> Tensor:
    """The whole R of Chefer et al.: R <- R + C R, with C from maps [1, heads, S, S] and their gradients."""
    gradients = torch.autograd.grad(logit, attentions, retain_graph=True)
    total = torch.eye(attentions[0].shape[-1])
    for i, (weights, gradient) in enumerate(zip(attentions, gradients, strict=True)):
        if cuts and i in cuts:
            total = total[cuts[i]]
        total = total + (weights[0] * gradient[0]).relu().mean(0).detach() @ total
    return total


def at(states: Tensor, model: Any, place: int, token: int) -> Tensor:
    return states[place] @ model.lm_head.weight[token]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_relevance_of_every_family(family: str) -> None:
    model = build(family)
    inputs = prompt(model, family)
    found = mm.gradient_relevance(model, None, inputs=inputs, answer=ANSWER, explain_question=True)
    only = mm.gradient_relevance(model, None, inputs=inputs, answer=ANSWER)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.set_attn_implementation("eager")
    out = model.model(**with_answer(inputs), output_attentions=True)
    length, asked = inputs["input_ids"].shape[1], len(found.tokens) - len(ANSWER)
    read = torch.tensor([*range(length - asked, length), *range(length - 1, length - 1 + len(ANSWER))])
    cells, values = torch.tensor(cells_of(found)), []
    for t, token in enumerate(found.tokens):
        place = int(read[t]) - (t < asked)  # where it is predicted
        values.append(relevance(at(out.last_hidden_state[0], model, place, token.id), out.attentions)[place])
    whole = torch.stack(values)
    expected = scaled(whole[:, cells], whole[:, read], asked)
    torch.testing.assert_close(found.maps, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(only.maps[asked:], found.maps[asked:])
    assert bool(only.maps[:asked].isnan().all()) and not only.explained(0) and only.explained(asked)


def test_gradient_relevance_goes_back_through_cuts() -> None:
    model = build("llava", attention="eager")
    inputs = prompt(model, "llava")
    mm.compress(model, "by_feature(keep=0.5) >> by_hidden(layer=2, keep=0.5)")
    found = mm.gradient_relevance(model, None, inputs=inputs, answer=[44])
    seen: list[Tensor] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda m, a, out: seen.append(out[1]))
        for layer in model.model.language_model.layers
    ]
    states = model.model(**inputs).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    groups = found.trace.call.groups
    total = relevance(at(states, model, -1, 44), tuple(seen), {2: groups[1].from_previous[0]})[-1]
    source, asked = groups[0].source[0].tolist(), len(found.tokens) - 1
    (visual,) = found.trace.visuals
    slots = torch.tensor([source.index(int(p)) if int(p) in source else -1 for p in visual.span.patches])
    values = total[slots].masked_fill(slots < 0, float("nan"))
    expected = scaled(values[None], total[None, -asked:], asked)[0]
    torch.testing.assert_close(found.maps[-1], expected, atol=1e-4, rtol=1e-3, equal_nan=True)
    assert found.coverage == 0.5


def test_a_question_token_behind_a_dropped_token_is_not_explained() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    with mm.compressed(model, "uniform(keep=3)"):
        for explain in (mm.gradient_relevance, mm.grad_cam):
            found = explain(model, None, inputs=inputs, answer=ANSWER, explain_question=True)
            (visual,) = found.trace.visuals
            last = 15 in visual.kept_cells().tolist()  # the question begins behind cell 15
            assert [found.explained(t) for t in range(len(found.tokens))] == [last] + [True] * (len(found.tokens) - 1)
            assert not last


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", ["", "by_feature(keep=0.5)"])
def test_grad_cam_of_every_family(family: str, plan: str) -> None:
    """A leaf made by hand in front of the language model, and one backward pass."""
    model = build(family)
    inputs = prompt(model, family)
    if plan:
        mm.compress(model, plan)
    found = mm.grad_cam(model, None, inputs=inputs, answer=ANSWER[:1])
    leaf: list[Tensor] = []

    def cut(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        leaf.append(kwargs["inputs_embeds"].detach().requires_grad_())
        return args, {**kwargs, "inputs_embeds": leaf[0]}

    handle = model.model.language_model.register_forward_pre_hook(cut, with_kwargs=True)
    logit = at(model.model(**inputs).last_hidden_state[0], model, -1, ANSWER[0])
    handle.remove()
    logit.backward()
    group = found.trace.call.groups[0]
    source = list(range(group.logical)) if group.source is None else group.source[0].tolist()
    places = cells_of(found)
    slots = torch.tensor([source.index(p) if p in source else -1 for p in places])
    there = slots >= 0
    gradient, features = leaf[0].grad[0, slots[there]], leaf[0].detach()[0, slots[there]]
    cam = (features @ gradient.mean(0)).relu()
    expected = torch.full((len(places),), float("nan"))
    expected[there] = (cam - cam.min()) / (cam.max() - cam.min()).clamp_min(1e-30)
    torch.testing.assert_close(found.maps[-1], expected, atol=1e-4, rtol=1e-3, equal_nan=True)
    assert there.float().mean() == (0.5 if plan else 1.0)


def test_half_precision_and_frozen_models_have_gradients_too() -> None:
    model = build("llava").requires_grad_(False)
    inputs = prompt(model, "llava")
    plain = mm.gradient_relevance(model, None, inputs=inputs, answer=ANSWER)
    half = build("llava", dtype=torch.bfloat16)
    rough = mm.gradient_relevance(half, None, inputs=inputs, answer=ANSWER)
    asked = len(plain.tokens) - len(ANSWER)
    both = torch.stack([plain.maps[asked:].flatten(), rough.maps[asked:].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("small", [0, 12])
def test_float16_gradients_do_not_vanish(small: int) -> None:
    """float16 holds nothing below 2^-24; targets are scaled on the way back, and the scale is taken out again."""
    whole, half = build("llava"), build("llava", dtype=torch.float16)
    for model in (whole, half):
        for part in (model.lm_head, model.model.language_model.norm):
            part.weight.data = part.weight.half().to(model.dtype) / 2**small
    inputs = prompt(whole, "llava")
    ask = {"inputs": inputs, "answer": ANSWER, "normalise": "visual"}
    plain, rough = (mm.gradient_relevance(model, None, **ask) for model in (whole, half))  # type: ignore[arg-type]
    asked = len(plain.tokens) - len(ANSWER)
    torch.testing.assert_close(rough.maps[asked:], plain.maps[asked:], atol=0.1, rtol=0)
    first = plain.maps[asked:].argmax(1)
    assert (rough.maps[asked:].gather(1, first[:, None]) > 0.9).all()
    values = [
        mm.gradient_relevance(model, None, inputs=inputs, answer=ANSWER).relevance[asked:] for model in (whole, half)
    ]
    torch.testing.assert_close(values[1], values[0], atol=0.02, rtol=0.05, equal_nan=True)


def test_plans_that_rewrite_attention_are_refused() -> None:
    model = build("llava", num_hidden_layers=6)
    inputs = prompt(model, "llava")
    mm.compress(model, "var_attention_sink(dims=(3, 5))")
    for explain in (mm.gradient_relevance, mm.attention_rollout, mm.last_attention):
        with pytest.raises(NotImplementedError, match="rewrites attention"):
            explain(model, None, inputs=inputs, answer=ANSWER)
    assert mm.token_activation_map(model, None, inputs=inputs, answer=ANSWER).coverage == 1.0
