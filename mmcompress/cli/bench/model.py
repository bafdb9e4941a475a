# SPDX-License-Identifier: Apache-2.0
"""`mmcompress bench MODEL`: what plans cost on a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...assets import MODELS, split
from ...records import read, update
from .. import common
from ..common import check_least

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLANS = ("visionzip(keep=0.25)", "divprune(keep=0.25)", "fastv(layer=2, keep=0.25)", "uniform(keep=0.25)")
ONLY = ("image", "question", "new_tokens", "warmup", "attention")
"""Options of bench that mean nothing without a checkpoint."""
KIND = "`mmcompress bench MODEL`"


def add_options(bench: argparse.ArgumentParser) -> None:
    """The options of `mmcompress bench` that belong to a checkpoint."""
    group = bench.add_argument_group(
        "bench MODEL", "a checkpoint (folder, hub name, embedded model) instead of a family; also --device and --dtype"
    )
    group.add_argument("--image", type=Path, help="picture of the prompt (default: a drawn scene)")
    group.add_argument("--question", help="question of the prompt")
    group.add_argument("--new-tokens", type=int, help="tokens of each run, whatever they are (default 32)")
    group.add_argument("--warmup", type=int, help="rounds that do not count (default 3)")
    group.add_argument("--attention", help="attention implementation of the checkpoint (default: its own)")


def is_checkpoint(what: Sequence[str]) -> bool:
    """Whether `bench` is given a checkpoint: an embedded model, a folder, or a hub name."""
    return len(what) == 1 and (split(what[0])[0] in MODELS or "/" in what[0] or Path(what[0]).is_dir())


def run(options: argparse.Namespace, console: Console) -> None:
    """Count and time, print the tables, write the record."""
    from rich.progress import Progress

    from ...eval.cost.record import conditions, costs, prompt_inputs

    dtype = options.dtype or ["auto"]
    if len(dtype) > 1 or dtype[0] not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {' '.join(dtype)}: with a checkpoint one of auto, float32, bfloat16, float16")
    check_least(options, repeats=1, warmup=0, new_tokens=2)
    warmup = 3 if options.warmup is None else options.warmup
    new_tokens = options.new_tokens or 32
    name = options.what[0]
    if options.out:
        read(options.out, KIND, _fits)
    picture = common.open_image(options.image) if options.image else None
    model, processor, _ = common.load(argparse.Namespace(model=name, device=options.device, dtype=dtype[0]))
    common.say_presets(console, model, options.plan)
    if options.attention:
        model.set_attn_implementation(options.attention)
    inputs = prompt_inputs(model, processor, picture or scene(), options.question or "What is in the picture?")
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("counting", total=warmup + options.repeats)
        rows = costs(
            model, inputs, options.plan or PLANS, options.repeats, warmup, new_tokens,
            lambda done: progress.update(bar, completed=done, description="rounds"),
        )  # fmt: skip
    about = conditions(model, name, inputs, options.repeats, warmup, new_tokens)
    for made in tables(rows, about):
        console.print(made)
    for row in rows:
        for note in row.counts.notes:
            console.print(f"{row.label}: {note}", markup=False, highlight=False)
    if options.out:
        record = {"mmcompress": "cost", "format": 1, **about, "rows": [row.to_dict() for row in rows]}
        update(options.out, KIND, lambda _: record, _fits)
        console.print(f"record: {options.out}", markup=False, highlight=False)


def _fits(value: Any) -> bool:
    return isinstance(value, dict) and value.get("mmcompress") == "cost"


def scene() -> Any:
    """A picture that no user needs to bring."""
    from ...eval.synthetic import items

    return items(1)[0].picture


def tables(rows: Sequence[Any], about: dict[str, Any]) -> list[Table]:
    """Costs of all plans, and their decoder layers in the conventions of the literature."""
    from rich.markup import escape
    from rich.table import Table

    from ...eval.cost.record import HEADINGS, conventions
    from ...eval.machine import threads
    from ...flops import WHOLE

    here = about["machine"]
    title = (
        f"{about['model']}: one prompt of {about['prompt_tokens']} tokens, {about['dtype']}, attention {about['attention']}, "
        f"batch {about['batch']}, medians of {about['repeats']} interleaved rounds, {here['device']}, "
        f"{threads(here['threads'])}"
    )
    caption = (
        f"visual tokens: mean over the LLM layers; FLOPs: {WHOLE}, counted, 2 per multiply-add; vision and overhead (compression) "
        "are the parts of it shown; KV: tensors of the cache; TTFT = vision + compress + "
        "prefill; reached: the speed-up over that of the FLOPs, of the whole and behind the vision part; decode: per token; "
        "±: half of the middle half"
    )
    first, second = (
        Table(title=escape(title), caption=caption),
        Table(title="decoder layers by convention (swiglu_mac and fastv count multiply-adds)"),
    )
    for heading in HEADINGS:
        first.add_column(heading, justify="left" if heading == "plan" else "right")
    for row in rows:
        first.add_row(*map(escape, row.cells()))
    for heading in ("plan", "exact", "swiglu_mac", "fastv", "exact, visual", "swiglu_mac, visual", "fastv, visual"):
        second.add_column(heading, justify="left" if heading == "plan" else "right")
    for cells in conventions(rows):
        second.add_row(*map(escape, cells))
    return [first, second]
