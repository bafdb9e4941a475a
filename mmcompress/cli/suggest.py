# SPDX-License-Identifier: Apache-2.0
"""`mmcompress suggest`: which plan to take, measured here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common
from .common import OutFile, Plan, add_load_options, add_model, check_least

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress suggest llava-shapes@8x4 --max-loss 2 --budget flops=0.6"


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.description = (parser.description or "") + (
        " Measured on this machine: how often the compressed model would write what the stock model writes, and how much "
        "sooner."
    )
    add_model(parser)
    parser.add_argument("--image", type=Path, action="append", default=[], help="picture; may be given several times")
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of pictures, each with its question in a .txt of the same name if there is one (default: --image, else drawn "
        "scenes, which mean something to the embedded models only)",
    )
    parser.add_argument("--question", default="Describe the picture.", help="for pictures without a .txt")
    parser.add_argument("--samples", type=int, default=12, help="at most so many pictures of --data, or scenes")
    parser.add_argument(
        "--max-loss",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="how many of 100 words may differ from the stock model's",
    )
    parser.add_argument(
        "--budget",
        help="largest part of the visual tokens that may be left, mean over the LLM layers (30%% or tokens=0.3), or of the FLOPs "
        "of the LLM layers (flops=0.4) (default: any)",
    )
    parser.add_argument(
        "--plan", type=Plan, action="append", help="try this beside the presets (default: eight); several allowed"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer, in tokens")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the clock")
    parser.add_argument("--out", type=OutFile, help="also write everything as JSON")
    add_load_options(parser)


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure, show, and say what to take."""
    check_least(options, samples=1, max_new_tokens=1, repeats=1)
    if options.max_loss < 0:
        raise ValueError(f"--max-loss {options.max_loss:g}: at least 0 points")
    if options.image and options.data:
        raise ValueError("--image or --data: one of them")
    from rich.progress import Progress

    from ..advice import advise, best
    from ..records import write_json
    from ..spending import check, read_budget

    budget, unit = (None, "tokens") if options.budget is None else read_budget(options.budget)
    check(budget, unit)
    shown = _shown(options)
    model, processor, _ = common.load(options)
    prompts = _prompts(model, processor, shown, options.samples)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=1.0)
        found = advise(
            model, prompts, options.plan or (), unit, options.max_new_tokens, options.repeats,
            lambda text, part: progress.update(bar, description=text, completed=part),
        )  # fmt: skip
    chosen, fits = best(found, options.max_loss, budget)
    console.print(_table(found, chosen, options.model, len(prompts), unit))
    for one in found:
        if one.refused:
            console.print(f"{one.plan}: {one.refused}", markup=False, highlight=False)
    for line in _lines(chosen, fits, options, budget, unit):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.out:
        rows = [
            {
                "plan": one.plan, "presets": one.presets, "agreement": one.agreement, "left": one.left, "unit": unit,
                "refused": one.refused, "cost": one.cost.to_dict() if one.cost else None,
            }
            for one in found
        ]  # fmt: skip
        write_json(options.out, {"model": str(options.model), "plan": chosen.plan, "fits": fits, "rows": rows})
        console.print(f"written: {options.out}", markup=False, highlight=False)


def _shown(options: argparse.Namespace) -> list[tuple[Any, str]]:
    """Pictures and questions; none where scenes are to be drawn."""
    from .tune import pictures_of

    if options.data:
        return pictures_of(options.data, options.question)[: options.samples]
    return [(common.open_image(path), options.question) for path in options.image]


def _prompts(model: Any, processor: Any, shown: list[tuple[Any, str]], samples: int) -> list[Any]:
    from ..eval.cost.record import prompt_inputs
    from ..eval.synthetic.benchmark import items, takes_any_shape
    from .tune import HELD_OUT

    if not shown:
        scenes = items(samples, start=HELD_OUT, stretched=takes_any_shape(model))
        shown = [(item.picture, item.question.text) for item in scenes]
    return [prompt_inputs(model, processor, picture, question) for picture, question in shown]


def _table(found: list[Any], chosen: Any, model: str, prompts: int, unit: str) -> Any:
    from rich.markup import escape
    from rich.table import Table

    stock = next(one.cost.stock[1] for one in found if one.cost)
    table = Table(
        title=escape(f"{model}, {prompts} pictures; stock: first token after {stock.spread('ttft').median:.0f} ms"),
        caption="agreement: words that the stock model would write too; speed-up: of the first token; FLOPs: of the whole prefill, "
        "vision included; left: "
        + ("visual tokens, mean over the LLM layers" if unit == "tokens" else "FLOPs of the LLM layers"),
    )
    for heading in ("plan", "preset", "agreement", "speed-up", "FLOPs", "left"):
        table.add_column(heading, justify="left" if heading in ("plan", "preset") else "right")
    for one in found:
        if not one.refused:
            table.add_row(
                escape(one.plan), ", ".join(one.presets), f"{one.agreement:.1%}", f"{one.speedup:.2f}x",
                f"{one.cost.flops_ratio:.0%}", f"{one.left:.0%}", style="bold" if one is chosen else None,
            )  # fmt: skip
    return table


def _lines(chosen: Any, fits: bool, options: argparse.Namespace, budget: float | None, unit: str) -> list[str]:
    """What to take and how, in sentences."""
    name = next(iter(chosen.presets), chosen.plan)
    limits = f"--max-loss {options.max_loss:g}" + ("" if budget is None else f" and {unit} = {budget:g}")
    lines = [] if fits else [f"no plan is within {limits}; this one comes nearest"]
    lines.append(
        f"take {chosen.plan}: first token {chosen.speedup:.2f} times as soon, {chosen.cost.flops_ratio:.0%} of the FLOPs, "
        f"{chosen.agreement:.1%} of the stock model's words"
    )
    if fits and chosen.speedup < 1.05:
        lines.append("that is hardly faster here: the model is too small, or other work ran beside it")
    lines.append(f"Python:  mmcompress.compress(model, {name!r})")
    lines.append(f"shell:   mmcompress run {options.model} --image FILE --question TEXT --plan {chosen.plan!r}")
    return lines
