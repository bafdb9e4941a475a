# SPDX-License-Identifier: Apache-2.0
"""Fill the measured tables of the README from the records in `results/`: `python -m mmcompress.eval.readme`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .synthetic import CHANCE, KINDS

ROOT = Path(__file__).resolve().parent.parent


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conditions(record: dict[str, Any]) -> str:
    here = record["machine"]
    return (
        f"{here['device']}, {here['threads']} threads, torch {here['torch']}, transformers {here['transformers']}, "
        f"commit {here['commit']}"
    )


def accuracy(record: dict[str, Any]) -> str:
    """Accuracy and cost at every ratio, one line per method."""
    stock, *rows = record["rows"]
    ratios = list(dict.fromkeys(row["keep"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["keep"]): row for row in rows}

    def cell(name: str, keep: float) -> str:
        row = found.get((name, keep))
        return f"{100 * row['accuracy']:.1f}" if row else "-"

    def cost(name: str) -> list[str]:
        row = found[name, 0.25]
        return [
            f"{row['visual_flops'] / stock['visual_flops']:.0%}",
            f"{row['visual_kv_bytes'] / stock['visual_kv_bytes']:.0%}",
        ]

    ordered = sorted(names, key=lambda name: -found[name, 0.25]["accuracy"])
    body = [[f"`{name}`", *(cell(name, keep) for keep in ratios), *cost(name)] for name in ordered]
    headings = ["method", *(f"{keep:.0%} kept" for keep in ratios), "visual FLOPs at 25 %", "visual KV at 25 %"]
    error = 100 * max(row["standard_error"] for row in record["rows"])
    return (
        f"Accuracy (%) of the embedded LLaVA on {record['questions']} held-out questions, mean over seven types; with all "
        f"{stock['tokens']} tokens it is {100 * stock['accuracy']:.1f}. Standard error up to {error:.1f} points. FLOPs and KV "
        f"bytes of the visual tokens in the LLM, computed, as parts of the stock model's. Sorted by the middle column.\n\n"
        f"{table(headings, body)}\n\nShown by `mmcompress demo --questions {record['questions']}` ({conditions(record)})."
    )


def types(record: dict[str, Any]) -> str:
    """Accuracy by question type at full length and at a quarter."""
    rows = [row for row in record["rows"] if row["keep"] in (1.0, 0.25)]
    body = [
        [
            "stock model" if not row["plan"] else f"`{row['method']}` 25 %",
            *(f"{100 * row['by_type'][k]:.0f}" for k in KINDS),
        ]
        for row in rows
    ]
    body.append(["chance", *(f"{100 * CHANCE[k]:.1f}" for k in KINDS)])
    return table(["accuracy, %", *KINDS], body)


def bench(record: dict[str, Any]) -> str:
    """Speed of the mid-size random model."""
    body = []
    for row in record["rows"]:
        body.append(
            [
                row["plan"] if row["plan"] == "stock" else f"`{row['plan']}`",
                f"{row['prefill_ms']:.0f} ± {row['prefill_iqr_ms'] / 2:.0f}",
                f"{row['prefill_speedup']:.2f}x",
                f"{row['flops_ratio']:.2f}x",
                f"{100 * row['speedup_over_flops_ratio']:.0f} %",
                f"{row['select_ms']:.1f}",
                f"{row['decode_ms_per_token']:.1f}",
                f"{row['decode_overhead_percent']:+.1f} %",
                f"{row['peak_rss_mib']:.0f}" if row["peak_rss_mib"] else "-",
            ]
        )
    headings = [
        "plan",
        "prefill ms",
        "speed-up",
        "FLOPs ratio",
        "reached",
        "selection ms",
        "decode ms",
        "decode",
        "peak MiB",
    ]
    return (
        f"Speed on a mid-size random LLaVA (CLIP-L/14-336 shapes with 4 layers, LLaMA 1024 x 12, 576 visual and 40 text tokens, "
        f"float32, sdpa, batch 1), medians of {record['conditions']['repeats']} interleaved rounds, prefill with the vision tower. "
        f"Reached: measured speed-up over the FLOPs ratio. `uniform(keep=575)` drops one token: its decode step shows what the "
        f"hooks cost. Peak resident memory of a whole process: here it is reached while the model is built.\n\n"
        f"{table(headings, body)}\n\nShown by `make bench` ({conditions(record)})."
    )


def fill(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
    filled, count = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.S)
    if count != 1:
        raise ValueError(f"README.md has {count} places for {name!r}, expected one")
    return filled


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    demo = json.loads((ROOT / "results" / "demo.json").read_text())
    text = fill(text, "accuracy", accuracy(demo))
    text = fill(text, "types", types(demo))
    text = fill(text, "bench", bench(json.loads((ROOT / "results" / "bench.json").read_text())))
    readme.write_text(text)


if __name__ == "__main__":
    main()
