# SPDX-License-Identifier: Apache-2.0
"""evs, vidcom2, timechat_dtd, vcast, dycoke: methods for videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

import mmcompress as mm
from mmcompress.budget import resolve
from mmcompress.methods.dycoke import DyCoke
from mmcompress.methods.dycoke_decode import DyCokeDecode
from mmcompress.methods.evs import EVS
from mmcompress.methods.timechat_dtd import TimeChatDTD, pixel_difference
from mmcompress.methods.vcast import VCAST
from mmcompress.methods.vidcom2 import VidCom2
from mmcompress.ops.frames import Frames, similarity_before

from ..form import Arrays, Results, mask_of, runner


def video(features: Tensor, frames: int, rows: int, columns: int, k: int) -> mm.Visuals:
    """A video of tokens [N, D], frame after frame."""
    return mm.Visuals(features[None], mm.Layout.raster(frames, rows, columns), k)


@runner("evs")
def evs(arrays: Arrays, params: dict[str, Any]) -> Results:
    side, frames, places = params["spatial_merge"], params["T"], params["tokens_per_frame"]
    k = EVS.reference_budget(frames, places, params["pruning_rate"])
    shown = video(arrays["feats"], frames, params["H"] // side, params["W"] // side, k)
    yield "dissimilarity", 1 - similarity_before(shown.by_frame())[0][0, 1:]
    kept = EVS().select(shown).keep
    yield "kept_index", kept[0]
    mask = mask_of(kept, shown.n)[0]
    yield "mask", mask
    counts = [EVS.reference_budget(frames, places, q) for q in arrays["count_q"].tolist()]
    yield "count_kept", torch.tensor(counts)
    ids, token = arrays["prompt_ids"], params["token_ids"]["video"]
    first = int((ids == token).int().argmax())
    whole = torch.cat([ids[:first], torch.full((len(mask),), token), ids[first + len(kept[0]) :]])
    stays = torch.cat([whole.new_ones(first).bool(), mask, whole.new_ones(len(whole) - first - len(mask)).bool()])
    yield "prompt_ids", whole[stays]
    positions, delta = of_qwen(whole, params)
    yield "hf_positions_kept", positions[:, stays]
    yield "hf_delta_unpruned", delta


def of_qwen(ids: Tensor, params: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The positions [3, S] that transformers gives a prompt with a video, and what is added to its length behind it."""
    token, side = params["token_ids"], params["spatial_merge"]
    config = Qwen2_5_VLConfig(
        **{f"{name}_token_id": token[name] for name in ("image", "video", "vision_start", "vision_end")},
        vision_config={"spatial_merge_size": side, "tokens_per_second": params["tokens_per_second"], "depth": 1},
        text_config={"num_hidden_layers": 1},
    )
    with torch.device("meta"):
        model = Qwen2_5_VLModel(config)
    positions, delta = model.get_rope_index(
        ids[None],
        mm_token_type_ids=2 * (ids[None] == token["video"]).int(),
        video_grid_thw=torch.tensor([[params["T"], params["H"], params["W"]]]),
        second_per_grid_ts=torch.tensor([float(params["second_per_grid"])]),
    )
    return positions[:, 0], delta.reshape(())


@runner("vidcom2")
def vidcom2(arrays: Arrays, params: dict[str, Any]) -> Results:
    stage = VidCom2(params["retention_ratio"], params["channel_ratio"], params["softmax_temperature"])
    frames, rows, columns = params["T"], params["rows"], params["cols"]
    shown = video(arrays["feats"], frames, rows, columns, len(arrays["feats"]))
    lying = shown.by_frame()
    of_video, of_frame = stage.typical(lying)
    yield "low_var_channels", stage.quiet(lying)[0]
    yield "video_score", of_video[0]
    yield "frame_score", of_frame[0]
    yield "scales", stage.scales(of_video, lying.full, stage.keep)[0]
    counts = stage.counts(of_video, lying.full, stage.keep)
    yield "frame_budgets", counts[0]
    yield "kept_index", stage.chosen(lying, of_video + of_frame, counts, int(counts.sum()))[0]
    exact = max(frames, int(shown.n * stage.keep))
    yield "exact_count_mask", mask_of(stage.chosen(lying, of_video + of_frame, counts, exact), shown.n)[0]
    # LLaVA-Video: a newline behind every row
    frames, side = params["grid_T"], params["grid_side"]
    newlines = tuple(range(side, frames * side * (side + 1), side + 1))
    layout = mm.Layout.raster(frames, side, side, newlines)
    grid = Frames.of(arrays["grid_feats"][None], frames, side * side)
    of_video, of_frame = stage.typical(grid)
    counts = stage.counts(of_video, grid.full, stage.keep)
    yield "grid_frame_budgets", counts[0]
    chosen = torch.tensor(layout.patch_tokens())[stage.chosen(grid, of_video + of_frame, counts, int(counts.sum()))[0]]
    behind = torch.tensor(newlines).split(side)
    parts = chosen.split(counts[0].tolist())
    yield "grid_kept_index", torch.cat([x for pair in zip(parts, behind, strict=True) for x in pair])


