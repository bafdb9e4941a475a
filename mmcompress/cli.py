# SPDX-License-Identifier: Apache-2.0
"""The mmcompress command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import cli_explain, cli_learn
from .assets import CLIP, MODELS, model_path
from .eval import cli as evaluation
from .eval import cli_cost, explain_train

WIDTH = 160
"""Columns of what goes into a file or a pipe, where nothing says how wide it may be: tables are readable there too."""


class UserError(Exception):
    """A mistake of the user: one line, exit status 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if narrow else WIDTH)
    try:
        options.run(options, console)
    except (UserError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        print(f"mmcompress: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmcompress", description="fewer visual tokens for vision-language models")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    demo = command("demo", _demo, "the embedded models with all and with some of their visual tokens")
    demo.add_argument("--out", type=Path, default=Path("demo_output"), help="folder of pictures and record")
    demo.add_argument("--questions", type=int, default=105, help="how many held-out questions (default 105)")
    demo.add_argument("--model", action="append", choices=MODELS, help="only this one; may be given several times")
    demo.add_argument(
        "--objects", type=int, default=4, help="most objects in a scene, 2 to 6 (default 4, the benchmark)"
    )
    demo.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="keep ratios")

    run = command("run", _run, "ask a checkpoint about images, with and without compression")
    run.add_argument("model", help=f"folder or hub name of a supported checkpoint, or one of {', '.join(MODELS)}")
    run.add_argument("--image", type=Path, action="append", default=[], help="picture; may be given several times")
    run.add_argument("--question", required=True)
    run.add_argument(
        "--plan", default="visionzip(keep=0.25)", help="e.g. 'visionzip(keep=0.25) >> fastv(layer=2, keep=0.5)'"
    )
    run.add_argument(
        "--positions", choices=("keep", "reindex"), help="position ids of kept tokens (default: the method's)"
    )
    run.add_argument("--max-new-tokens", type=int, default=64)
    run.add_argument("--device", default=None, help="default: cuda where there is one")
    run.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    run.add_argument("--out", type=Path, help="also write a PNG of the kept tokens")

    command("methods", _methods, "all methods with kind, paper and options; `sweep MODEL --plan all` measures them")

    tune = command(
        "tune", _tune, "search the options of a plan for a checkpoint, and write the best plan (restartable)"
    )
    tune.add_argument("model", help=f"folder or hub name of a supported checkpoint, or one of {', '.join(MODELS)}")
    tune.add_argument(
        "--plan",
        action="append",
        help="method or plan whose options are searched (default vflowopt); with several each is searched, and one without "
        "anything to search is judged as it is",
    )
    tune.add_argument(
        "--budget",
        help="largest part of the visual tokens that may be left, mean over the LLM layers (0.3), or of the FLOPs of the LLM "
        "prefill (flops=0.3)",
    )
    tune.add_argument(
        "--search",
        action="append",
        default=[],
        metavar="METHOD.OPTION=LOW:HIGH",
        help="also search this option (or METHOD.OPTION=ONE|OTHER); may be given several times",
    )
    tune.add_argument(
        "--data",
        type=Path,
        help="folder of pictures, each with its question in a .txt of the same name, or with --task data of that benchmark; "
        "default: synthetic",
    )
    tune.add_argument("--question", default="Describe the picture.", help="for pictures in --data without a .txt")
    tune.add_argument("--samples", type=int, default=30, help="how many pictures (default 30)")
    tune.add_argument("--task", help="benchmark as of `mmcompress eval`, with its data in --data (shapes: none)")
    tune.add_argument(
        "--metric",
        default="state",
        choices=("state", "agreement", "score"),
        help="what plans keep: the final state (default), with --task the same answers as the stock model, or right ones",
    )
    tune.add_argument("--trials", type=int, default=50)
    tune.add_argument("--seed", type=int, default=0)
    tune.add_argument(
        "--out", type=Path, default=Path("plan.json"), help="plan file; trials go beside it as .trials.jsonl"
    )
    tune.add_argument("--device", default=None, help="default: cuda where there is one")
    tune.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))

    bench = command(
        "bench",
        _bench,
        "prefill, decode and KV cache of a checkpoint or of random models, stock and compressed in one run",
    )
    bench.add_argument(
        "what",
        nargs="*",
        default=["llava"],
        help="families (see --list), 'memory' (a 20,480-token video), 'selection' (each method without a model), or 'all' of "
        "these; or 'kernels', or one checkpoint (see below)",
    )
    bench.add_argument("--plan", action="append", help="plan to time; may be given several times")
    bench.add_argument("--repeats", type=int, default=12, help="rounds (default 12)")
    bench.add_argument("--list", action="store_true", help="say what there is")
    bench.add_argument("--out", type=Path, help="JSON record; what is in it already and not measured now stays")
    cli_cost.add_options(bench)
    kernels = bench.add_argument_group(
        "bench kernels", "every kernel in its implementations, interleaved, on random tokens"
    )
    kernels.add_argument("--op", nargs="+", help="operations (default: all)")
    for name, text in (
        ("n", "numbers of tokens"),
        ("d", "widths of tokens"),
        ("k", "numbers of tokens to pick or to keep"),
    ):
        kernels.add_argument(f"--{name}", nargs="+", type=int, help=text)
    kernels.add_argument("--dtype", nargs="+", help="float32, float16, bfloat16")
    kernels.add_argument(
        "--provider", nargs="+", help="naive, compile (torch.compile of the naive one), blocked, triton (on a GPU)"
    )
    kernels.add_argument("--device", help="default: cuda where there is one")
    kernels.add_argument("--full", action="store_true", help="more sizes, types and providers: hours on a CPU")
    kernels.add_argument("--base", metavar="REV", help="also time the kernels of this commit of the repository")
    kernels.add_argument("--patience", type=float, help="leave out what takes longer than so many seconds a run")
    kernels.add_argument("--csv", type=Path, help="also write the record as a table")
    kernels.add_argument("--plot", type=Path, help="also draw time against N")

    evaluation.add_commands(command, _load, MODELS)

    train = command("train", _train, "train an embedded model on the synthetic benchmark (restartable)")
    trained = ("llava-shapes", "llava-next-shapes", "qwen3-vl-shapes", "internvl-shapes", CLIP)
    train.add_argument("model", choices=trained, help="all but llava-shapes start from the one in the package")
    train.add_argument("--out", type=Path, help="default: runs/MODEL")
    train.add_argument("--device", default=None)
    cli_learn.add(command)
    cli_explain.add(command, _load, _open_image)
    explain_train.add(command)
    return parser


