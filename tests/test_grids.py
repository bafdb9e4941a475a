# SPDX-License-Identifier: Apache-2.0
"""Vision encoders of packed grids: merging against blocks run by hand, windows, several frames to a token, class tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmcompress.adapters import adapter_for
from mmcompress.adapters.grids import laid
from torch import Tensor
from transformers.models.qwen3_vl import modeling_qwen3_vl

import mmcompress as mm
from mmcompress.budget import exact_merge_schedule, resolve
from mmcompress.ops import bipartite_match
from mmcompress.runtime.probe import plainly_rotated
from mmcompress.runtime.rotary import ROTATIONS
from mmcompress.runtime.scope import ENCODE, Scope, enter, leave
from mmcompress.runtime.signals import VisionTap
from mmcompress.visuals import Layout

from .architectures import CLASSES, OLDEST, TABLE, base_of, build
from .test_towers import CASES, OTHERWISE, SIGNALS, arguments_of, eager, given, states

GRIDS = [name for name in SIGNALS if "image_grid_thw" in arguments_of(name)]
POOLED = ("ernie4_5_vl_moe", "kimi_k25")
"""A token of a video is made of several frames."""
WINDOWED = [
    name
    for name in ("exaone4_5", "hyperclovax_vision_v2", "muse_glimmer", "qwen2_5_omni_thinker", "qwen2_5_vl")
    if name in GRIDS
]
MERGING = [
    (n, what)
    for n, what in CASES
    if n in GRIDS and TABLE[n]["encoder"] == "ok" and not (n in POOLED and what == "videos")
]


class Calls:
    """What the blocks of a tower are given in a call: hidden states, keywords, and the shape that attention gets."""

    def __init__(self, adapter: Any) -> None:
        self.hidden: list[Tensor] = []
        self.keywords: list[dict[str, Any]] = []
        self.shapes: list[torch.Size] = []
        self.handles = [b.module.register_forward_pre_hook(self.look, with_kwargs=True) for b in adapter.blocks]
        self.handles += [b.attention.register_forward_pre_hook(self.shape, with_kwargs=True) for b in adapter.blocks]

    def look(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.hidden.append(args[0])
        self.keywords.append(kwargs)

    def shape(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.shapes.append((args[0] if args else kwargs["hidden_states"]).shape)

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


def attended(
    block: Any, rows: Tensor, keywords: dict[str, Any], at: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """What the attention module of a block makes of `rows` [T, C], which stand at the places `at` of the tower and see each
    other; and the mean of their keys over heads [T, d]."""
    given, keys = {n: None for n in keywords if n == "attention_mask"}, {}
    given["cu_seqlens"] = torch.tensor([0, len(rows)], dtype=torch.int32)
    if "position_embeddings" in keywords:
        given["position_embeddings"] = tuple(t.reshape(-1, t.shape[-1])[at] for t in keywords["position_embeddings"])
    handles = block.tap(keys.__setitem__)
    out = states(block.attention(rows.view(*shape[:-2], len(rows), -1), **given))
    for handle in handles:
        handle.remove()
    return out.reshape(len(rows), -1), keys["k"].reshape(len(rows), *keys["k"].shape[-2:]).mean(1)


def by_hand(adapter: Any, calls: Calls, order: Tensor, lengths: list[int]) -> Tensor:
    """Output of the last block [P, C], each patch as its cluster, with half of the units of each row of `lengths` units left:
    blocks run on the short sequence, whose parts attend to themselves one after the other. order: patches, unit after unit."""
    unit = len(order) // sum(lengths)
    x = calls.hidden[0].reshape(len(order), -1)[order].unflatten(0, (-1, unit))
    places, source, size = order.view(-1, unit), torch.arange(len(x)), torch.ones(len(x))
    plans = [exact_merge_schedule(n, resolve(0.5, n), len(adapter.blocks), 0) for n in lengths]
    for i, block in enumerate(adapter.blocks):
        part = torch.bucketize(places[:, 0].contiguous(), calls.keywords[i]["cu_seqlens"][1:], right=True)
        first = [int((source == n).nonzero()[0, 0]) for n in range(len(x))]
        normed, mixed, keys = block.first(x), torch.empty_like(x), [torch.empty(0)] * len(x)
        for p in part.unique():
            among = (part[first] == p).nonzero()[:, 0]
            at = places[first][among].flatten()
            out, k = attended(block, normed[among].flatten(0, 1), calls.keywords[i], at, calls.shapes[i])
            mixed[among] = out.unflatten(0, (-1, unit))
            for n, key in zip(among.tolist(), k.unflatten(0, (-1, unit)).mean(1), strict=True):
                keys[n] = key
        x, target, start, count = x + mixed, [], 0, 0
        for row, plan in zip(lengths, plans, strict=True):
            now = row - sum(plan[:i])
            match, left = bipartite_match(torch.stack(keys[start : start + now])[None], plan[i])
            target.append(match[0] + count)
            start, count = start + now, count + left
        goes = torch.cat(target)
        if adapter.windowed:  # what a window holds stays together
            starts = torch.stack([places[(goes[source] == n).nonzero()[0, 0], 0] for n in range(count)])
            goes = starts.argsort().argsort()[goes]
        table = F.one_hot(goes, count).float().T * size
        size, source = table.sum(1), goes[source]
        x = (table @ x.flatten(1) / size[:, None]).unflatten(1, (unit, -1))
        x = x + states(block.mlp(block.norm(x)))
    full = torch.empty(len(order), x.shape[-1])
    full[order] = x[source].flatten(0, 1)
    return full


@torch.no_grad()
@pytest.mark.parametrize("name, what", MERGING)
def test_merging_is_that_of_blocks_run_by_hand(name: str, what: str) -> None:
    if OLDEST and name in OTHERWISE:
        pytest.skip("transformers 5.17 encodes it in another form")
    model = build(name)
    adapter, (encode, _, arguments) = adapter_for(model), given(model, what)
    calls = Calls(adapter)
    encode(**arguments)
    calls.stop()
    patches = calls.hidden[0].shape[-2]
    order = adapter.order(patches, arguments)
    rows = calls.keywords[-1]["cu_seqlens"].diff() // adapter.unit_in(arguments)
    wanted = by_hand(adapter, calls, torch.arange(patches) if order is None else order, rows.tolist())
    seen: list[Tensor] = []
    mm.compress(model, "tome", keep=0.5)
    adapter.blocks[-1].module.register_forward_hook(lambda module, args, output: seen.append(states(output)))
    encoded = given(model, what)[0](**arguments).mmcompress
    torch.testing.assert_close(seen[0].reshape(wanted.shape), wanted, rtol=1e-3, atol=1e-4)
    assert [len(c.unique()) for c in encoded.clusters] == encoded.left
    assert sum(encoded.left) == sum(resolve(0.5, n) for n in rows.tolist())


@torch.no_grad()
@pytest.mark.parametrize("name", WINDOWED)
def test_signals_of_blocks_with_windows(name: str) -> None:
    """Attention of the first block, which looks at windows, against the module's own weights."""
    model = build(name)
    adapter, (encode, modality, arguments) = adapter_for(model), given(model, "uneven")
    assert adapter.windowed
    signals, layouts, weights = tapped(model, adapter, "received_attention@0", 0)
    assert max(calls_of(adapter, encode, arguments).keywords[0]["cu_seqlens"].diff()) < 64
    own = VisionTap(None, adapter, set(), None)._per_token(weights, arguments)
    wanted = adapter.arrange(adapter.encoded(modality, arguments, [v.tokens for v in layouts]), arguments, own[:, None])
    for found, value in zip(signals, wanted, strict=True):
        torch.testing.assert_close(found, value[:, 0], rtol=1e-4, atol=1e-7)


