# SPDX-License-Identifier: Apache-2.0
"""`mmcompress bench`: random mid-size models, memory, selections; a checkpoint and kernels have their own files."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...assets import checkpoint
from ...records import read, update
from ..common import OutFile, check_least, say_presets
from . import film, kernels, model, peers, real, serving

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress bench llava-shapes@8x4 --plan 'voronoi(keep=25%)' --repeats 5"
PLANS = (
    "uniform(keep=0.25)",
    "visionzip(keep=0.25)",
    "divprune(keep=0.25)",
    "fastv(layer=2, keep=0.25)",
    "tome(keep=0.25)",
    "uniform(keep=0.998)",
)
MEMORY_PLANS = ("random(keep=0.1)", "uniform(keep=0.1)", "visionzip(keep=0.1)", "divprune(keep=0.1)", "tome(keep=0.25)")
OVERHEAD_PLANS = (
    "uniform(keep=0.25)",
    "divprune(keep=0.25)",
    "visionzip(keep=0.25)",
    "fastv(layer=2, keep=0.25)",
    "pyramiddrop",
)
OTHERS = ("memory", "selection", "mass", "overhead")
KIND = "`mmcompress bench`"
LISTED = {
    "memory": "peak memory of a 20,480-token video", "selection": "every method alone, or each --plan in turn, 2,880 tokens to 288",
    "mass": "merged tokens that weigh what they stand for, in every way of adding it",
    "kernels": "every kernel alone (not part of all)", "peers": "every method against plain PyTorch (not part of all)",
    "overhead": "ATen calls and processor time that a plan adds to a prefill of 32 tiny layers",
    "video": "time to the first token of a 20,480-token video in its parts, selections, memory (not part of all)",
    "real": "released models at their real size, random weights (not part of all)",
}  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "what",
        nargs="*",
        default=["llava"],
        help="families (see --list), 'memory' (a 20,480-token video), 'selection' (each method without a model), 'mass' (merged "
        "tokens that weigh), 'overhead' (calls and Python of a prefill), or 'all' of these; or 'kernels', 'peers', 'real', "
        "'video', or "
        "one checkpoint, or 'serving' and one (see below)",
    )
    parser.add_argument("--plan", action="append", help="plan to time; may be given several times")
    parser.add_argument("--repeats", type=int, help="rounds (default 12; real, video: 3)")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--out", type=OutFile, help="JSON record; what is in it already and not measured now stays")
    model.add_options(parser)
    real.add_options(parser)
    kernels.add_options(parser)
    serving.add_options(parser)
    film.add_options(parser)


def run(options: argparse.Namespace, console: Console) -> None:
    """Find out what is to be measured, and measure it."""
    from ...catalog import check_plan

    if "peers" not in options.what:
        for plan in options.plan or ():
            check_plan(plan.replace("{keep}", "0.5") if "video" in options.what else plan)
    from ...eval.cost.midsize import FAMILIES
    from ...flops import WHOLE

    if options.list:
        for name, text in {**FAMILIES, **LISTED}.items():
            console.print(f"{name:<12}{text}", highlight=False)
        return
    if options.what[:1] == ["serving"]:
        serving.run(options, console)
        return
    if given := [name for name in serving.ONLY if getattr(options, name) is not None]:
        raise ValueError(f"--{given[0]} belongs to `mmcompress bench serving MODEL`")
    whole = "real" in options.what
    if options.repeats is None:
        options.repeats = 3 if whole or "video" in options.what else 12
    if "video" in options.what:
        film.run(options, console)
        return
    if given := [name for name in film.ONLY if getattr(options, name)]:
        raise ValueError(f"--{given[0].replace('_', '-')} belongs to `mmcompress bench video`")
    if "kernels" in options.what:
        kernels.run(options, console)
        return
    if "peers" in options.what:
        peers.run(options, console)
        return
    alien = [name for name in kernels.OPTIONS if getattr(options, name)]
    one = not whole and model.is_checkpoint(options.what)
    if alien := [name for name in alien if not (one or whole) or name not in ("device", "dtype")]:
        raise ValueError(f"--{alien[0]} belongs to `mmcompress bench kernels`")
    if whole:
        real.run(options, console)
        return
    if given := [name for name in real.ONLY if getattr(options, name) is not None]:
        raise ValueError(f"--{given[0]} belongs to `mmcompress bench real`")
    if one:
        model.run(options, console)
        return
    if given := [name for name in model.ONLY if getattr(options, name) is not None]:
        raise ValueError(
            f"--{given[0].replace('_', '-')} belongs to `mmcompress bench MODEL`, a folder or embedded model"
        )
    wanted = [*FAMILIES, *OTHERS] if "all" in options.what else options.what
    if unknown := [name for name in wanted if name not in (*FAMILIES, *OTHERS)]:
        checkpoint(unknown[0])  # a slip of the pen in the name of a model says so itself
        raise ValueError(f"bench {unknown[0]}: choose among {', '.join((*FAMILIES, *OTHERS))}, all; or kernels alone")
    check_least(options, repeats=1)
    if options.out:
        read(options.out, KIND, _fits)
    for family in (name for name in wanted if name not in OTHERS):
        _keep(options.out, family, _family(family, options, console))
    for name, measure in (("memory", _memory), ("selection", _selection), ("mass", _mass), ("overhead", _overhead)):
        if name in wanted:
            _keep(options.out, name, measure(options, console))
    console.print(
        f"[dim]FLOPs ratio: stock over compressed, {WHOLE}, counted by torch; reached: measured speed-up over that "
        "ratio; uniform(keep=0.998) drops a token or two: its decode step shows the hooks alone[/dim]"
    )
    if options.out:
        console.print(f"record: {options.out}", markup=False, highlight=False)


def _family(family: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """A mid-size random model of a family, stock and with every plan."""
    from rich.table import Table

    from ...eval.cost.latency import Timing, measure
    from ...eval.cost.midsize import FAMILIES, build
    from ...eval.machine import machine, threads

    console.print(f"{FAMILIES[family]} ...", highlight=False)
    model = build(family)
    say_presets(console, model, options.plan)
    rows = measure(model, ["stock", *(options.plan or PLANS)], options.repeats)
    here, rounds = machine(), f"medians of {options.repeats} interleaved rounds"
    table = Table(title=f"{family}: batch 1, float32, {rounds}, {here['device']}, {threads(here['threads'])}")
    for heading in Timing.HEADINGS:
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    conditions = {"batch": 1, "dtype": "float32", "attention": "sdpa", "repeats": options.repeats, "text_tokens": 40}
    return {"machine": here, "conditions": conditions, "rows": [dataclasses.asdict(row) for row in rows]}


def _memory(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Peak memory of a long video."""
    from rich.table import Table

    from ...eval.cost.latency import video_memory
    from ...eval.machine import machine

    rows = [video_memory(plan) for plan in ("stock", *(options.plan or MEMORY_PLANS))]
    table = Table(title="prefill of a 20,480-token video, peak resident memory; one N x N float32 matrix is 1600 MiB")
    for heading in ("plan", "tokens in the LLM", "before MiB", "peak MiB", "added MiB"):
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    for row in rows:
        sizes = (row["before_mib"], row["peak_mib"], row["peak_mib"] - row["before_mib"])
        table.add_row(row["plan"], str(row["kept"] or 20480), *(f"{size:.0f}" for size in sizes))
    console.print(table)
    return {"machine": machine(), "rows": rows}