@runner("timechat_dtd")
def timechat_dtd(arrays: Arrays, params: dict[str, Any]) -> Results:
    frames, rows, columns = params["T"], params["rows"], params["cols"]
    visual = arrays["input_ids"] == params["token_ids"]["video"]
    shown = video(arrays["hidden"][visual], frames, rows, columns, int(visual.sum()))
    change = -similarity_before(shown.by_frame())[0][0, 1:]
    yield "feature_similarity", -change
    pixels = arrays["frames_u8"].float() / 255  # as they are before the processor
    mean, std = (torch.tensor(params[f"clip_{name}"])[:, None, None] for name in ("mean", "std"))
    pixels = (pixels - mean) / std * std + mean
    side, depth = params["patch"] * params["merge"], params["temporal_patch"]
    patches = pixels.unflatten(0, (frames, depth)).unflatten(4, (columns, side)).unflatten(3, (rows, side))
    moved = pixel_difference(patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(2, 3), compat="reference")
    share = params["relative_ratio"]
    gone = {
        "feature_abs": TimeChatDTD.dropped(change, threshold=-params["feature_threshold"]),
        "feature_rel": TimeChatDTD.dropped(change, share=share),
        "pixel_abs": TimeChatDTD.dropped(moved, threshold=params["pixel_threshold"]),
        "pixel_rel": TimeChatDTD.dropped(moved, share=share),
    }
    places = visual.nonzero()[:, 0]
    for name, dropped in gone.items():
        stays = torch.ones(len(visual), dtype=torch.bool)
        stays[places[rows * columns :]] = ~dropped.flatten()
        yield f"keep_{name}", stays.nonzero()[:, 0]
    # the stage itself, with the budget that the reference came to
    kept = arrays["keep_feature_rel"]
    k = int(visual[kept].sum())
    chosen = TimeChatDTD().select(video(arrays["hidden"][visual], frames, rows, columns, k)).keep
    yield "keep_feature_rel", torch.cat([places[chosen[0]], (~visual).nonzero()[:, 0]]).sort().values


@runner("vcast")
def vcast(arrays: Arrays, params: dict[str, Any]) -> Results:
    stage = VCAST(params["retain_ratio"], params["temperature"], compat="reference")
    first = params["T"] * params["rows"] * params["cols"]
    kept, begun = [], 0
    for prefix in ("", "second_"):
        size = [params[prefix + name] for name in ("T", "rows", "cols")]
        tokens = size[0] * size[1] * size[2]
        k = max(resolve(stage.keep, tokens), size[0] * params["min_k"])
        shown = video(arrays["features"][begun : begun + tokens], *size, k)
        kept.append(begun + stage.select(shown).keep[0])
        begun += tokens
        if not prefix:
            lying = shown.by_frame()
            curvature = stage.curvature(lying)
            yield "curvature", curvature[0]
            yield "score", stage.scores(lying)[0]
            weights = (curvature / stage.temperature).softmax(1)
            yield "budget", stage.allocate(weights, lying.room, k, params["min_k"])[0]
    assert begun == len(arrays["features"]) and first <= begun
    yield "kept", torch.cat(kept)
    yield "deepstack_kept", mm.Selection(torch.cat(kept)[None]).apply(arrays["deepstack"][:1])[0]
    for name, weights, budget, most, compat in (
        ("alloc", "alloc_weights", "alloc_budget", "alloc_max", "reference"),
        ("alloc_small", "alloc_weights", "alloc_small_budget", "alloc_max", "reference"),
        ("alloc_clean", "alloc_clean_weights", "alloc_clean_budget", "alloc_clean_max", None),
        ("alloc_clean", "alloc_clean_weights", "alloc_clean_budget", "alloc_clean_max", "reference"),
    ):
        given = arrays[weights][None]
        room = torch.full(given.shape, params[most])
        yield name, VCAST(compat=compat).allocate(given, room, params[budget], params["min_k"])[0]


@runner("dycoke")
def dycoke(arrays: Arrays, params: dict[str, Any]) -> Results:
    places, dropped = params["tokens_per_frame"], params["merge_ratio_k"]
    for name, features, frames in (
        ("ttm", arrays["feats"], params["T"]),
        ("odd", arrays["odd_feats"], params["odd_T"]),
    ):
        x = features.unflatten(0, (frames, places))
        kept = DyCoke.reference_order(x, dropped)
        yield f"{name}_index", torch.cat(kept)
        counts = [len(frame) for frame in kept] + [0] * (frames - len(kept))
        yield f"{name}_kept_per_frame", torch.tensor(counts)
        # the stage itself where both mean the same: without the last block, whose third frame the reference keeps whole, as a set
        whole = (frames - 1) // 4 * 4
        few = int((1 - dropped) * places)
        shown = video(features[: whole * places], whole, 1, places, whole // 4 * (places + 3 * few))
        mine, theirs = DyCoke().select(shown).keep[0], torch.cat(kept[:whole]).sort().values
        if whole + 4 <= frames or frames % 4:
            yield f"{name}_index", torch.cat([torch.cat(kept)]) if torch.equal(mine, theirs) else mine
    yield from decoding(arrays, params)


def decoding(arrays: Arrays, params: dict[str, Any]) -> Results:
    stage = DyCokeDecode(params["prune_ratio_p"], threshold=params["refresh_threshold"], mode="reference")
    first, count = params["image_start"], params["image_length"]
    attention, longest = arrays["decode_attention"].mean(1), arrays["decode_attention"].shape[2]
    visual = torch.zeros(1, longest, dtype=torch.bool)
    visual[:, first : first + count] = True
    before, hidden = torch.zeros(1, longest), torch.zeros(1, longest, dtype=torch.bool)
    similar, pruned, kept = [], [], torch.full((len(attention), longest), -1)
    for step, now in enumerate(attention):
        length = first + count + params["post_tokens"] + step + 1
        hidden, alike = stage.view(now[None], before, hidden, visual)
        before = now[None]
        similar.append(alike[0])
        pruned.append(hidden.any())
        if hidden.any():
            stays = (~hidden[0, :length]).nonzero()[:, 0]
            kept[step, : len(stays)] = stays
    yield "decode_similarity", torch.stack(similar).double()
    yield "decode_pruned", torch.stack(pruned)
    yield "decode_keep", kept
