# SPDX-License-Identifier: Apache-2.0
"""What lmms-eval reports, as records that `mmcompress compare` reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...records import write_json
from ..evaluator import FORMAT
from ..journal import file_name, fingerprint
from ..machine import machine


def save(results: dict[str, Any], settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write what a run gave, the record of each task first: when the record of the plan is there, everything is."""
    samples = results.pop("samples", {})
    parts = {}
    for task, answers in samples.items():
        record = _task_record(task, answers, results, settings)
        part = path.with_name(f"{file_name(record['settings'])}.json")
        write_json(part, record)
        parts[task] = part.name
    text = json.dumps(results, default=str)
    record = {
        "mmcompress": "lmms", "fingerprint": fingerprint(settings), "settings": settings, "plan": settings["plan"],
        "scores": {task: _numbers(scores) for task, scores in results["results"].items()},
        "answered": sum(map(len, samples.values())), "records": parts, "machine": machine(), "lmms_eval": json.loads(text),
        "empty": {task: sum(not reply_of(answer).strip() for answer in answers) for task, answers in samples.items()},
    }  # fmt: skip
    write_json(path, record)
    return record


def _task_record(
    task: str, answers: Sequence[dict[str, Any]], results: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """The answers to one task in the form of `mmcompress eval`, judged by lmms-eval."""
    listed = results["configs"][task].get("metric_list") or []
    headline = listed[0]["metric"] if listed else "score"
    rows = [
        {
            "id": str(answer["doc_id"]), "kind": "", "cluster": str(answer["doc_id"]), "answers": [str(answer["target"])],
            "reply": reply_of(answer), "parsed": reply_of(answer).strip(), "value": _value(answer.get(headline)), "chance": 0.0,
        }
        for answer in sorted(answers, key=lambda answer: answer["doc_id"])
    ]  # fmt: skip
    data = hashlib.sha256("".join(sorted(answer["doc_hash"] for answer in answers)).encode()).hexdigest()[:12]
    kept = {name: value for name, value in settings.items() if name not in ("task", "protocol", "tasks", "pretrained")}
    named = {"task": task, "protocol": "lmms", **kept, "model": Path(settings["pretrained"]).name}
    named |= {"questions": len(rows), "data": data}
    return {
        "mmcompress": "results", "format": FORMAT, "fingerprint": fingerprint(named), "settings": named,
        "checkpoint": settings["pretrained"], "machine": machine(), "headline": headline,
        "scores": _numbers(results["results"].get(task, {})), "chance": 0.0, "by_kind": {}, "answered": len(rows),
        "without_gold_answer": sum(row["value"] is None for row in rows), "failed": {}, "visual_tokens": {},
        "empty": sum(not row["reply"].strip() for row in rows), "cut": 0, "rows": rows,
    }  # fmt: skip


def reply_of(answer: Mapping[str, Any]) -> str:
    reply: Any = answer["filtered_resps"]
    while isinstance(reply, (list, tuple)):
        reply = reply[0] if reply else ""
    return str(reply)


def _value(found: Any) -> float | None:
    """What a metric gave to one answer: a number, or the score in what its aggregation gets."""
    if isinstance(found, Mapping):
        found = found.get("score")
    return float(found) if isinstance(found, (bool, int, float)) else None


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """The metrics without the name of their filter and their standard errors."""
    return {
        name.partition(",")[0]: float(value)
        for name, value in scores.items()
        if isinstance(value, (int, float)) and "_stderr" not in name and "," in name
    }
