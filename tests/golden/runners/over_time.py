# SPDX-License-Identifier: Apache-2.0
"""fastvid, holitom, framefusion, llava_scissor, prunevid, flashvid: tokens of videos merged over time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from mmcompress.kernels.match import match
from torch import Tensor

import mmcompress as mm
from mmcompress.methods.framefusion import needed
from mmcompress.ops.connected import Connected
from mmcompress.ops.groups import best_of_groups
from mmcompress.ops.links import as_one, linked
from mmcompress.ops.runs import longest_runs
from mmcompress.ops.segments import Places, likeness, of_segment, segments
from mmcompress.ops.still import Still, unchanged
from mmcompress.ops.ties import largest
from mmcompress.ops.trees import bounded, joins, roots

from ..form import Arrays, Results, mask_of, runner, visuals


def lying(x: Tensor) -> tuple[mm.Visuals, Places]:
    """Tokens [T, N, D] as one video."""
    frames, tokens, _ = x.shape
    shown = mm.Visuals(x.flatten(0, 1)[None], mm.Layout.raster(frames, 1, tokens), 1)
    return shown, Places.of(shown)


def in_prompt(keep: Tensor, tokens: int, prefix: int, suffix: int) -> Tensor:
    """Places of the kept ones of `tokens` tokens and of all text."""
    return torch.cat([torch.arange(prefix), prefix + keep, prefix + tokens + torch.arange(suffix)])


def lengths(numbers: Tensor) -> Tensor:
    """How often each number comes, in order."""
    return torch.unique_consecutive(numbers, return_counts=True)[1]


@runner("fastvid")
def fastvid(arrays: Arrays, params: dict[str, Any]) -> Results:
    shown, at = lying(arrays["feats"])
    score = arrays["attention"].flatten()[None]
    sizes = torch.full((1, at.frames), at.most)
    text = len(arrays["prefix"]), len(arrays["suffix"])
    for name in ("ov", "qwen"):
        given = params[name]
        stage = mm.FastVID(
            segments=given["c"], tau=given["tau"], context=given["d"], step=given["p"], beta=given["beta"],
            loop=name == "qwen", ignore=given.get("ignore"),
        )  # fmt: skip
        budget = torch.full_like(sizes, int(at.most * given["retention_ratio"]))
        similar = likeness((arrays["global_feats"] if name == "ov" else arrays["feats"].mean(1))[None])
        segment = segments(similar, stage.segments, stage.tau)
        yield f"{name}_segment_sizes", lengths(segment[0])
        if name == "ov":  # each frame for itself, and anchors rounded down
            context = (budget * stage.context).long()
            here = stage.anchor_frames(stage.leaders(similar, segment), segment)
            salient, context = (
                budget - context,
                here * (of_segment(context, segment) // of_segment(here.long(), segment)),
            )
            yield "ov_transition_similarity", similar[0]
            yield "ov_frame_context", context[0].int()
        else:
            salient, context = stage.counts_of(budget, similar, segment, sizes)
        first, anchor = stage.chosen(shown.features, score, at, salient, context)
        if name == "ov":
            order = score.view(at.frames, -1).sort(dim=1, descending=True, stable=True).indices
            most = int(salient[0, 0])
            index = torch.stack([frame[first[0, i * at.most + frame]] for i, frame in enumerate(order)])
            yield "ov_salient_index", index[:, :most]
            density = stage.density(shown.features, first, at)[0].exp()
            yield "ov_density_score", density[~first[0]].view(at.frames, -1)
        k = int((first | anchor).sum())
        chosen = stage.merged(shown.features, at, segment, first, anchor, k, k)
        yield f"{name}_keep", in_prompt(chosen.keep[0], at.tokens, *text)
        yield f"{name}_output", torch.cat([arrays["prefix"], shown.take(chosen).features[0], arrays["suffix"]])


def in_groups(keep: Tensor, still: Still, window: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Number of the window of each kept token, and the order of the reference in it: still tokens, then frame by frame."""
    group = still.group[0, keep]
    number = (window.diff(dim=1, prepend=window[:, :1]) != 0).long().cumsum(1)[0, group % frames]
    return number, 2 * frames * number + group


