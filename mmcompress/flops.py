# SPDX-License-Identifier: Apache-2.0
"""FLOPs (2 per multiply-add) of the decoder layers by the shapes of their modules, and of a whole prefill by torch's counter."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .kernels import coverage, diverse  # noqa: F401 - they define operators
from .kernels.dispatch import preferring
from .runtime.cache import cache_of, held_bytes

LLM, WHOLE = "LLM layers", "whole prefill, vision included"
"""What the two are called wherever they are shown."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ACTIVE = ("top_k", "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""What modules and configs call the number of experts that a token runs."""


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[-1]


def _max_min(x: Any, weight: Any = None, first: Any = None, ends: Any = None, *_: Any, **__: Any) -> int:
    """All pairs of each visual [U, N, D]; of packed rows [total, D], with `ends` [U + 1], as if all visuals were of one size."""
    return 2 * x[0] * x[1] ** 2 * x[2] if ends is None else 2 * x[0] ** 2 * x[1] // max(1, ends[0] - 1)


OPERATORS: dict[Any, Any] = {
    torch.ops.mmcompress.max_min: _max_min,
    torch.ops.mmcompress.greedy_map: lambda x, quality, k, *_, **__: x[0] * (2 * x[1] ** 2 * x[2] + k**2 * x[1]),
    torch.ops.mmcompress.soft_coverage: lambda y, x, *_, **__: 2 * x[0] * (x if y is None else y)[1] * x[1] * x[2],
    torch.ops.aten._grouped_mm: _grouped,
}
"""FLOPs of operators that torch's counter does not know, by the shapes of their tensors: ours as their naive implementation."""

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


@dataclass(frozen=True)
class LayerCost:
    """What one decoder layer costs, by the shapes of its modules.

    token    FLOPs per token: its matrices; of experts those that a token runs.
    pair     FLOPs per pair of query and key.
    missing  what could not be counted, in words.
    """

    token: int
    pair: int
    missing: tuple[str, ...] = ()

    def flops(self, tokens: int, past: int = 0) -> int:
        """Of `tokens` tokens behind `past` cached ones, all pairs counted (no causal discount)."""
        return self.token * tokens + self.pair * tokens * (tokens + past)


def layer_costs(language_model: Any) -> tuple[LayerCost, ...]:
    """The cost of each decoder layer of `language_model`, which holds them in `layers`."""
    return tuple(_cost(layer, language_model.config) for layer in language_model.layers)


def _cost(layer: nn.Module, config: Any) -> LayerCost:
    macs, pair, missing = 0.0, 0, list[str]()
    modules = list(layer.named_modules())
    stacks = [name for name, module in modules if _is_stack(module)]
    mixers = [(name, module) for name, module in modules if name and hasattr(module, "layer_idx")]
    attention = [(name, module) for name, module in mixers if hasattr(module, "is_causal")]
    for name, module in modules:
        part = _part_of_list(layer, name, config)
        if part is None or (name in stacks and (len(stacks) > 1 or _active(layer, name, config) is None)):
            missing.append(f"{name} (which experts a token runs)")
        elif _is_matrix(module):
            macs += part * module.in_features * module.out_features
        elif name in stacks:
            share = (_active(layer, name, config) or 0) / len(next(module.parameters(recurse=False)))
            macs += share * sum(weight.numel() for weight in module.parameters(recurse=False) if weight.dim() == 3)
        elif isinstance(module, CONVOLUTIONS):
            macs += part * module.weight.numel()
        else:
            tables = [weight.numel() for weight in module.parameters(recurse=False) if weight.dim() > 1]
            if tables and not any(hasattr(module, word) for word in ACTIVE):  # else the router of experts
                missing.append(f"{name} ({type(module).__name__})")
            else:
                macs += sum(tables)
    for name, module in mixers:
        heads = _heads(module, config) if (name, module) in attention else None
        if heads is not None:
            pair += 2 * heads[0] * (heads[1] + heads[2])
        elif any(name.startswith(f"{outer}.") for outer, _ in attention) or not _is_projections(module):
            missing.append(f"{name} ({type(module).__name__}) beyond its projections")
    return LayerCost(round(2 * macs), pair, tuple(missing))


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module is one matrix, packed or not; not a wrapper of some, such as LoRA's."""
    return (
        hasattr(module, "in_features")
        and hasattr(module, "out_features")
        and not any(hasattr(inner, "in_features") for inner in list(module.modules())[1:])
    )


