# SPDX-License-Identifier: Apache-2.0
"""Metrics of VQA benchmarks, and FLOPs: cases without arrays."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, TypeAlias

from mmcompress.eval import metrics as vqa
from mmcompress.eval.cost.vision_flops import qwen2_5_vl_vision_flops, vit_flops

from mmcompress.trace import Shape, prefill_flops

from ..form import text_runner

Compared: TypeAlias = Iterator[tuple[str, Any, Any]]


@text_runner("vqa_normalize")
def vqa_normalize(case: dict[str, Any]) -> Compared:
    for item in case["items"]:
        for key, style in (("official_vqa", "official"), ("evalai", "evalai"), ("vlmevalkit", "vlmevalkit")):
            yield f"{key} of {item['raw']!r}", vqa.normalize_answer(item["raw"], style), item[key]  # type: ignore[arg-type]


@text_runner("vqa_score")
def vqa_score(case: dict[str, Any]) -> Compared:
    readings: dict[str, tuple[str, vqa.Protocol]] = {
        "official_vqa": ("vqav2", "official"),
        "lmms_vqav2": ("vqav2", "lmms"),
        "lmms_textvqa": ("textvqa", "lmms"),
        "m4c_textvqa": ("textvqa", "llava"),
    }
    for i, item in enumerate(case["items"]):
        for key, (benchmark, protocol) in readings.items():
            yield (
                f"{key} of item {i}",
                vqa.vqa_accuracy(item["pred"], item["answers"], benchmark, protocol),
                float(item[key]),
            )


@text_runner("anls")
def anls(case: dict[str, Any]) -> Compared:
    for i, item in enumerate(case["items"]):
        yield f"item {i}", vqa.anls(item["pred"], item["answers"]), item["anls"]


@text_runner("relaxed_accuracy")
def relaxed_accuracy(case: dict[str, Any]) -> Compared:
    for item in case["items"]:
        what = f"{item['pred']!r} for {item['target']!r}"
        yield what, vqa.relaxed_correct(item["pred"], item["target"]), item["correct"]
        yield f"{what}, stripped", vqa.relaxed_correct(item["pred"], item["target"], strip=True), item["strip_pred"]


@text_runner("pope")
def pope(case: dict[str, Any]) -> Compared:
    for item in case["parse"]:
        yield f"label of {item['text']!r}", vqa.pope_label(item["text"]), item["label"]
    yield "official", vqa.pope_scores(case["texts"], case["labels"]), case["official"]
    found = vqa.pope_scores(case["texts"], case["labels"], "lmms")
    yield "lmms", found | {"yes_ratio_field": found["yes_ratio"]}, case["lmms"] | {"yes_ratio": found["yes_ratio"]}


@text_runner("mme")
def mme(case: dict[str, Any]) -> Compared:
    for item in case["parse"]:
        yield f"label of {item['text']!r}", vqa.mme_label(item["text"], "lmms"), item["label"]
    rows = case["rows"]
    right = [vqa.mme_label(row["prediction"], "lmms") == row["answer"].lower() for row in rows]
    found = vqa.mme_scores([row["category"] for row in rows], [row["question_id"] for row in rows], right)
    yield "perception", found.pop("perception"), case["perception"]
    yield "cognition", found.pop("cognition"), case["cognition"]
    del found["total"]
    yield "categories", found, case["category_scores"]


@text_runner("mmmu_parse")
def mmmu_parse(case: dict[str, Any]) -> Compared:
    for item in case["multiple_choice"]:
        for protocol in ("official", "lmms"):
            found = vqa.mmmu_letter(item["response"], case["options"], protocol)  # type: ignore[arg-type]
            yield f"{protocol} letter of {item['response']!r}", found, item[protocol]
    for item in case["open"]:
        yield f"candidates of {item['response']!r}", vqa.mmmu_candidates(item["response"]), set(item["parsed"])
        for key in ("correct", "correct_lmms"):
            yield f"{key} of {item['response']!r}", vqa.mmmu_open_correct(item["response"], item["gold"]), item[key]


@text_runner("mcq")
def mcq(case: dict[str, Any]) -> Compared:
    options = case["options"]
    for item in case["items"]:
        reply = item["response"]
        found = {
            "lmms_extract": vqa.extract_letter(reply, tuple(options)),
            "mmbench_lmms": vqa.mmbench_letter(reply, options, "lmms"),
            "mmbench_vlmevalkit": vqa.mmbench_letter(reply, options),
            "mvbench_correct_if_gt_B": int(vqa.mvbench_letter(reply) == "B"),
            "scienceqa_lmms_correct_if_gt_B": float(vqa.scienceqa_letter(reply, "lmms") == "B"),
            "seed_lmms_pred": vqa.seed_letter(reply, "lmms"),
            "ai2d_lmms_filtered": vqa.ai2d_answer(reply),
        }
        for key, value in found.items():
            yield f"{key} of {reply!r}", value, item[key]
    rows = case["circular"]["rows"]
    for protocol in ("official", "lmms"):
        right = [
            vqa.mmbench_letter(row["prediction"], {k: row[k] for k in "ABCD"}, protocol) == row["answer"]  # type: ignore[arg-type]
            for row in rows
        ]
        columns = {"category": "category", "l2_category": "L2-category"}
        labels = {key: [row[column] for row in rows] for key, column in columns.items()}
        scores = vqa.circular_scores([row["index"] for row in rows], right, labels)
        yield f"{protocol} overall", scores["circular"], case["circular"]["overall"]
        yield f"{protocol} single pass", scores["single_pass"], case["circular"]["single_pass_accuracy"]
        for key in columns:
            for label, value in case["circular"][key].items():
                yield f"{protocol} {key} {label}", scores[f"{key}/{label}"], value


@text_runner("exact_match_ocr_hallusion")
def exact_match_ocr_hallusion(case: dict[str, Any]) -> Compared:
    for item in case["gqa"]:
        reply, gold = item["pred"], item["gold"]
        yield f"gqa lmms {reply!r}", float(vqa.gqa_correct(reply, gold, "lmms")), item["lmms_exact"]
        yield f"gqa llava {reply!r}", vqa.gqa_answer(reply, "llava"), item["llava_converted"]
        yield f"gqa llava {reply!r} right", vqa.gqa_correct(reply, gold, "llava"), item["llava_correct"]
    for item in case["ocrbench"]:
        found = vqa.ocrbench_correct(item["pred"], item["answer"], item["dataset"], "lmms")
        yield f"ocrbench {item['pred']!r}", int(found), item["score"]
    rows = case["hallusion"]["rows"]
    keys = [tuple(row[k] for k in ("category", "subcategory", "set_id", "figure_id", "question_id")) for row in rows]
    right = [vqa.hallusion_label(row["model_prediction"]) == row["gt_answer"] for row in rows]
    found = vqa.hallusion_scores(keys, right)
    for key in ("aAcc", "qAcc", "fAcc"):
        yield f"hallusion {key}", found[key], case["hallusion"][key]


@text_runner("flops")
def flops(case: dict[str, Any]) -> Compared:
    for item in case["llm"]:
        shape = Shape.of(SimpleNamespace(**item["config"]))
        yield f"{item['model']} at {item['n']}", prefill_flops(shape, [item["n"]] * shape.layers), item["flops"]
    for item in case["vision"]:
        config = SimpleNamespace(**item["config"])
        windows = "grid_thw" in item
        found = qwen2_5_vl_vision_flops(config, item["grid_thw"]) if windows else vit_flops(config)
        yield f"{item['model']} {item.get('grid_thw', '')}", found, item["flops"]


@text_runner("flops_conventions")
def flops_conventions(case: dict[str, Any]) -> Compared:
    for i, item in enumerate(case["items"]):
        shape = Shape(item["d"], item["m"], item["layers"], 32, 32, item["d"] // 32)
        left = item["seq_len"] - round((1 - item["keep_ratio"]) * item["visual"])
        tokens = [item["seq_len"]] * item["layer"] + [left] * (item["layers"] - item["layer"])
        pruned = prefill_flops(shape, tokens, "fastv")
        full = prefill_flops(shape, [item["seq_len"]] * item["layers"], "fastv")
        yield f"item {i} pruned", pruned / 1e12, item["pruned_tera"]
        yield f"item {i} ratio", 100 * pruned / full, item["ratio_percent"]
        yield f"item {i} full", full, item["full"]
    vicuna = Shape(4096, 11008, 32, 32, 32, 128)
    for item in case["published"]["convention_3ndm"]:
        tokens = [n for n, layers in item["layers"] for _ in range(layers)]
        found = prefill_flops(vicuna, tokens, "swiglu_mac") / 1e12
        yield f"{item['name']}, published", float(f"{found:.3g}"), item["published_T"]
