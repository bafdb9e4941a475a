# SPDX-License-Identifier: Apache-2.0
"""How much a language model's answer owes to each token of its prompt: attention weighted by its gradient, followed down."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from .cache import CACHE
from .call import Call
from .deepstack import NAMES
from .layers import Heads
from .probe import Form, Forms, states_of
from .shards import is_sharded

MODES = ("exact", "summed", "fast")
BLOCK = 128
"""Rows of attention that are made at a time."""
HALF_SCALE = 1024.0
"""What targets of float16 models are multiplied with, so that small gradients do not vanish."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the language model is given of B prompts that end in their last column.

    embeds [B, S, D]; positions [..., B or 1, S] or None; valid [B, S] or None for no padding; levels: keywords of DeepStack.
    """

    embeds: Tensor
    positions: Tensor | None = None
    valid: Tensor | None = None
    levels: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(given: dict[str, Any], valid: Tensor | None) -> Prompt:
        """From the keywords of the language model's call."""
        if valid is not None and not bool(valid[:, -1].all()):
            raise ValueError("prompts are padded on the right, and the answer would follow padding: pad on the left")
        levels = {name: given[name] for name in NAMES if given.get(name) is not None}
        return Prompt(given["inputs_embeds"], given.get("position_ids"), valid, levels)

    def plain(self) -> Prompt:
        """The same in tensors that autograd can save, also where inference_mode has made them."""

        def copied(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: copied(one) for name, one in x.items()}
            return x.detach().clone() if isinstance(x, Tensor) else [copied(one) for one in x]

        return Prompt(
            copied(self.embeds), None if self.positions is None else copied(self.positions),
            None if self.valid is None else copied(self.valid), {name: copied(x) for name, x in self.levels.items()},
        )  # fmt: skip

    @property
    def mask(self) -> Tensor:
        """[B, S] bool; never None: without mask and cache transformers takes gaps in positions for packed sequences."""
        if self.valid is not None:
            return self.valid.to(self.embeds.device).bool()
        return torch.ones(self.embeds.shape[:2], dtype=torch.bool, device=self.embeds.device)

    def behind(self, count: int, first: int = 0) -> dict[str, Tensor]:
        """Positions of `count` tokens behind the prompt, from the one of number `first` on."""
        if self.positions is None:
            last = torch.tensor([[self.embeds.shape[1] - 1]], device=self.embeds.device)
        else:
            last = self.positions[..., -1:]
        return {"position_ids": last + 1 + first + torch.arange(count, device=last.device)}

    def followed_by(self, new: Tensor) -> Prompt:
        """The prompt with embeddings [B, T, D] behind it."""
        count = new.shape[1]
        levels = {
            name: torch.cat([x, x.new_zeros(len(x), count, *x.shape[2:])], 1) if isinstance(x, Tensor) else x
            for name, x in self.levels.items()
        }
        positions = self.positions
        if positions is not None:
            positions = torch.cat([positions, self.behind(count)["position_ids"]], -1)
        valid = None if self.valid is None else F.pad(self.valid, (0, count), value=True)
        return Prompt(torch.cat([self.embeds, new.to(self.embeds)], 1), positions, valid, levels)

    def arguments(self) -> dict[str, Any]:
        """Keywords of the language model."""
        positions = {} if self.positions is None else {"position_ids": self.positions}
        return {"inputs_embeds": self.embeds, "attention_mask": self.mask, **positions, **self.levels}


@torch.no_grad()
def greedy_answers(language_model: Any, head: Any, prompt: Prompt, most: int, ends: Sequence[int]) -> list[list[int]]:
    """What the model answers greedily to each prompt, at most so many tokens, without those that end it."""
    cache, mask = DynamicCache(), prompt.mask
    out = language_model(**prompt.arguments(), use_cache=True, **{CACHE: cache})
    made: list[Tensor] = []
    ended = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    ending = torch.tensor(list(ends), dtype=torch.int64, device=mask.device)
    for step in range(most):
        token = head(out.last_hidden_state[:, -1]).argmax(-1).to(mask.device)
        ended = ended | torch.isin(token, ending)
        made.append(token.masked_fill(ended, -1))
        if step + 1 == most or bool(ended.all()):
            break
        embeds = language_model.get_input_embeddings()(token[:, None]).to(prompt.embeds)
        mask = F.pad(mask, (0, 1), value=True)
        more = prompt.behind(1, step)
        out = language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=True, **{CACHE: cache}, **more)
    return [[i for i in row if i >= 0] for row in torch.stack(made, 1).tolist()]