def calls_of(adapter: Any, encode: Any, arguments: dict[str, Any]) -> Calls:
    calls = Calls(adapter)
    encode(**arguments)
    calls.stop()
    return calls


def tapped(model: Any, adapter: Any, signal: str, block: int) -> tuple[list[Tensor], list[Layout], Tensor]:
    """A signal of the vision encoder by itself, for language models that take no stages too; layouts; and what each token
    receives in the eager attention of a block."""
    encode, modality, arguments = given(model, "uneven")
    owner, weights = object(), []
    tap = VisionTap(owner, adapter, {signal}, None)
    handles = tap.install()
    look = adapter.blocks[block].attention.register_forward_pre_hook(
        lambda module, args, kwargs: weights.append(eager(module, args, kwargs)), with_kwargs=True
    )
    enter(Scope(owner, ENCODE))
    try:
        features = adapter.features(encode(**arguments), arguments)
        encoded = adapter.encoded(modality, arguments, [f.numel() // f.shape[-1] for f in features])
        return tap.collect(encoded, arguments)[signal], encoded.layouts, weights[0]
    finally:
        leave(owner, ENCODE)
        for handle in (*handles, look):
            handle.remove()


@torch.no_grad()
def test_class_tokens_among_packed_patches() -> None:
    """Inkling 2: signals of patches alone; features go down the road; no merging."""
    model = build("inkling2")
    adapter, (encode, _, arguments) = adapter_for(model), given(model, "uneven")
    found, layouts, weights = tapped(model, adapter, "received_attention", 3)
    assert [layout.views[0].grid for layout in layouts] == [(4, 4), (2, 6)]
    per_unit = torch.cat([weights[1:65], weights[66:114]]).view(-1, 4).mean(1)
    torch.testing.assert_close(torch.cat(found), per_unit, rtol=1e-4, atol=1e-7)
    rows, _, _ = tapped(model, adapter, "encoder_features", 3)
    for mine, tokens in zip(rows, encode(**arguments).pooler_output, strict=True):
        torch.testing.assert_close(adapter.project(mine[None])[0], tokens)
    with pytest.raises(NotImplementedError, match=r"tome.*class token in front of each"):
        adapter.check_stage(mm.ToMe(keep=0.5))


@torch.no_grad()
@pytest.mark.parametrize("name", POOLED)
def test_tokens_of_several_frames_are_not_merged(name: str) -> None:
    if OLDEST and name in OTHERWISE:
        pytest.skip("transformers 5.17 encodes it in another form")
    model = mm.compress(build(name), "tome", keep=0.5)
    encode, _, arguments = given(model, "videos")
    with pytest.raises(NotImplementedError, match=r"several frames.*on='image'"):
        encode(**arguments)
    given(model)[0](**given(model)[2])
    mm.compress(model, "tome(keep=0.5, on='image')")
    assert given(model, "videos")[0](**arguments).mmcompress.clusters is None


@torch.no_grad()
@pytest.mark.parametrize("name", GRIDS)
def test_smaller_pictures(name: str) -> None:
    """The tower is given a quarter of the patches, or `compress` says why not; tokens of one origin are one cluster."""
    model = build(name)
    if TABLE[name]["input"] != "ok":
        return
    try:
        mm.compress(model, "downsample", keep=0.25)
    except NotImplementedError as refusal:
        assert "smaller pictures" in str(refusal)
        assert not getattr(base_of(model), "visual", None).__class__.__name__.startswith(("Qwen", "Glm"))
        return
    seen: list[int] = []
    adapter_for(model).blocks[0].module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2]))
    encode, _, arguments = given(model, "uneven")
    output = encode(**arguments)
    assert seen == [28]
    for tokens, clusters, left in zip(
        output.pooler_output, output.mmcompress.clusters, output.mmcompress.left, strict=True
    ):
        assert len(clusters.unique()) == left == len(tokens) // 4
        same = (tokens[:, None] - tokens[None]).abs().amax(-1) < 1e-6
        assert torch.equal(same, clusters[:, None] == clusters[None])


