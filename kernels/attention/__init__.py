# SPDX-License-Identifier: Apache-2.0
"""What queries give and keys receive of attention, without the attention map.

softmax(q k^T scale) of N queries on N keys has N^2 cells per head; these functions only ever hold a block of them. They work on
detached inputs: nothing here has a gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose
from ..ragged import check_segments

REDUCE = ("mean", "sum", "max")
WIDEST = 512
"""Heads wider than this are left to blocked torch: tiles of them do not fit the shared memory of a GPU."""


def attention_received(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    reduce: str = "mean",
    query_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    causal: bool = False,
    offset: int | None = None,
    at: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    per_head: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """Attention that each key receives, over the queries that count: [n, S] float32, mean over heads.

    q             [n, heads, Q, d], k [n, kv_heads, S, d], floating (float64 is taken as float32), any strides; heads a multiple
                  of kv_heads, head h reads kv head h // (heads / kv_heads). Logits and sums are float32.
    reduce        over queries: "mean", "sum" or "max".
    query_weight  [n or 1, Q] or [n or 1, heads or 1, Q]: bool, which queries count, or float >= 0, by how much ("mean" divides by
                  the sum; "max" takes bool only). What does not count is not read and may hold anything.
    key_mask      [n, S] bool: keys that are there; others are not read and receive 0.
    key_bias      [n, S] floating, added to the logits; -inf (or anything below -1e29) hides a key.
    causal        query i sees the keys up to i + offset, by default offset = S - Q (the last query sees all). `at` [n, Q] int64
                  instead: the last key that each query sees, for rows picked out of a longer sequence.
    cu_seqlens    [segments + 1] int32 or int64, from 0 on: tokens cu[i] to cu[i + 1] are a sequence of their own (n = 1, as many
                  queries as keys; segments may be empty; tokens behind the last give and receive 0). "mean" is over the
                  queries of the key's own segment. Blocked torch reads it on the host: on an accelerator that waits.
    per_head      [n, heads, S] instead of the mean over heads.

    A query that sees no key gives 0 and does not count. Cost 2 heads Q S d and an exponential per cell (Triton: twice; causal:
    half), memory O(n heads (Q + S)) and a block; "naive" holds the map [n, heads, Q, S].
    """
    _check(q, k)
    (n, heads, queries, _), keys = q.shape, k.shape[2]
    if reduce not in REDUCE:
        raise ValueError(f"reduce={reduce!r}: choose among {', '.join(REDUCE)}")
    if query_weight is not None:
        if query_weight.dim() == 2:
            query_weight = query_weight[:, None]
        _check_shape("query_weight", query_weight, (n, heads, queries), last=1)
        if reduce == "max" and query_weight.dtype != torch.bool:
            raise ValueError(
                f"reduce='max' with query_weight of type {query_weight.dtype}: pass which queries count (bool)"
            )
    if key_mask is not None:
        _check_shape("key_mask", key_mask, (n, keys), last=2)
        if key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask of type {key_mask.dtype}: it has to be bool; pass additive masks as key_bias")
    if key_bias is not None:
        _check_shape("key_bias", key_bias, (n, keys), last=2)
        if not key_bias.is_floating_point():
            raise TypeError(
                f"key_bias of type {key_bias.dtype}: it is added to the logits; pass what is visible as key_mask"
            )
    if (offset is not None or at is not None) and not causal:
        raise ValueError("offset and at say where causal attention ends: pass causal=True, or leave them out")
    if offset is not None and at is not None:
        raise ValueError("offset and at both say where causal attention ends: pass one of them")
    if at is not None:
        _check_shape("at", at, (n, queries), last=2)
    if cu_seqlens is not None and (n != 1 or queries != keys or at is not None or cu_seqlens.dim() != 1):
        raise ValueError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} with n={n}, {queries} queries, {keys} keys{' and at' * (at is not None)}: "
            f"packed sequences are one row [1, heads, T, d] with as many queries as keys; for picked rows call once per segment"
        )
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        check_segments("cu_seqlens", cu_seqlens, k[0, 0])
    if causal and at is None and offset is None:
        offset = keys - queries
    found = _call(
        "received", implementation, q, k, float(scale), reduce, query_weight, key_mask, key_bias, at, offset, cu_seqlens
    )
    return found if per_head else found.mean(1)


def attention_flow(
    q: Tensor,
    k: Tensor,
    scale: float,
    share: Tensor,
    steps: int,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """What tokens have after what they had, `share` [n, heads, S] >= 0, went along attention from queries to keys `steps` times:
    [n, heads, S] float32.

    As so many calls of `attention_received` with reduce="sum" and per_head=True, of as many queries as keys; blocked torch makes a
    map that fits into a block once.
    """
    _check(q, k)
    _check_shape("share", share, (*q.shape[:2], k.shape[2]), last=3)
    if choose(implementation, q) == "blocked" and not torch.compiler.is_compiling():
        offset = 0 if causal else None
        found: Tensor = _call("flow", implementation, q, k, float(scale), share, key_mask, offset, steps)
        return found
    for _ in range(steps):
        share = attention_received(
            q, k, scale, reduce="sum", query_weight=share, key_mask=key_mask, causal=causal, per_head=True,
            implementation=implementation,
        )  # fmt: skip
    return share


def attention_received_from(
    q: Tensor, k: Tensor, scale: float, who: Callable[[Tensor], Tensor], *, implementation: str = "auto"
) -> Tensor:
    """Attention that each key receives from the queries that `who` picks, mean over these and over heads: [n, S] float32.

    who: what each key receives from all queries, [n, S] -> which of them count, [n, Q] bool. As two calls of `attention_received`;
    blocked torch makes a map that fits into a block once.
    """
    _check(q, k)
    if choose(implementation, q) == "blocked" and not torch.compiler.is_compiling():
        found: Tensor = _call("received_from", implementation, q, k, float(scale), who)
        return found.mean(1)
    asked = who(attention_received(q, k, scale, implementation=implementation))
    return attention_received(q, k, scale, query_weight=asked, implementation=implementation)


def attention_marginals(
    q: Tensor, k: Tensor, scale: float, prefix: int = 0, *, per_head: bool = False, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention that keys receive (mean over queries) and that queries give (sum over keys), of the keys from `prefix` on:
    [n, S - prefix] and [n, Q] float32, means over heads.

    q, k as in `attention_received`; the softmax runs over all keys. Blocked torch makes both in one pass. per_head: [n, heads,
    S - prefix] and [n, heads, Q].
    """
    _check(q, k)
    if not 0 <= prefix <= k.shape[2]:
        raise ValueError(f"prefix={prefix}: there are {k.shape[2]} keys")
    received, given = _call("marginals", implementation, q, k, float(scale), prefix)
    return (received, given) if per_head else (received.mean(1), given.mean(1))


