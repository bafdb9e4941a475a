# SPDX-License-Identifier: Apache-2.0
"""Explanations by gradients: gradient-weighted attention relevance, and Grad-CAM on what the projector gives."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import Unpack

from ..runtime.adapter import Adapter
from ..runtime.layers import Heads
from ..runtime.probe import Form, Forms
from .attention import BLOCK, back_through_cut, check_normalise, on_cells, refuse_rewriting
from .cells import slots_of
from .result import Explanation
from .session import Asked, Session, session
from .tam import jointly_scaled
from .taps import AttentionTap, StatesTap, VocabularyHead, attention_block, here

HALF_SCALE = 1024.0
"""What targets of float16 models are multiplied with, so that small gradients do not vanish."""


def gradient_relevance(
    model: Any,
    processor: Any,
    visuals: Any = None,
    question: str = "",
    *,
    normalise: str = "joint",
    explain_question: bool = False,
    **asked: Unpack[Asked],
) -> Explanation:
    """Attention weighted by the gradient of each answer token's logit, followed down to the inputs: r <- r + r C from the last
    layer to the first, with C = mean over heads of relu(attention * gradient).

    Chefer et al., "Generic Attention-model Explainability", ICCV 2021, arXiv 2103.15679, as Lei et al., arXiv 2506.01097, use it on
    visual tokens (no normalisation of C). Arguments as in `token_activation_map` and `last_attention`. explain_question: question
    tokens too, at the place before each one (where that is still there). Compressed models as in `attention_rollout`.

    The gradient of an attention weight is that of the heads' output times the value, so any attention implementation will do, and
    no map is stored. Cost: one answer, one more prefill with its activations kept, and for each token a backward pass and all
    attention once more. Memory: activations of a training step, and four hidden states per token and layer. Raises what
    `last_attention` raises, and NotImplementedError for language models whose heads cannot be told from their output.
    """
    check_normalise(normalise)
    with session(model, processor, visuals, question, **asked) as s:
        refuse_rewriting(s)
        depth = len(s.adapter.language_model.layers)
        forms = Forms(s.adapter.language_model, s.adapter.model)
        outs = {i: forms.of(i, "gradient relevance", "out", "boundless") for i in range(depth)}
        attention, graph, states = AttentionTap(range(depth), forms), GraphTap(outs), StatesTap()
        with differentiated(s, attention, graph, states):
            assert s.trace is not None
            groups = s.trace.call.groups
            layers = [(heads := attention.heads(i), graph.values(i, heads)) for i in range(depth)]
            values = torch.full((len(s.text_ids), layers[0][0].hidden.shape[1]), float("nan"))
            for token, place, logit in wanted(s, states.states(), explain_question):
                grads = graph.gradients(logit)
                row = F.one_hot(s.slots([place], groups[-1]), attention.length(depth - 1)).float()
                for i in reversed(range(depth)):
                    row = row.to(grads[i].device)
                    row = back_through_cut(row + weighted(row, *layers[i], grads[i]), groups, i)
                values[token] = row[0].cpu()
            rows = s.rows(0)
            maps, relevance = on_cells(s, values, groups[0], rows, s.slots(s.text_places, groups[0]), normalise)
            maps = maps.masked_fill(values[:, :1].isnan(), float("nan"))
        options = {"normalise": normalise, "explain_question": explain_question}
        return s.explanation("gradient relevance", options, maps, relevance, rows)


def grad_cam(
    model: Any,
    processor: Any,
    visuals: Any = None,
    question: str = "",
    *,
    explain_question: bool = False,
    **asked: Unpack[Asked],
) -> Explanation:
    """Grad-CAM on the projector's output: channels weighted by the mean gradient of each answer token's logit over the visual
    tokens, then relu.

    Selvaraju et al., "Grad-CAM", ICCV 2017, arXiv 1610.02391. Features are the visual tokens as they enter the language model, in a
    compressed model those that are left; of all pictures together. Arguments as in `token_activation_map`; explain_question as in
    `gradient_relevance`. Every map is scaled by itself to 0..1. Cost: one answer, one more prefill with its activations kept, and a
    backward pass for each token. DeepStack levels of Qwen3-VL are no part of the features.
    """
    with session(model, processor, visuals, question, **asked) as s:
        graph, states = GraphTap({}), StatesTap()
        with differentiated(s, graph, states):
            assert s.trace is not None and graph.leaf is not None
            rows, group = s.rows(0), s.trace.call.groups[0]
            slots = slots_of(torch.cat(rows), group)
            visual = slots_of(torch.cat([v.span.patches for v in s.visuals]), group)
            visual = visual[visual >= 0].to(graph.leaf.device)
            features = graph.leaf.detach()[0, visual].float()
            cam = torch.full((len(s.text_ids), group.physical), float("nan"))
            for token, _, logit in wanted(s, states.states(), explain_question):
                (gradient,) = torch.autograd.grad(logit, [graph.leaf], retain_graph=True)
                weights = gradient[0, visual].float().mean(0)
                cam[token] = torch.zeros(group.physical).scatter(0, visual.cpu(), (features @ weights).relu().cpu())
        none = torch.full((len(cam), len(cam)), float("nan"))
        maps, relevance = jointly_scaled(cam[:, slots.clamp_min(0)], none, slots >= 0)
        maps = maps.masked_fill(cam[:, :1].isnan(), float("nan"))
        return s.explanation("Grad-CAM", {"explain_question": explain_question}, maps, relevance, rows)


def weighted(row: Tensor, heads: Any, values: Tensor, gradient: Tensor) -> Tensor:
    """row [1, S] times C of a layer: values [S, heads, d], and gradient [S, heads, d] of what the heads gave."""
    found = torch.zeros_like(row)
    for first in range(0, row.shape[1], BLOCK):
        last = min(first + BLOCK, row.shape[1])
        change = torch.einsum("qhd,shd->hqs", gradient[first:last], values)
        found += row[:, first:last] @ (attention_block(heads, first, last) * change).relu().mean(0)
    return found


class GraphTap:
    """Makes what enters the language model a leaf of the graph, and keeps what the heads of some layers give, and their values."""

    def __init__(self, forms: Mapping[int, Form]) -> None:
        self.forms, self.layers = forms, list(forms)
        self.leaf: Tensor | None = None
        self.outputs: dict[int, list[Tensor]] = {i: [] for i in self.layers}
        self.width = 0

    def install(self, adapter: Adapter) -> list[RemovableHandle]:
        model = adapter.language_model
        handles = [model.register_forward_pre_hook(here(self._cut), with_kwargs=True)]
        for i, form in self.forms.items():
            assert form.out is not None
            out = getattr(form.attention, form.out)
            handles.append(out.register_forward_pre_hook(here(functools.partial(self._output, i))))
        return handles

    def _cut(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if self.leaf is not None:
            return None
        self.leaf = kwargs["inputs_embeds"].detach().requires_grad_()
        return args, {**kwargs, "inputs_embeds": self.leaf}

    def _output(self, index: int, module: Any, args: tuple) -> None:
        self.outputs[index].append(args[0])

    @torch.no_grad()
    def values(self, index: int, heads: Heads) -> Tensor:
        """[S, heads, d] float32, repeated for grouped queries."""
        values = heads.project("v")[0].transpose(0, 1).float()
        self.width = values.shape[-1]
        count = self.outputs[index][0].shape[-1] // self.width
        return values.repeat_interleave(count // values.shape[1], dim=1)

    def gradients(self, logit: Tensor) -> list[Tensor]:
        """Gradient of `logit` by what the heads of each layer gave, [S, heads, d] float32."""
        flat = [part for i in self.layers for part in self.outputs[i]]
        scale = HALF_SCALE if flat[0].dtype == torch.float16 else 1.0
        found = iter(torch.autograd.grad(logit * scale, flat, retain_graph=True, allow_unused=True))
        result = []
        for i in self.layers:
            parts = [torch.zeros_like(part) if (g := next(found)) is None else g for part in self.outputs[i]]
            result.append(torch.cat(parts, 1)[0].unflatten(-1, (-1, self.width)).float() / scale)
        return result


def wanted(s: Session, states: Tensor, explain_question: bool) -> Iterator[tuple[int, int, Tensor]]:
    """(number of the token, place where it is predicted, its logit there) of every token to explain; a question token behind a
    visual token that was dropped is predicted nowhere."""
    assert s.trace is not None
    head, last = VocabularyHead(s.adapter.model), s.trace.call.groups[-1]
    for token, (place, number) in enumerate(zip(s.text_places, s.text_ids, strict=True)):
        if token < s.questions:
            place -= 1
            if not explain_question or place < 0 or int(s.slots([place], last)) < 0:
                continue
        yield token, place, head.logits(states[place : place + 1], [number])[0, 0]


@contextmanager
def differentiated(s: Session, *taps: Any) -> Iterator[None]:
    """Run a session twice: for the answer, then with a graph behind the taps. Parameters need no gradients meanwhile."""
    if s.answer is None:
        s.run()
    needing = [p for p in s.adapter.model.parameters() if p.requires_grad]
    for parameter in needing:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            s.run(*taps)
            yield
    finally:
        for parameter in needing:
            parameter.requires_grad_(True)