@torch.no_grad()
@pytest.mark.skipif("video_llama_3" not in CLASSES, reason="this transformers has no video_llama_3")
def test_merge_sizes_of_one_call() -> None:
    """Each picture may say its own to stages behind the encoder; those that look inside need one for all."""
    model = build("video_llama_3")
    arguments = given(model)[2] | {"image_merge_sizes": torch.tensor([1, 2])}
    mm.compress(model, "divprune", keep=0.5)
    encoded = given(model)[0](**arguments).mmcompress
    assert [layout.views[0].grid for layout in encoded.layouts] == [(8, 8), (4, 4)]
    mm.compress(model, "visionzip", keep=0.5)
    with pytest.raises(NotImplementedError, match="merge sizes 1, 2 in one call"):
        given(model)[0](**arguments)


@torch.no_grad()
def test_rotation_is_made_again_only_where_it_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    block = adapter_for(build("qwen3_vl")).blocks[0]
    assert plainly_rotated(block) and not block.heard
    turn = ROTATIONS[1:]
    monkeypatch.setattr(
        modeling_qwen3_vl,
        "apply_rotary_pos_emb_vision",
        lambda q, k, cos, sin: tuple(x * cos[:, None] + x.flip(-1) * sin[:, None] for x in (q, k)),
    )
    assert turn and not plainly_rotated(block)
    monkeypatch.undo()
    block.attention.scaling = 0.5
    assert not plainly_rotated(block)
    if "minimax_m3_vl" in CLASSES:
        assert adapter_for(build("minimax_m3_vl")).blocks[0].heard  # of each head, only some dimensions turn


def test_layouts_of_grids() -> None:
    assert laid(2, 3, 4, 24) == Layout.raster(2, 3, 4)
    assert laid(4, 3, 4, 24) == Layout.raster(2, 3, 4)
    assert laid(2, 2, 3, 16).structural == (3, 7, 11, 15)
    assert laid(1, 2, 3, 10).structural == (0, 4, 8, 9)
    assert laid(1, 2, 1, 4).structural == (1, 3)  # no more frames than there were
    for length in (11, 23):
        with pytest.raises(NotImplementedError, match=f"{length} features of 2 x 2 x 3 tokens"):
            laid(2, 2, 3, length)
