# SPDX-License-Identifier: Apache-2.0
"""tam_eci, tam_whole_image, tam_whole_multi, tam_whole_video, tam_eval: token activation maps and their scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.explain.faithfulness import word_scores
from mmcompress.explain.labels import FUNCTION, label_words
from mmcompress.explain.tam import subtract_interference, targets, token_activation
from mmcompress.explain.taps import VocabularyHead
from mmcompress.explain.thresholds import otsu_threshold, quantised, resize_map
from mmcompress.explain.words import group_words, word_text

from ..form import Arrays, Results, runner


@runner("tam_eci")
def eci(arrays: Arrays, params: dict[str, Any]) -> Results:
    for case in params["cases"]:
        i = case["i"]
        current, context, weights = (arrays[f"{name}_{i}"] for name in ("current", "context", "weights"))
        out, interference, scale = subtract_interference(current[None], context, weights[None])
        yield f"interference_{i}", interference[0]
        arrays[f"taken_{i}"] = current - arrays[f"out_{i}"]  # where all is taken, what is left is but rounding
        yield f"taken_{i}", current - out[0]
        arrays[f"scale_{i}"] = torch.tensor([case["scale"]])
        yield f"scale_{i}", scale


class Head(nn.Module):
    """The recorded output layer as that of a model."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(*weight.T.shape, bias=False)
        self.layer.weight.data = weight
        self.config = self

    def get_output_embeddings(self) -> nn.Module:
        return self.layer

    def get_text_config(self) -> Any:
        return object()


@runner("tam_whole_image", "tam_whole_multi", "tam_whole_video")
@torch.no_grad()
def whole(arrays: Arrays, params: dict[str, Any]) -> Results:
    states = torch.cat([arrays["hidden_prefill"], arrays["hidden_decode"]])
    head, ids, shape = VocabularyHead(Head(arrays["lm_head"])), arrays["input_ids"], params["vision_shape"]
    count, length, asked = params["A"], params["N"], params["P"]
    text = states[torch.cat([arrays["prompt_positions"], torch.arange(length - 1, length - 1 + count)])]
    question, answer = ids[arrays["prompt_positions"]].tolist(), arrays["answer_ids"].tolist()
    first = int(head.every(text[:1]).argmax())
    shapes = [shape] if params["kind"] == "image" else shape if params["kind"] == "multi" else [shape[1:]] * shape[0]
    grids, begin = [], 0
    for rows, columns in shapes:
        grids.append(torch.arange(begin, begin + rows * columns).view(rows, columns))
        begin += rows * columns
    arrays["first"] = torch.tensor(params["first_prompt_class"])
    yield "first", torch.tensor(first)
    for compat, ending in (("reference", ""), ("paper", "_fixed")):
        classes = targets(question, answer, first, int(ids[-1]), compat)
        raw = head.logits(states[arrays["vision_positions"]], classes).relu().T
        relevance = head.logits(text, classes).relu().T
        found = token_activation(raw, relevance, asked, params["token_strings"], grids)
        yield f"raw_maps{ending}", found.raw
        yield f"eci_maps{ending}", found.causal
        yield f"filtered{ending}", found.maps
        arrays[f"ls_scale{ending}"] = arrays[f"ls_scale{ending}"].nan_to_num(0.0)  # none is taken from the first
        yield f"ls_scale{ending}", found.scale.double()
        if compat == "reference":
            order = torch.arange(len(raw))
            own = order <= order[:, None].clamp_min(asked)  # what was read so far, the token's own place included
            width = arrays["text_scores"].shape[1]
            arrays["text_scores"] = arrays["text_scores"].nan_to_num(-1.0)
            yield "text_scores", relevance.masked_fill(~own, -1.0)[:, :width]
            pictures = quantised(found.maps)
            yield "uint8_maps", within_one(pictures, arrays["uint8_maps"])
            rounds = torch.cat([pictures[:1], pictures[asked + 1 :]])  # the first round shows the first prompt token
            yield "returned_uint8", within_one(rounds, arrays["returned_uint8"])
    likely = head.likely(text, [None] * len(text), 3)
    yield "candidates_prob", torch.tensor([[chance for _, chance in best] for _, best in likely])


def within_one(found: Tensor, expected: Tensor) -> Tensor:
    """8-bit values are cut off, so a rounding error can move one by 1: that is no difference."""
    return torch.where((found.int() - expected.int()).abs() <= 1, expected, found)


@runner("tam_eval")
def evaluation(arrays: Arrays, params: dict[str, Any]) -> Results:
    for case in params["cases"]:
        i, texts = case["i"], case["tokens"]
        maps, mask = arrays[f"maps_{i}"], arrays[f"mask_{i}"].long()
        words = group_words(texts)
        assert words == case["word_token_indices"], words
        assert [word_text(texts, word) for word in words] == case["words"]
        nouns = [t for word, kind in zip(words, case["word_types"], strict=True) if kind == "noun" for t in word]
        resized = torch.stack([resize_map(maps[t], (mask.shape[0], mask.shape[1])) for t in nouns])
        cuts = [otsu_threshold(r) for r in resized]
        yield f"resized_{i}", resized
        yield f"pred_{i}", torch.stack([255 * (r > cut) for r, cut in zip(resized, cuts, strict=True)]).to(torch.uint8)
        arrays[f"otsu_{i}"] = torch.tensor(case["otsu_thresholds"])
        yield f"otsu_{i}", torch.tensor(cuts).float()
        labels = label_words(case["words"], case["word_types"], case["category"])
        assert (FUNCTION in labels) == ("function" in case["word_types"])
        scores = word_scores(maps, words, labels, mask)
        for name, found in (
            ("obj_iou", scores.obj),
            ("func_iou", scores.func),
            ("precision", scores.precision),
            ("recall", scores.recall),
        ):
            arrays[f"{name}_{i}"] = torch.tensor(case[name])
            yield f"{name}_{i}", torch.tensor(found)
