# SPDX-License-Identifier: Apache-2.0
"""What a session listens to: last hidden states, and the inputs of attention modules."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..runtime.adapter import Adapter
from ..runtime.call import Call
from ..runtime.layers import Heads
from ..runtime.probe import Form, Forms, states_of

ROWS = 1024
"""Rows of hidden states that are converted to float32 at a time."""
WIDE = 16
"""Rows whose logits of the whole vocabulary are made at a time."""


def here(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that hears calls of this thread alone: others may run the model meanwhile."""
    mine = threading.get_ident()

    def heard(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == mine else None

    return heard


class StatesTap:
    """Last hidden states behind the final norm, at the places of prompt and answer: [N + A - 1, D]. A dropped token has zeros."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def install(self, adapter: Adapter) -> list[RemovableHandle]:
        self.parts = []
        return [adapter.language_model.register_forward_hook(here(self._record))]

    def _record(self, module: Any, args: tuple, output: Any) -> None:
        self.parts.append(output.last_hidden_state[0])

    def states(self) -> Tensor:
        return torch.cat([self.parts[0], *(part.to(self.parts[0].device) for part in self.parts[1:])])


class AttentionTap:
    """What enters the attention modules of some layers, for all tokens that came by; `heads(i)` recomputes attention from it.

    Memory: one hidden state per token and layer, in the model's type.
    """

    def __init__(self, layers: Sequence[int], forms: Forms | None = None) -> None:
        self.layers, self.forms = list(layers), forms
        self.seen: dict[int, list[tuple[Tensor, ...]]] = {}
        self.places: dict[int, list[Tensor]] = {}
        self.form: dict[int, Form] = {}

    def install(self, adapter: Adapter) -> list[RemovableHandle]:
        handles, forms = [], self.forms or Forms(adapter.language_model, adapter.model)
        self.seen, self.places = {i: [] for i in self.layers}, {i: [] for i in self.layers}
        for i in self.layers:
            self.form[i] = form = forms.of(i, "this explanation", "boundless")
            hook = here(functools.partial(self._record, i))
            handles.append(form.attention.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def _record(self, index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.seen[index].append(tuple(x.detach() for x in (states_of(args, kwargs), *kwargs["position_embeddings"])))
        if isinstance(kwargs.get("position_ids"), Tensor):
            self.places[index].append(kwargs["position_ids"])

    def length(self, index: int) -> int:
        """S, how many tokens that layer has, generated ones included."""
        return sum(parts[0].shape[1] for parts in self.seen[index])

    def heads(self, index: int) -> Heads:
        """Queries and keys of a layer for the S tokens that it has, generated ones last."""
        hidden, cos, sin = (torch.cat(parts, 1) for parts in zip(*self.seen[index], strict=True))
        places = torch.cat(self.places[index], -1) if self.places[index] else None
        if places is not None and places.shape[-1] != hidden.shape[1]:
            places = None
        return Heads(self.form[index], hidden, (cos, sin), None, Call(None, None, []), index, False, places)


def attention_block(heads: Heads, first: int, last: int) -> Tensor:
    """Softmax attention of the rows from `first` to before `last`, [heads, rows, S] float32."""
    device = heads.hidden.device
    at = torch.arange(first, last, device=device)[None]
    return heads.attention_of(torch.zeros(1, 1, dtype=torch.int64, device=device), at)[0]


class VocabularyHead:
    """Logits of chosen classes only: the rows of the head's weight are gathered, never are all logits made for all tokens."""

    def __init__(self, model: Any) -> None:
        self.module: Any = model.get_output_embeddings()
        config = model.config.get_text_config()
        self.cap = getattr(config, "final_logit_softcapping", None)

    def logits(self, states: Tensor, classes: Sequence[int]) -> Tensor:
        """states [R, D], classes: C of the vocabulary -> [R, C] float32. Where the head is no plain linear layer (LoRA, quantised,
        offloaded) it is called on a few rows at a time."""
        weight: Any = getattr(self.module, "weight", None)
        plain = type(self.module) is nn.Linear and weight.is_floating_point() and not weight.is_meta
        if not plain:
            parts = [self.every(rows)[:, list(classes)] for rows in states.split(WIDE)]
            return torch.cat(parts)
        index = torch.tensor(list(classes), device=weight.device)
        chosen = weight[index].float().T
        found = torch.cat([rows.to(weight.device).float() @ chosen for rows in states.split(ROWS)])
        if self.module.bias is not None:
            found = found + self.module.bias[index].float()
        return self._capped(found)

    def every(self, states: Tensor) -> Tensor:
        """All logits of a few rows [r, D]: [r, V] float32."""
        return self._capped(self.module(states).float())

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def likely(
        self, states: Tensor, ids: Sequence[int | None], count: int
    ) -> list[tuple[float | None, tuple[tuple[int, float], ...]]]:
        """For each row [R, D] the probability of its next token `ids` (None where it is not asked for), and the `count` likeliest
        tokens with the softmax over just these."""
        found: list[tuple[float | None, tuple[tuple[int, float], ...]]] = []
        for rows, wanted in zip(states.split(WIDE), _split(ids, WIDE), strict=True):
            logits = self.every(rows)
            best, which = logits.topk(min(count, logits.shape[1]), dim=1)
            chances = best.softmax(1).tolist()
            index = torch.tensor([i or 0 for i in wanted], device=logits.device)[:, None]
            chance = (logits.gather(1, index)[:, 0] - logits.logsumexp(1)).exp().tolist()
            for i, p, tokens, parts in zip(wanted, chance, which.tolist(), chances, strict=True):
                found.append((None if i is None else p, tuple(zip(tokens, parts, strict=True))))
        return found


def _split(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
