# SPDX-License-Identifier: Apache-2.0
"""What a token activation map costs beside the plain `generate`: `python -m mmcompress.eval.cost.explain`."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ...explain import token_activation_map
from ...records import check_output, write_json
from ..machine import machine
from .latency import milliseconds
from .midsize import build, large_picture

WAYS = ("generate", "explain")
NEW = 16


@torch.no_grad()
def answer(model: Any, inputs: dict[str, Any], way: str, new: int = NEW) -> None:
    """Answer with `new` tokens, and explain all tokens of question and answer."""
    if way == "explain":
        token_activation_map(model, None, inputs=inputs, max_new_tokens=new)
    else:
        model.generate(**inputs, max_new_tokens=new, do_sample=False)


def seconds(layers: int, rounds: int) -> dict[str, list[float]]:
    """Each way in turn, `rounds` times, after one that does not count."""
    model = build("llava_next", num_hidden_layers=layers)
    inputs = large_picture(model)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way in WAYS:
            took = milliseconds(lambda way=way: answer(model, inputs, way)) / 1000  # type: ignore[misc]
            found[way] += [took] if number else []
    return found


def memory(layers: int, way: str) -> float:
    """Peak resident memory of a fresh process that answers once, MiB."""
    code = (
        "import sys; from mmcompress.eval.cost.explain import answer; from mmcompress.eval.cost.latency import peak_rss_mib; "
        "from mmcompress.eval.cost.midsize import build, large_picture; "
        f"model = build('llava_next', num_hidden_layers={layers}); answer(model, large_picture(model), sys.argv[1]); "
        "print(peak_rss_mib())"
    )
    out = subprocess.run([sys.executable, "-c", code, way], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def main() -> None:
    """`python -m mmcompress.eval.cost.explain`: time and memory of an explanation of a 3,000-token input."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--layers", type=int, default=12, help="of the mid-size language model")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved; the medians count")
    parser.add_argument("--out", type=Path, default=Path("results/explain_cost.json"))
    arguments = parser.parse_args()
    check_output("--out", arguments.out)
    peaks = {way: memory(arguments.layers, way) for way in WAYS}
    found = seconds(arguments.layers, arguments.rounds)
    record = {
        "machine": machine(), "layers": arguments.layers, "tokens": 3000, "new_tokens": NEW, "rounds": arguments.rounds,
        "seconds": found, "median_seconds": {way: statistics.median(times) for way, times in found.items()}, "peak_mib": peaks,
    }  # fmt: skip
    write_json(arguments.out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