def _selection(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every method without a model around it, or some plans, interleaved."""
    from rich.table import Table

    from ...eval.cost.selection import selection_times
    from ...eval.machine import machine
    from ...plan import methods

    rows: list[dict[str, Any]] = []
    table = Table(
        title="2,880 tokens of 4,096 features to 288, merging included, float32, one visual, without its signals"
    )
    for heading in ("stage", "ms", "naive twins, ms", "processor ms", "of the first"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    names = options.plan or [name for name, cls in methods().items() if cls.kind != "recipe"]
    for row in selection_times(names, repeats=options.repeats, together=bool(options.plan)):
        rows.append(dataclasses.asdict(row))
        twin = "-" if row.naive_ms is None else f"{row.naive_ms:.1f}"
        share = f"{row.processor_ms / rows[0]['processor_ms']:.2f}" if options.plan else "-"
        table.add_row(row.method, f"{row.milliseconds:.1f} ± {row.iqr / 2:.1f}", twin, f"{row.processor_ms:.1f}", share)
    console.print(table)
    return {"machine": machine(), "repeats": options.repeats, "rows": rows}


def _mass(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every mid-size family with voronoi, or with the first plan that is given, in every way of adding masses."""
    import torch
    from rich.table import Table

    from ...eval.cost.masses import PLAN, MassCost, mass_costs, there
    from ...eval.cost.midsize import FAMILIES, build, one_image_prompt
    from ...eval.machine import machine, threads

    cuda = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if cuda else (torch.float32, "cpu")
    plan, here = (options.plan or [PLAN])[0], machine()
    title = f"{plan}: batch 1, {str(dtype)[6:]}, medians of {options.repeats} interleaved rounds, {here['device']}"
    table = Table(title=f"{title}, {threads(here['threads'])}; added: to the plan without masses (none)")
    for heading in ("family", *MassCost.HEADINGS):
        table.add_column(heading, justify="left" if heading in ("family", "attention", "masses") else "right")
    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        model = build(family, dtype).to(device)
        say_presets(console, model, [plan])
        for row in mass_costs(model, one_image_prompt(model), plan, there(model), options.repeats):
            rows.append({"family": family, **dataclasses.asdict(row)})
            table.add_row(family, *row.cells())
    console.print(table)
    return {"machine": here, "plan": plan, "dtype": str(dtype)[6:], "repeats": options.repeats, "rows": rows}


def _overhead(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Calls and processor time of plans where there is next to nothing to compute."""
    from rich.table import Table

    from ...eval.cost.overhead import LAYERS, Overhead, embedded
    from ...eval.machine import machine

    rows = list(embedded(model.scene(), options.repeats, options.plan or OVERHEAD_PLANS))
    table = Table(title=f"what a plan adds to a prefill of {LAYERS} tiny layers, batch 1, float32, one thread")
    for heading in Overhead.HEADINGS:
        table.add_column(heading, justify="left" if heading in ("model", "plan") else "right")
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    return {
        "machine": machine(),
        "layers": LAYERS,
        "repeats": options.repeats,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _fits(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("families"), dict)


def _keep(path: Path | None, name: str, measured: dict[str, Any]) -> None:
    """Add what was measured to what is in the record by now."""

    def add(record: dict[str, Any] | None) -> dict[str, Any]:
        record = record or {"families": {}}
        (record if name in OTHERS else record["families"])[name] = measured
        return record

    if path:
        update(path, KIND, add, _fits)
