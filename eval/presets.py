# SPDX-License-Identifier: Apache-2.0
"""`python -m mmcompress.eval.presets`: what the presets stand for, from sweeps on questions that nothing was chosen by.

A preset is the plan with the fewest visual tokens in the language model (mean over its layers) among CANDIDATES that loses at most
so many points of accuracy. Few candidates, so that none is best by chance alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..assets import model_path
from ..presets import FILE, NAMES
from .margins import Marks, margin, marks_of

LOSS = {"quality": 1.0, "balanced": 3.0, "fast": 8.0}
"""Most points that a preset may lose."""
CANDIDATES = ("voronoi", "dart", "voronoi(keep=0.25)>>dart(layer=2,keep=0.4)")
"""Methods as sweeps name them, at every ratio that was measured."""
ROOT = Path(__file__).parents[1]


def write(paths: Sequence[Path], out: Path = FILE) -> dict[str, Any]:
    """Read the sweeps, choose, and write `out`; returns what is in it."""
    records = [json.loads(path.read_text()) for path in paths]
    families = {type_of(record["model"]): chosen([record]) for record in records}
    found = {
        "rule": f"fewest visual tokens, mean over the layers, at a loss of at most "
        f"{', '.join(f'{points:g} points ({name})' for name, points in LOSS.items())}; among {', '.join(CANDIDATES)}",
        "sources": [path.resolve().relative_to(ROOT.resolve()).as_posix() for path in paths],
        "families": families,
        "others": chosen(records),
    }
    out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def type_of(model: str) -> str:
    """The model type of an embedded model, as its config has it."""
    kind: str = json.loads((model_path(model) / "config.json").read_text())["model_type"]
    return kind


def chosen(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The presets that these sweeps of one task give together."""
    (task,) = {name for record in records for name in record["tasks"]}
    points = [{point["plan"]: point for point in record["points"] if not point["refused"]} for record in records]
    stock = [marks_of(found["stock"], task) for found in points]
    rows: dict[str, tuple[float, float, float]] = {}
    for plan, point in points[0].items():
        if point["method"] not in CANDIDATES or any(plan not in found for found in points):
            continue
        change = margin(_pairs([found[plan] for found in points], stock, task))
        visual = [found[plan]["tasks"][task]["visual"] for found in points]
        left = statistics.mean(one["mean_of_layers"] / one["prompt"] for one in visual)
        rows[plan] = left, change.value, change.error
    presets = {}
    for name in NAMES:
        kept = {plan: row for plan, row in rows.items() if row[1] >= -LOSS[name] - 1e-9}
        if not kept:
            raise ValueError(f"no plan loses as little as {LOSS[name]} points on {[one['model'] for one in records]}")
        plan = min(kept, key=lambda one: (kept[one][0], -kept[one][1]))
        left, value, error = kept[plan]
        presets[name] = {
            "plan": plan, "tokens": round(left, 3), "points": round(value, 1), "error": math.ceil(10 * error) / 10,
        }  # fmt: skip
    asked = sum(record["tasks"][task]["questions"] for record in records)
    return {"models": [record["model"] for record in records], "questions": asked, "presets": presets}


def _pairs(points: Sequence[Mapping[str, Any]], stock: Sequence[Marks], task: str) -> Any:
    return ((marks_of(point, task), base) for point, base in zip(points, stock, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "records", type=Path, nargs="*", help="sweep.json of sweeps (default: results/fresh/*/sweep.json)"
    )
    paths = parser.parse_args().records or sorted(ROOT.glob("results/fresh/*-shapes/sweep.json"))
    for family, about in write(paths)["families"].items():
        print(family, {name: row["plan"] for name, row in about["presets"].items()})
    print(f"written: {FILE}")


if __name__ == "__main__":
    main()
