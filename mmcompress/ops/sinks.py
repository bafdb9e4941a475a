# SPDX-License-Identifier: Apache-2.0
"""Attention sinks: tokens that soak up attention whatever is asked, known by huge values in a few hidden dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TINY = 1e-6

SINK_DIMS: dict[tuple[str, int, int], tuple[int, ...]] = {
    ("llama", 4096, 11008): (1415, 2533),  # LLaMA-2-7B, Vicuna: LLaVA-1.5-7B
    ("llama", 5120, 13824): (2100, 4743),  # LLaMA-2-13B
    ("qwen2_vl_text", 3584, 18944): (458, 2570),  # Qwen2-VL-7B
    ("internlm2", 4096, 14336): (3584,),  # InternVL2-8B
}
"""Known sink dimensions by type, hidden size and MLP size of the language model, from which they come; tuning for pictures
leaves them."""


def check_dims(dims: Any) -> tuple[int, ...] | None:
    """The option `dims` of a method as a tuple, None where it is not given; raises ValueError for anything else."""
    if dims is None:
        return None
    found = tuple(dims) if isinstance(dims, (tuple, list)) else ()
    if not found or any(type(d) is not int or d < 0 for d in found) or len(set(found)) < len(found):
        raise ValueError(
            f"dims={dims!r}: give the numbers of the sink dimensions as a tuple, like (1415, 2533), or None"
        )
    return found


def sink_dims(config: Any, dims: tuple[int, ...] | None) -> tuple[int, ...]:
    """`dims`, or the known ones for a language model with this config. Raises NotImplementedError if there are none."""
    size = config.hidden_size
    if dims is not None:
        if max(dims) >= size:
            raise ValueError(
                f"dims={dims!r}: the hidden states of the language model have the dimensions 0 to {size - 1}"
            )
        return dims
    kind = (config.model_type, size, getattr(config, "intermediate_size", 0))
    found = next((known for key, known in SINK_DIMS.items() if key == kind), None)  # kind may hold a list: no key
    if found is None:
        raise NotImplementedError(
            f"the sink dimensions of this language model (type {kind[0]!r}, hidden size {size}, MLP {kind[2]}) are not known: "
            f"find them with mm.find_sink_dims(model, inputs) on a few prompts and give them as dims="
        )
    return found


def outlying(hidden: Tensor) -> Tensor:
    """|x_d| / rms(x) of hidden states [..., D], float32."""
    hidden = hidden.float()
    return hidden.abs() * (hidden.square().mean(-1, keepdim=True) + TINY).rsqrt()


def sink_magnitude(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """phi: the largest |x_d| / rms(x) of hidden states [..., D] over the sink dimensions `dims`, [...] float32."""
    if max(dims) >= hidden.shape[-1]:
        raise ValueError(
            f"sink dimension {max(dims)} of states with {hidden.shape[-1]} numbers: give those of this model"
        )
    scale = (hidden.float().square().mean(-1) + TINY).rsqrt()
    return torch.stack([hidden[..., d] for d in dims], -1).float().abs().amax(-1) * scale


def find_sinks(hidden: Tensor, dims: tuple[int, ...], tau: float) -> Tensor:
    """Which tokens are sinks, [...] bool: those with phi above `tau`."""
    return sink_magnitude(hidden, dims) > tau


def looks_at_image(mass: Tensor, on_sinks: Tensor, count: Tensor, rho: float, image_mass: float) -> Tensor:
    """Which heads really look at the image (any shape, bool): they give it at least `image_mass`, of which a part of at least
    `rho` goes to tokens that are no sinks.

    mass, on_sinks: attention on all `count` visual tokens, and on the sinks among them.
    """
    return (mass >= image_mass) & (on_sinks / (mass + count * TINY) <= 1 - rho)


def image_centric(weights: Tensor, visual: Tensor, sinks: Tensor, rho: float, image_mass: float) -> Tensor:
    """Which (head, row) pairs of softmax attention [B, heads, Q, K] really look at the image, [B, heads, Q] bool.

    visual, sinks [B, K] bool: which columns hold visual tokens, and sinks of any kind. None where no visual token is a sink.
    """
    both = visual & sinks
    mass, on_sinks = ((weights * mask[:, None, None]).sum(-1) for mask in (visual, both))
    found = looks_at_image(mass, on_sinks, visual.sum(1)[:, None, None], rho, image_mass) & (mass > on_sinks)
    return found & both.any(1)[:, None, None]


def redistribute(weights: Tensor, visual: Tensor, sinks: Tensor, chosen: Tensor, p: float) -> Tensor:
    """Move the part `p` of the attention on sinks to visual tokens that are none, in the proportions they have, where `chosen`.

    Shapes as in `image_centric`; chosen [B, heads, Q] bool. Rows keep their sum. Sinks are those of text too.
    """
    sinks, others = sinks[:, None, None], (visual & ~sinks)[:, None, None]
    budget = p * (weights * sinks).sum(-1, keepdim=True)
    clear = weights * others
    share = clear / clear.sum(-1, keepdim=True).clamp_min(torch.finfo(clear.dtype).tiny)
    return torch.where(chosen[..., None], weights - p * weights * sinks + budget * share, weights)


def without_columns(weights: Tensor, out: Tensor) -> Tensor:
    """Attention on visual tokens [U, heads, T, N] without the columns `out` [U, N], each row (what falls on text included) brought
    back to the sum 1."""
    left = 1 - (weights * out[:, None, None]).sum(-1, keepdim=True)
    return weights.masked_fill(out[:, None, None], 0.0) / left.clamp_min(TINY)


def of_image_heads(weights: Tensor, sinks: Tensor, rho: float, image_mass: float) -> Tensor:
    """Attention on visual tokens [U, heads, T, N] scaled so that its mean over heads is that over the heads which really look at
    the image; 0 in a row without such heads, and unchanged for a sample without any, or without sinks [U, N]."""
    mass, on_sinks = weights.sum(-1), (weights * sinks[:, None, None]).sum(-1)
    count = torch.full_like(mass, weights.shape[-1])
    chosen = looks_at_image(mass, on_sinks, count, rho, image_mass) & sinks.any(1)[:, None, None]
    chosen = chosen | ~chosen.flatten(1).any(1)[:, None, None]
    share = chosen / chosen.sum(1, keepdim=True).clamp_min(1)
    return weights * (share * share.shape[1])[..., None]