@runner("holitom")
def holitom(arrays: Arrays, params: dict[str, Any]) -> Results:
    shown, at = lying(arrays["feats"])
    stage = mm.HoliTomMerge(params["retain_ratio"], params["tau"], params["beta"], params["max_window"])
    yield "adjacent_similarity", unchanged(shown.features, at, stage.tau)[0][0]
    window, saved, still = stage.windows(shown.features, at)
    first = window[0].unique()
    yield "windows", torch.stack([first, torch.cat([first[1:], torch.tensor([at.frames])]) - 1], 1)
    yield "total_reduced", saved[0].double()
    left = (at.tokens - saved[0].double()) / at.tokens
    ratio = min(1.0, params["retain_ratio"] / float(left))
    yield "adjusted_ratio", torch.tensor(ratio, dtype=torch.float64)
    sizes = still.sizes()
    yield "static_counts", sizes[0, first]
    part = sizes.double() * ratio  # each group is rounded by itself
    counts = torch.cat([part[:, : at.frames].round(), part[:, at.frames :].ceil()], 1).long()
    counts[:, -1] = 0
    k = int(counts.sum())
    chosen = stage.merged(still, at, arrays["attention"].flatten()[None], counts, k)
    rows, keep = shown.take(chosen).features[0], chosen.keep[0]
    number, place = in_groups(keep, still, window, at.frames)
    order = place.sort(stable=True).indices
    yield "default_tokens_per_window", number.bincount(minlength=len(first))
    yield "default_output", rows[order]
    if "grid_output" in arrays:  # raster order, and a newline after every row that has a token
        side = params["side"]
        row = keep // side
        ends = torch.cat([row.diff() != 0, torch.tensor([True])])
        made = [
            part for i, end in enumerate(ends) for part in (rows[i : i + 1], arrays["newline"][None])[: 1 + int(end)]
        ]
        yield "grid_output", torch.cat(made)
        yield (
            "grid_tokens_per_window",
            number.bincount(minlength=len(first)) + number[ends].bincount(minlength=len(first)),
        )
    inner, hidden = params["inner"], arrays["inner_hidden"]
    start, length = inner["image_start"], inner["image_length"]
    image = slice(start, start + length)
    attention = arrays["inner_last_query_attention"].mean(0)[None, image]
    k = round(length * (1 - inner["r"]))
    seen = visuals(hidden[None, image], k, last_attention=attention)
    cut = mm.HoliTomInner(keep=k).select(seen)
    yield "inner_keep", in_prompt(cut.keep[0], length, start, len(hidden) - start - length)
    yield "inner_output", torch.cat([hidden[:start], seen.take(cut).features[0], hidden[start + length :]])


@runner("prunevid")
def prunevid(arrays: Arrays, params: dict[str, Any]) -> Results:
    yield "refine_out", longest_runs(arrays["refine_in"])
    shown, at = lying(arrays["feats"])
    stage = mm.PruneVidMerge(1.0, params["tau"], params["temporal_segment_ratio"])
    labels = stage.labels(shown.features, at)
    window = stage.window(labels)
    yield "cluster_label", labels[0]
    yield "refined_label", longest_runs(labels)[0]
    yield "window_sizes", lengths(window[0])
    still = stage.still(shown.features, at, window)
    sizes = still.sizes()
    small = sizes < params["min_tokens_to_cluster"]
    counts = torch.where(small, sizes, (sizes * params["cluster_ratio"]).long())
    counts[:, -1] = 0
    k, density = int(counts.sum()), stage.density(still, at)
    chosen = stage.merged(still, at, density, counts, k)
    keep = chosen.keep[0]
    number, place = in_groups(keep, still, window, at.frames)
    group = still.group[0, keep]
    moving, windows = group >= at.frames, len(window[0].unique())
    yield "static_sizes", number[~moving].bincount(minlength=windows)
    yield "dynamic_sizes", number[moving].bincount(minlength=windows)
    peak = torch.where(small[0, group], -keep.float(), density[0, keep])  # what is not clustered stays in order
    order = peak.sort(descending=True, stable=True).indices
    order = order[place[order].sort(stable=True).indices]
    yield "merged", shown.take(chosen).features[0, order]
    groups = place[order].unique(return_inverse=True)[1][None]
    score = mm.PruneVidPrune.asked(arrays["llm_attention"][None])
    each = (groups[0].bincount().double() * params["alpha"]).long()[None]
    best = best_of_groups(score, groups, each)[0].nonzero()[:, 0]
    falling = best[score[0, best].sort(descending=True, stable=True).indices]
    yield "llm_keep", falling[groups[0, falling].sort(stable=True).indices]
    yield "llm_keep_sorted", best