def _is_stack(module: nn.Module) -> bool:
    """Whether a module holds the matrices of several experts in one tensor."""
    return not isinstance(module, CONVOLUTIONS) and any(w.dim() == 3 for w in module.parameters(recurse=False))


def _is_projections(module: nn.Module) -> bool:
    """Whether a module is matrices and norms alone (some number their MLPs, as if for a cache)."""
    own = (inner for inner in module.modules() if not _is_matrix(inner))
    return not any(
        name not in ("weight", "bias") or w.dim() > 1 for m in own for name, w in m.named_parameters(recurse=False)
    )


def _heads(attention: nn.Module, config: Any) -> tuple[int, int, int] | None:
    """Query heads of an attention module, and the widths of queries and values; None if it is something else."""
    width = getattr(attention, "head_dim", None)
    query, value = getattr(attention, "qk_head_dim", None) or width, getattr(attention, "v_head_dim", None) or width
    found = (getattr(attention, name, None) for name in ("num_heads", "num_attention_heads"))
    heads = next((n for n in found if isinstance(n, int)), getattr(config, "num_attention_heads", None))
    if not (isinstance(query, int) and isinstance(value, int) and isinstance(heads, int)):
        return None
    return heads, query, value


def _active(layer: nn.Module, name: str, config: Any) -> int | None:
    """How many of the experts in module `name` a token runs, as the block around them or the config says."""
    block = layer.get_submodule(name.rpartition(".")[0])
    for holder in (layer.get_submodule(name), block, *block.children(), config):
        for word in ACTIVE:
            if isinstance(getattr(holder, word, None), int):
                return int(getattr(holder, word))
    return None


def _part_of_list(layer: nn.Module, name: str, config: Any) -> float | None:
    """How much of a module's work a token asks for: less than 1 for an expert in a list of them; None: not known."""
    path = name.split(".")
    for i in range(len(path) - 1) if "experts" in name else ():
        inner = ".".join(path[: i + 1])
        experts = layer.get_submodule(inner)
        if path[i].endswith("experts") and isinstance(experts, nn.ModuleList):
            active = _active(layer, inner, config)
            return None if active is None else active / len(experts)
    return 1.0


@dataclass
class Counted:
    """FLOPs of a prefill as torch counts them: all, those before the language model, those of rotary tables; bytes of keys and
    values in the cache."""

    total: int = 0
    before: int = 0
    rotary: int = 0
    held: int = 0


class _Shapes(TorchDispatchMode):
    """Products of matrices give numbers of the right shape, whatever they are: what is counted need not be computed."""

    def __torch_dispatch__(self, operator: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        if operator not in PRODUCTS:
            return operator(*given, **(named or {}))
        a, b = given[-2:]
        rows, columns = (torch.linspace(0.1, 1, n, dtype=a.dtype, device=a.device) for n in (a.shape[-2], b.shape[-1]))
        return (rows[:, None] - columns).expand(*a.shape[:-1], -1).contiguous()


@torch.no_grad()
def counted(model: Any, inputs: Mapping[str, Any], language_model: Any, shapes: bool = False) -> Counted:
    """Run one prefill under torch's counter: vision, compression, language model, logits of the last position. Attention counts
    all pairs. shapes: no product is computed, for models whose prefill takes minutes; right where no budget depends on values."""
    found, starts = Counted(), list[int]()

    def now() -> int:
        return int(counter.get_total_flops())

    def enter(*_: Any) -> None:
        found.before = now()

    def rotary(*_: Any) -> None:
        starts.append(now())

    def rotated(*_: Any) -> None:
        found.rotary += now() - starts.pop()

    handles = [language_model.register_forward_pre_hook(enter, prepend=True)]
    tables = getattr(language_model, "rotary_emb", None)
    if tables is not None:
        handles += [tables.register_forward_pre_hook(rotary), tables.register_forward_hook(rotated)]
    try:
        with (
            _Shapes() if shapes else nullcontext(),
            FlopCounterMode(display=False, custom_mapping=OPERATORS) as counter,
            sdpa_kernel(SDPBackend.MATH),
            preferring("naive"),
        ):
            out = model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    found.total, found.held = now(), held_bytes(cache_of(out)).now
    return found