def attention_rows(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None, *, implementation: str = "auto"
) -> Tensor:
    """Softmax attention of single or few queries (CLS, last token, instruction), [n, heads, Q, S] float32.

    q, k as in `attention_received`; mask, broadcastable to [n, heads, Q, S]: bool (True = visible) or added to the logits. Rows
    that see nothing are 0. Keys that are hidden from all rows may hold anything. Cost 2 heads Q S d, memory that of the output.
    """
    _check(q, k)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        _check_shape("mask", mask, (*q.shape[:3], k.shape[2]), last=0)
    found: Tensor = _call("rows", implementation, q, k, float(scale), mask)
    return found


def _check(q: Tensor, k: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or len(q) != len(k) or q.shape[3] != k.shape[3] or not k.shape[1] or not q.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)}: they have to be [n, heads, Q, d] and [n, kv_heads, S, d]"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads and {k.shape[1]} key heads: the first has to be a multiple of the second"
        )
    if not q.is_floating_point() or not k.is_floating_point() or q.device != k.device:
        raise TypeError(
            f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}: give floating-point tensors on one device"
        )


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], last: int) -> None:
    """The last `last` axes have to be as in `shape`, those before may also be 1."""
    fits = x.dim() == len(shape) and all(
        have == want or (have == 1 and i < len(shape) - last)
        for i, (have, want) in enumerate(zip(x.shape, shape, strict=False))
    )
    if not fits:
        raise ValueError(f"{name} of shape {tuple(x.shape)}: expected {shape}")


def _call(name: str, implementation: str, q: Tensor, k: Tensor, *arguments: Any) -> Any:
    chosen = choose(implementation, q)
    if chosen == "triton" and implementation == "auto" and q.shape[3] > WIDEST:
        chosen = "blocked"
    kind = q.dtype if q.dtype == k.dtype else torch.promote_types(q.dtype, k.dtype)
    kind = torch.float32 if kind == torch.float64 else kind
    q, k = q.to(kind), k.to(kind)
    given = [a.detach() if isinstance(a, Tensor) and a.requires_grad else a for a in (q, k, *arguments)]
    if chosen == "triton" or torch.compiler.is_compiling():
        return getattr(torch.ops.mmcompress, f"attention_{name}")(*given, chosen)
    return _run(name, chosen, *given)


def _run(name: str, chosen: str, *arguments: Any) -> Any:
    module = importlib.import_module(f".{chosen}", __name__)
    with torch.autocast(arguments[0].device.type, enabled=False):  # which would multiply in half precision
        return getattr(module, f"attention_{name}")(*arguments)


@torch.library.custom_op("mmcompress::attention_received", mutates_args=())
def _received(
    q: Tensor,
    k: Tensor,
    scale: float,
    reduce: str,
    weight: Tensor | None,
    key_mask: Tensor | None,
    key_bias: Tensor | None,
    at: Tensor | None,
    offset: int | None,
    cu_seqlens: Tensor | None,
    chosen: str,
) -> Tensor:
    found: Tensor = _run("received", chosen, q, k, scale, reduce, weight, key_mask, key_bias, at, offset, cu_seqlens)
    return found


@_received.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], k.shape[2], dtype=torch.float32)


@torch.library.custom_op("mmcompress::attention_marginals", mutates_args=())
def _marginals(q: Tensor, k: Tensor, scale: float, prefix: int, chosen: str) -> tuple[Tensor, Tensor]:
    received, given = _run("marginals", chosen, q, k, scale, prefix)
    return received.contiguous(), given.contiguous()


@_marginals.register_fake
def _(q: Tensor, k: Tensor, scale: float, prefix: int, chosen: str) -> tuple[Tensor, Tensor]:
    made = {"dtype": torch.float32}
    return q.new_empty(*q.shape[:2], k.shape[2] - prefix, **made), q.new_empty(*q.shape[:3], **made)


@torch.library.custom_op("mmcompress::attention_rows", mutates_args=())
def _rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, chosen: str) -> Tensor:
    found: Tensor = _run("rows", chosen, q, k, scale, mask)
    return found


@_rows.register_fake
def _(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, chosen: str) -> Tensor:
    return q.new_empty(*q.shape[:3], k.shape[2], dtype=torch.float32)