@runner("flashvid")
def flashvid(arrays: Arrays, params: dict[str, Any]) -> Results:
    x, score = arrays["features"], arrays["attention"]
    stage = mm.FlashVIDMerge(
        1.0, params["alpha"], params["temporal_threshold"], params["segment_threshold"], params["min_segment_num"],
        params["token_selection_method"] != "attn_div", compat="reference",
    )  # fmt: skip
    _, at = lying(x)
    yield "transition_similarity", likeness(x.mean(1)[None])[0]
    segment = stage.segment(stage.means(x.flatten(0, 1)[None], at))
    yield "segment_lengths", lengths(segment[0])
    plain = replace(stage, events=False)
    for name, one in (("adts_index", stage), ("adts_plain_index", plain)):
        yield (
            name,
            flash(one, x, score, segment, params)["chosen"].view(at.frames, -1).nonzero()[:, 1].view(at.frames, -1),
        )
    found = flash(stage, x, score, segment, params)
    parent, retained = found["parent"], found["retained"]
    yield "parent", torch.where(parent < 0, -1, parent % at.most).view(at.frames, -1)
    yield "retained", retained.view(at.frames, -1)
    yield "merged", (found["trees"] * retained[:, None]).view_as(x)
    yield "final_index", found["index"]
    yield "final_tokens", by_first(found["index"], found["tokens"], arrays["final_tokens"])
    flat = params["flat"]
    other = replace(stage, tau=flat["temporal_threshold"], events=flat["token_selection_method"] != "attn_div")
    whole = segment if flat["do_segment"] else torch.zeros_like(segment)
    found = flash(other, x, score, whole, params)
    yield "flat_index", found["index"]
    yield "flat_tokens", found["tokens"]
    for compat in (None, "reference"):
        found = flash(replace(stage, compat=compat), x[:2], score[:2], torch.zeros_like(segment[:, :2]), params)
        yield "pair_index", found["index"]
        yield "pair_tokens", found["tokens"]
    llm = params["llm"]
    image = slice(llm["start"], llm["start"] + llm["length"])
    attention = arrays["llm_attention"].mean(0)[None, image]
    seen = visuals(torch.zeros(1, llm["length"], 1), math.ceil(llm["ratio"] * llm["length"]), last_attention=attention)
    yield "llm_keep", in_prompt(mm.FastV().select(seen).keep[0], llm["length"], llm["start"], llm["suffix"])


def by_first(index: Tensor, tokens: Tensor, recorded: Tensor) -> Tensor:
    """Rows of the same id in the order in which they are recorded, which the reference leaves open."""
    for i in (index.diff() == 0).nonzero()[:, 0].tolist():
        if (tokens[i] - recorded[i]).abs().max() > (tokens[i + 1] - recorded[i]).abs().max():
            tokens[[i, i + 1]] = tokens[[i + 1, i]]
    return tokens


def flash(stage: mm.FlashVIDMerge, x: Tensor, score: Tensor, segment: Tensor, params: dict[str, Any]) -> Arrays:
    """One setting with the budgets of the reference: each frame by itself, rounded up; and tokens that are chosen in a segment
    of one frame are clustered too."""
    shown, at = lying(x)
    budget = math.ceil(at.most * params["retention_ratio"] * params["expansion"])
    alone = math.ceil(budget * stage.alpha)
    each = torch.full_like(segment, alone)
    features, own = shown.features, torch.arange(at.tokens)
    chosen = stage.chosen(
        features, at, stage.means(features, at), segment, score.flatten()[None], each, alone * at.frames
    )
    parent, cosine = joins(features, at, segment, ~chosen, stage.tau)
    parent = bounded(parent, cosine, at, segment, torch.full_like(segment, budget))
    single = (of_segment(torch.ones_like(segment), segment) == 1).gather(1, at.frame)
    root = single | (~chosen & (parent < 0))
    left = root.view(1, at.frames, -1).sum(2)
    part = of_segment(each * 0 + budget - alone, segment).double() / of_segment(left, segment)
    counts = torch.where(part < 1, (left * part).ceil().long(), left)
    into, weight, centre = stage.clustered(features, at, parent, root, counts, at.tokens)
    made = mm.Selection.into(centre, int(centre.sum()), into, weight).apply(features)[0]
    index = torch.cat([own[chosen[0]], own[centre[0]]])
    order = index.sort(stable=True).indices
    trees = stage.trees(features, parent, roots(parent, at.frames))[1][0]
    tokens = torch.cat([features[0, chosen[0]], made])[order]
    return {
        "chosen": chosen[0], "parent": parent[0], "retained": root[0], "trees": trees, "index": index[order], "tokens": tokens
    }  # fmt: skip