def _quiet() -> None:
    """No bars of transformers between our lines; for the process of the command only."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _demo(options: argparse.Namespace, console: Console) -> None:
    from .budget import check_keep
    from .demo import run

    _quiet()
    if options.questions < 7:
        raise UserError(f"--questions {options.questions}: at least 7, one of each type")
    ratios = [float(check_keep(keep)) for keep in options.keep]
    run(options.out, options.questions, ratios, console, options.objects, options.model or MODELS)


def _open_image(path: Path) -> Any:
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise UserError(f"--image {path}: no such file")
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode.startswith("I"):  # 16 bits: converting would clip, not scale
            picture = Image.fromarray((np.asarray(picture).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
        return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"--image {path}: not a readable picture ({error})") from error


def _load(options: argparse.Namespace) -> tuple[Any, Any, str]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _quiet()
    name = str(model_path(options.model)) if options.model in MODELS else options.model
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=options.dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load {name!r} as an image-text model: {str(error).splitlines()[0]}") from error
    if device == "cpu" and options.dtype == "auto":
        model = model.float()
    return model.to(device).eval(), processor, device


def _run(options: argparse.Namespace, console: Console) -> None:
    import torch

    from . import api
    from .eval.synthetic.benchmark import prompt, takes_any_shape
    from .plan import as_pipeline
    from .visualize import Panel, encoded_view, kept_figure, kept_overlay

    pictures = [_open_image(path) for path in options.image]
    plan = as_pipeline(options.plan, positions=options.positions)
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: at least 1")
    model, processor, device = _load(options)
    if getattr(processor, "chat_template", None) is None:
        raise UserError(
            f"{options.model}: the checkpoint has no chat template, so there is no way to know its prompt format"
        )
    text = prompt(processor, options.question, len(pictures))
    inputs = processor(images=pictures or None, text=text, return_tensors="pt").to(device)
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    def answer() -> str:
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=options.max_new_tokens)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    console.print(f"stock       {answer()}", markup=False)
    api.compress(model, plan, timing=True)
    console.print(f"compressed  {answer()}", markup=False)
    if not pictures:
        console.print("no --image: nothing to compress, the stock model ran")
        return
    console.print(str(api.report(model)), highlight=False, markup=False)
    if options.out:
        visuals = api.trace(model).visuals
        whole = takes_any_shape(model)  # else the processor may have cut the middle out
        views = pictures if whole else [encoded_view(processor, pixels) for pixels in inputs["pixel_values"]]
        panels = [
            Panel(
                kept_overlay(view, visual),
                f"image {visual.index}",
                f"{len(visual.kept_cells(10**6))} of {visual.tokens} tokens",
            )
            for view, visual in zip(views, visuals, strict=True)
        ]
        console.print(f"kept tokens: {kept_figure([panels], repr(plan), options.out)}", markup=False)


def _methods(options: argparse.Namespace, console: Console) -> None:
    from . import methods as _registers_all_methods  # noqa: F401
    from .plan import methods

    table = Table(title="methods")
    for heading in ("method", "acts", "paper", "options", "idea"):
        table.add_column(heading, overflow="fold")
    for name, cls in methods().items():
        fields = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(cls))
        idea = (cls.__doc__ or "").strip().splitlines()[0]
        table.add_row(name, cls.kind, cls.paper or "baseline", fields, idea)
    console.print(table)


def _tune(options: argparse.Namespace, console: Console) -> None:
    from .eval import cli_tune

    cli_tune.run(options, console, _load, _pictures, _samples)


def _pictures(folder: Path, question: str) -> list[tuple[Any, str]]:
    """Pictures of a folder in the order of their names, with their questions."""
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder")
    kinds = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in kinds)
    if not paths:
        raise UserError(f"--data {folder}: no pictures ({', '.join(kinds)}) in it")
    texts = [path.with_suffix(".txt") for path in paths]
    questions = [text.read_text().strip() if text.is_file() else question for text in texts]
    return [(_open_image(path), text) for path, text in zip(paths, questions, strict=True)]


def _samples(model: Any, processor: Any, pictures: list[tuple[Any, str]] | None, count: int) -> list[Any]:
    """Model inputs of pictures with questions, one by one; without any, of scenes that the synthetic benchmark does not ask
    about, in batches."""
    from .eval.synthetic.benchmark import items, prepare, prompt, takes_any_shape

    if pictures is None:
        asked = items(count, start=8_000_000, stretched=takes_any_shape(model))
        found = [batch.inputs for batch in prepare(processor, asked, 10)]
    else:
        found = [
            processor(images=[picture], text=[prompt(processor, text)], return_tensors="pt")
            for picture, text in pictures
        ]
    return [inputs.to(model.device, model.dtype) for inputs in found]


BENCH_PLANS = (
    "uniform(keep=0.25)",
    "visionzip(keep=0.25)",
    "divprune(keep=0.25)",
    "fastv(layer=2, keep=0.25)",
    "tome(keep=0.25)",
    "uniform(keep=0.998)",
)
MEMORY_PLANS = ("random(keep=0.1)", "uniform(keep=0.1)", "visionzip(keep=0.1)", "divprune(keep=0.1)", "tome(keep=0.25)")


def _bench(options: argparse.Namespace, console: Console) -> None:
    from .eval.latency import Timing, machine, measure, video_memory
    from .eval.midsize import FAMILIES, build

    if options.list:
        more = {
            "memory": "peak memory of a 20,480-token video", "selection": "every method alone, 2,880 tokens to 288",
            "kernels": "every kernel alone (not part of all)",
        }  # fmt: skip
        for name, text in {**FAMILIES, **more}.items():
            console.print(f"{name:<12}{text}", highlight=False)
        return
    if "kernels" in options.what:
        _bench_kernels(options, console)
        return
    alien = [name for name in KERNEL_OPTIONS if getattr(options, name)]
    if cli_cost.is_checkpoint(options.what, MODELS):
        if alien := [name for name in alien if name not in ("device", "dtype")]:
            raise UserError(f"--{alien[0]} belongs to `mmcompress bench kernels`")
        cli_cost.run(options, console, _load, _open_image)
        return
    if given := [name for name in cli_cost.ONLY if getattr(options, name) is not None]:
        raise UserError(
            f"--{given[0].replace('_', '-')} belongs to `mmcompress bench MODEL`, a folder or embedded model"
        )
    others = ("memory", "selection")
    if alien:
        raise UserError(f"--{alien[0]} belongs to `mmcompress bench kernels`")
    wanted = [*FAMILIES, *others] if "all" in options.what else options.what
    unknown = [name for name in wanted if name not in (*FAMILIES, *others)]
    if unknown:
        raise UserError(f"bench {unknown[0]}: choose among {', '.join((*FAMILIES, *others))}, all; or kernels alone")
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats}: at least 1")
    here = machine()
    record: dict[str, Any] = {"families": {}}
    if options.out and options.out.exists():
        record = json.loads(options.out.read_text())
    conditions = {"batch": 1, "dtype": "float32", "attention": "sdpa", "repeats": options.repeats, "text_tokens": 40}
    for family in wanted:
        if family in others:
            continue
        console.print(f"{FAMILIES[family]} ...", highlight=False)
        rows = measure(build(family), ["stock", *(options.plan or BENCH_PLANS)], options.repeats)
        rounds = f"medians of {options.repeats} interleaved rounds"
        title = f"{family}: batch 1, float32, {rounds}, {here['device']}, {here['threads']} threads"
        table = Table(title=title)
        for heading in Timing.HEADINGS:
            table.add_column(heading, justify="left" if heading == "plan" else "right")
        for row in rows:
            table.add_row(*row.cells())
        console.print(table)
        record["families"][family] = {
            "machine": here, "conditions": conditions, "rows": [dataclasses.asdict(row) for row in rows],
        }  # fmt: skip
        _write(record, options.out)
    if "memory" in wanted:
        memory = [video_memory(plan) for plan in ("stock", *(options.plan or MEMORY_PLANS))]
        table = Table(
            title="prefill of a 20,480-token video, peak resident memory; one N x N float32 matrix is 1600 MiB"
        )
        for heading in ("plan", "tokens in the LLM", "before MiB", "peak MiB", "added MiB"):
            table.add_column(heading, justify="left" if heading == "plan" else "right")
        for found in memory:
            added = found["peak_mib"] - found["before_mib"]
            cells = (
                str(found["kept"] or 20480),
                *(f"{v:.0f}" for v in (found["before_mib"], found["peak_mib"], added)),
            )
            table.add_row(found["plan"], *cells)
        console.print(table)
        record["memory"] = {"machine": here, "rows": memory}
        _write(record, options.out)
    if "selection" in wanted:
        record["selection"] = {"machine": here, "repeats": options.repeats, "rows": _bench_selection(options, console)}
        _write(record, options.out)
    console.print(
        "[dim]FLOPs ratio: stock over compressed, vision tower included, counted by torch; reached: measured speed-up over that "
        "ratio; uniform(keep=0.998) drops a token or two: its decode step shows the hooks alone[/dim]"
    )
    if options.out:
        console.print(f"record: {options.out}")


KERNEL_OPTIONS = ("op", "n", "d", "k", "dtype", "provider", "device", "full", "base", "patience", "csv", "plot")


def _bench_kernels(options: argparse.Namespace, console: Console) -> None:
    import torch

    from .eval.kernel_plot import need_matplotlib, plot
    from .eval.kernels import Base, Sweep, measure, merged, read, write

    if options.what != ["kernels"] or options.plan:
        raise UserError("bench kernels: by itself, without other things to measure and without --plan")
    sweep = Sweep.usual(
        options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        options.full,
        ops=options.op,
        n=options.n,
        d=options.d,
        k=options.k,
        dtypes=options.dtype,
        providers=options.provider,
        repeats=options.repeats,
        patience=options.patience,
    )
    base = Base(options.base) if options.base else None
    if options.plot:
        need_matplotlib()
    old = read(options.out) if options.out and options.out.exists() else []
    rows: list[Any] = []
    with console.status("measuring the device") as status:
        for case in measure(sweep, base):
            if rows and rows[-1].op != case[0].op:
                _show_kernel([row for row in rows if row.op == rows[-1].op], console)
            rows += case
            status.update(f"{case[0].op}: N = {case[0].n}, D = {case[0].d} measured")
            if options.out:
                write(merged(old, rows), options.out)
            if options.csv:
                write(rows, options.csv)
    if not rows:
        raise UserError("bench kernels: every k is above every N; give smaller k or larger N")
    _show_kernel([row for row in rows if row.op == rows[-1].op], console)
    console.print(
        "[dim]ms: median of interleaved runs, beside it the quantiles 0.2 and 0.8; extra MiB: beyond inputs and outputs at the "
        "peak; roofline: the time that the measured copy bandwidth or matmul rate would allow, over the median[/dim]"
    )
    if options.plot:
        plot(rows, options.plot)
    for path in filter(None, (options.out, options.csv, options.plot)):
        console.print(f"record: {path}", markup=False)


def _show_kernel(rows: Sequence[Any], console: Console) -> None:
    """The rows of one operation: a table for each type, and why there are gaps."""
    from rich import box

    from .eval.kernels import AS_BEFORE
    from .eval.operations import OPERATIONS

    naive = {row.key()[:-1]: row for row in rows if row.provider == "naive"}
    for dtype in dict.fromkeys(row.dtype for row in rows):
        mine = [row for row in rows if row.dtype == dtype]
        title = f"{mine[0].op}: {OPERATIONS[mine[0].op].text}; {dtype}, {mine[0].device}, {mine[0].threads} threads"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in mine[0].HEADINGS:
            table.add_column(heading, justify="left" if heading == "provider" else "right")
        for row in mine:
            table.add_row(*row.cells(naive.get(row.key()[:-1])))
        console.print(table)
    for row in rows:
        if row.note and not row.note.startswith(AS_BEFORE):
            size = f"N = {row.n}, D = {row.d}, k = {row.k}, {row.dtype}"
            console.print(f"{row.provider}, {size}: {row.note}", style="dim", highlight=False, markup=False)


def _bench_selection(options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    from .eval.selection import selection_times
    from .plan import methods

    rows = []
    table = Table(title="2,880 tokens of 4,096 features to 288, float32, one visual, without its signals")
    for heading in ("stage", "ms", "naive twins, ms"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for row in selection_times(
        [name for name, cls in methods().items() if cls.kind != "recipe"], repeats=options.repeats
    ):
        rows.append(dataclasses.asdict(row))
        twin = "-" if row.naive_ms is None else f"{row.naive_ms:.1f}"
        table.add_row(row.method, f"{row.milliseconds:.1f} ± {row.iqr / 2:.1f}", twin)
    console.print(table)
    return rows


def _write(record: dict[str, Any], path: Path | None) -> None:
    """Keep what was measured so far."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


def _train(options: argparse.Namespace, console: Console) -> None:
    from .eval.synthetic.clip import ClipTrainer
    from .eval.synthetic.families import FAMILIES
    from .eval.synthetic.train import Trainer
    from .eval.synthetic.transfer import RECIPES, Transfer

    out = options.out or Path("runs") / options.model
    if options.model == CLIP:
        ClipTrainer(out, device=options.device).run()
    elif options.model in FAMILIES:
        Transfer(out, FAMILIES[options.model](), RECIPES[options.model], options.device).run()
    else:
        Trainer(out, device=options.device).run()