def check_relevance(forms: Forms, asked: object = "the relevance of an answer") -> None:
    """Raise NotImplementedError where attention cannot be followed."""
    if is_sharded(forms.language_model):
        raise NotImplementedError(
            f"{asked!s} runs the language model within a call of it, which fully_shard does not allow: compute it where one "
            f"process holds the whole model"
        )
    for index in range(len(forms.language_model.layers)):
        forms.of(index, asked, "out", "boundless")


def answer_relevance(
    forms: Forms, head: Any, prompt: Prompt, answers: Sequence[Sequence[int]], mode: str = "exact"
) -> Tensor:
    """Relevance of every token of prompt and answer for each answer token, where that is predicted: [B, T, S + T - 1] float32,
    zeros behind the end of a shorter answer.

    Teacher-forced: one forward pass on prompt and answer. "exact": for each token a backward pass from its logit, and a row that
    goes from the last layer to the first, r <- r + r C with C = mean over heads of relu(attention * gradient): attention and
    its gradient are made again in blocks of rows, in float32, so no map is stored. "summed" counts every hop once: the sum of C
    over all rows and layers, for a gradient holds already what later layers do, and the products of small C above all but hide
    what reaches the answer over a word of the question. "fast" is an approximation of "exact", not the same relevance: one
    backward pass from the summed log-probabilities, and the mean of the answer's rows; [B, 1, S + T - 1].

    Cost per token 4 S^2 D per layer beside the backward pass. Memory: activations of a training step, and five hidden states
    per layer. Raises NotImplementedError where attention has no gradient or is not as probed.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
    check_relevance(forms)
    language_model, depth = forms.language_model, len(forms.language_model.layers)
    lengths = [len(answer) for answer in answers]
    if len(answers) != len(prompt.embeds) or not max(lengths, default=0):
        longest = max(lengths, default=0)
        raise ValueError(f"{len(answers)} answers, the longest of {longest} tokens, to {len(prompt.embeds)} prompts")
    with torch.inference_mode(False), torch.enable_grad(), _frozen(language_model, head):
        prompt = prompt.plain()
        device, most, first = prompt.embeds.device, max(lengths), prompt.embeds.shape[1] - 1
        ids = torch.tensor([[*answer, *[0] * (most - len(answer))] for answer in answers], device=device)
        there = torch.arange(most, device=device) < torch.tensor(lengths, device=device)[:, None]
        new = language_model.get_input_embeddings()(ids[:, :-1]).detach()
        whole = prompt.followed_by(new)
        taps = [_Tap(forms.of(i, "the relevance of an answer", "boundless")) for i in range(depth)]
        handles = [handle for tap in taps for handle in tap.install()]
        try:
            leaf = Prompt(whole.embeds.requires_grad_(), whole.positions, whole.valid, whole.levels)
            states = language_model(**leaf.arguments(), use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        length = states.shape[1]
        logits = head(states[:, first : first + most]).float()
        chosen = logits.gather(2, ids.to(logits.device)[..., None])[..., 0]
        places = F.one_hot(torch.arange(first, first + most), length).float().to(device)
        here = there.float()
        if mode == "fast":
            chances = (chosen - logits.logsumexp(-1)) * here.to(chosen)
            rows = (here @ places) / here.sum(1, keepdim=True).clamp_min(1)
            return _followed(taps, chances.sum(), rows, whole.valid, first, length)[:, None]
        if mode == "summed":
            before = torch.arange(length, device=device) <= torch.arange(first, first + most, device=device)[:, None]
            places = (
                (before if whole.valid is None else before & whole.valid[:, None]).float().expand(len(here), -1, -1)
            )
        found = []
        for t in range(most):
            target = (chosen[:, t] * here[:, t].to(chosen)).sum()
            rows = here[:, t, None] * places[..., t, :]
            if mode == "summed":
                found.append(_followed(taps, target, rows, whole.valid, 0, first + t + 1, carry=False))
            else:
                found.append(_followed(taps, target, rows, whole.valid, first + t, first + t + 1))
        return torch.stack(found, 1)


def _followed(
    taps: Sequence[_Tap], target: Tensor, row: Tensor, valid: Tensor | None, first: int, end: int, carry: bool = True
) -> Tensor:
    """Rows [B, S] from the last layer to the first; in the last one only those from `first` on are not zero, and none behind
    `end`. Without `carry` every layer is given the same row, and what they make of it is added up."""
    scale = HALF_SCALE if taps[0].output is not None and taps[0].output.dtype == torch.float16 else 1.0
    try:
        outputs = [tap.output for tap in taps if tap.output is not None]
        gradients = torch.autograd.grad(target * scale, outputs, retain_graph=True)
    except RuntimeError as error:
        if "grad" not in str(error):
            raise
        raise NotImplementedError(
            f"the attention of this model cannot be differentiated ({error}): load it unquantised with attn_implementation='sdpa'"
        ) from error
    with torch.no_grad():
        total = row if carry else torch.zeros_like(row)
        for i in reversed(range(len(taps))):
            device = gradients[i].device
            given = (total if carry else row).to(device)
            total = total.to(device) + taps[i].weighted(
                given, gradients[i], scale, valid, first if i == len(taps) - 1 else 0, end
            )
    return total.cpu()


class _Tap:
    """Keeps what one attention module is given and what its heads make of it."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.heads: Heads | None = None
        self.output: Tensor | None = None

    def install(self) -> list[RemovableHandle]:
        assert self.form.out is not None
        attention = self.form.attention
        return [
            attention.register_forward_pre_hook(self._keep_given, with_kwargs=True),
            getattr(attention, self.form.out).register_forward_pre_hook(self._keep_output),
        ]

    def _keep_given(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden, *tables = (x.detach() for x in (states_of(args, kwargs), *(kwargs["position_embeddings"] or ())))
        given = Call(None, None, []), 0, False, kwargs.get("position_ids")
        self.heads = Heads(self.form, hidden, tuple(tables) or None, None, *given)

    def _keep_output(self, module: Any, args: tuple) -> None:
        self.output = args[0]

    @functools.cached_property
    def values(self) -> Tensor:
        """[B, kv_heads, S, dv] float32."""
        assert self.heads is not None
        return self.heads.project("v").float()

    def weighted(
        self, row: Tensor, gradient: Tensor, scale: float, valid: Tensor | None, first: int, end: int
    ) -> Tensor:
        """row [B, S] times C of this layer, from the gradient [B, S, heads * d] of what the heads gave."""
        assert self.heads is not None
        heads, values = self.heads, self.values
        heads.valid = valid
        change = gradient.unflatten(-1, (-1, values.shape[-1])).transpose(1, 2).float() / scale
        groups = change.shape[1] // values.shape[1]
        batch = torch.arange(len(row), device=row.device)[:, None]
        found = torch.zeros_like(row)
        for begin in range(first, end, BLOCK):
            at = torch.arange(begin, min(begin + BLOCK, end), device=row.device)
            weights = heads.attention_of(batch, at.expand(len(row), -1))
            part = change[:, :, at].unflatten(1, (-1, groups)).flatten(2, 3)  # the queries that share a key head
            slope = (part @ values.transpose(2, 3)).unflatten(2, (groups, -1)).flatten(1, 2)
            found += (row[:, None, at] @ (weights * slope).relu().mean(1))[:, 0]
        return found


@contextmanager
def _frozen(*modules: Any) -> Iterator[None]:
    """Parameters need no gradients meanwhile."""
    needing = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in needing:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needing:
            parameter.requires_grad_(True)