@runner("framefusion")
def framefusion(arrays: Arrays, params: dict[str, Any]) -> Results:
    """Thresholds decide here what is merged, step by step; budgets are the method's."""
    prefix, places, frames = params["prefix"], params["tokens_per_frame"], params["T"]
    hidden = torch.cat([arrays["prefix"], arrays["feats"].flatten(0, 1), arrays["suffix"]])
    alive, image = torch.arange(len(hidden)), (prefix, prefix + frames * places)
    parts: list[float] = []
    merging = pruning = True
    for step, _ in enumerate(params["step_kinds"]):
        video = (alive >= image[0]) & (alive < image[1])
        at, x = alive[video], hidden[alive[video]][None]
        need = needed(parts, params["cost"], params["num_layers"])
        kept = torch.ones_like(at, dtype=torch.bool)
        if pruning and not merging:
            score = arrays["attention"].mean(0)[at][None]
            kept = mask_of(mm.Selection.top(score, round(len(at) * (1 - need))).keep, len(at))[0]
            pruning = False
        elif merging:
            parent, cosine = linked(x, ((at - image[0]) % places)[None])
            close = cosine >= params["similarity_lower_bound"]
            if float(close.sum()) / len(at) < need:
                parts.append(float(close.sum()) / len(at))
                merging = parts[-1] >= params["ratio_lower_bound"]
            else:
                close = largest(cosine, torch.tensor([[int(need * len(at))]]))
                merging = pruning = False
            kept = ~close[0]
            rows = mm.Selection.into(~close, int(kept.sum()), *as_one(parent, close)).apply(x)[0]
            hidden[at[kept]] = rows
        yield from state(arrays, step, params, merging, pruning)
        alive = torch.cat([alive[alive < image[0]], at[kept], alive[alive >= image[1]]])
        yield f"step{step}_alive", alive
        if f"step{step}_hidden" in arrays:
            yield f"step{step}_hidden", hidden[alive]
        hidden[alive] += arrays["layer_delta"][step, alive]
    yield "sparsity_list", torch.tensor(parts, dtype=torch.float64)


def state(arrays: Arrays, step: int, params: dict[str, Any], merging: bool, pruning: bool) -> Results:
    """Whether merging and pruning are over, where that differs from what is recorded."""
    found, recorded = (not merging, not pruning), (params["finish_merging"][step], params["finish_pruning"][step])
    if found != recorded:
        yield f"step{step}_alive", torch.tensor(-1)


@runner("llava_scissor")
def llava_scissor(arrays: Arrays, params: dict[str, Any]) -> Results:
    shown, at = lying(arrays["feats"])
    found = Connected.of(shown.features, at, params["tau"])
    first = torch.searchsorted(found.firsts, found.spatial).view(at.frames, -1)
    begins = torch.searchsorted(found.firsts, at.most * torch.arange(at.frames))
    yield "spatial_label", first - begins[:, None]
    yield "stage1", found.means
    yield "temporal_label", torch.searchsorted(found.keys, found.temporal[found.firsts])
    own = found.representatives(shown.features[0])
    into = match(shown.features, own[None])[1][0]
    made = mm.LLaVAScissor.absorbed(shown.features[0], own, into)
    yield "assignment", into
    yield "output", made
    chosen = mm.LLaVAScissor(keep=len(made), tau=params["tau"]).select(replace(shown, k=len(made)))
    yield "output", shown.take(chosen).features[0]
