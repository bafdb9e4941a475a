# SPDX-License-Identifier: Apache-2.0
"""The mmcompress command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import cli_check, cli_explain, cli_learn, cli_models, cli_serve
from .assets import CLIP, MODELS, PAGES, VIDEO, checkpoint, split
from .eval import explain_train
from .eval.cli import OutFile, OutFolder, OutPicture, add_load_options, bench, check_least, evaluate, tune
from .eval.machine import check_device

WIDTH = 160
"""Columns of what goes into a file or a pipe, where nothing says how wide it may be: tables are readable there too."""


MOST_FRAMES = 16
"""Frames of a video that `run` shows a model where nothing says how many."""

ON = "the same command goes on where it was"
STOPPED = {
    "eval": f"every answer so far is in {{out}}; {ON}",
    "eval --harness lmms": "the plans that were finished are in {out}; the same command goes on with the others",
    "sweep": f"every answer so far is in {{out}}; {ON}",
    "tune": f"every trial so far is beside {{out}}; {ON}",
    "train": f"the last checkpoint is kept; {ON}",
    "learn": f"the last checkpoint is kept; {ON}",
    "explain-train": f"the labels so far are kept; {ON}",
    "bench": "what was finished is in the record, if --out names one; the same command measures again",
    "demo": "the models that were finished are in {out}; the same command measures again",
}
"""What is kept of a command that is stopped."""


class UserError(Exception):
    """A mistake of the user: one line, exit status 2."""


class _Stopped(KeyboardInterrupt):
    """Ended from outside by a signal."""

    number = signal.SIGINT


class _Console(Console):
    """A console that goes on unheard if what reads it has ended (`| head`): the work is not for the screen alone."""

    def on_broken_pipe(self) -> None:
        _mute()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command: 0 (`check` also 1), or 2 and one line for a mistake of the user and for what system, files or device refuse;
    130 if it is interrupted (128 + the signal if it is ended), with a line that says what is kept. What we did wrong ourselves is
    raised."""
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if getattr(sys.stdout, "errors", None) in ("strict", "surrogateescape"):  # printing ends no run
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and "rest" not in options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = _Console(width=None if known else WIDTH)
    handlers = _listen()
    try:
        _check(options)
        with warnings.catch_warnings():
            warnings.showwarning = _warnings()
            status = options.run(options, console)
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:
        _mute()
        return 0
    except KeyboardInterrupt as stop:
        named = f"{options.command} --harness lmms" if vars(options).get("harness") == "lmms" else options.command
        _say(f"stopped; {STOPPED.get(named, 'nothing was written').format(**vars(options))}")
        return 128 + getattr(stop, "number", signal.SIGINT)
    except (UserError, ValueError, TypeError, NotImplementedError, ImportError) as error:
        _say(str(error))
    except OSError as error:
        _say(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except MemoryError as error:
        _say(f"out of memory {error}")
    except Exception as error:
        if not _is_foreign(error):
            raise
        _say(str(error).strip().splitlines()[0])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 2


def _check(options: argparse.Namespace) -> None:
    """What is to be written can be written, and the device is there: before any work."""
    for name, value in vars(options).items():
        if isinstance(value, OutFile):
            value.check(f"--{name.replace('_', '-')}")
    if device := getattr(options, "device", None):
        check_device(device)


def _listen() -> dict[int, Any]:
    """Let what ends a process (kill, a closed terminal) end it as Ctrl-C does; returns the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def stop(number: int, _: Any) -> None:
        error = _Stopped()
        error.number = signal.Signals(number)
        raise error

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) is signal.SIG_DFL}


def _is_foreign(error: Exception) -> bool:
    """Whether an error is a refusal of Pillow or of the device, which no change of ours would mend."""
    import torch
    from PIL import Image

    device = tuple(getattr(torch, name) for name in ("OutOfMemoryError", "AcceleratorError") if hasattr(torch, name))
    return isinstance(error, (Image.DecompressionBombError, *device))


def _say(text: str) -> None:
    print(f"mmcompress: {text}", file=sys.stderr)


def _mute() -> None:
    """What is still printed goes nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _warnings() -> Callable[..., None]:
    """Shows each warning once, as a user of the command needs it: in one line, without the place in the code."""
    told: set[str] = set()

    def show(message: Warning | str, *place: object) -> None:
        if str(message) not in told:
            print(f"warning: {message}", file=sys.stderr)
        told.add(str(message))

    return show


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmcompress", description="fewer visual tokens for vision-language models")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    demo = command("demo", _demo, "the embedded models with all and with some of their visual tokens")
    demo.add_argument("--out", type=OutFolder, default="demo_output", help="folder of pictures and record")
    demo.add_argument("--questions", type=int, default=105, help="how many held-out questions (default 105)")
    demo.add_argument(
        "--model",
        action="append",
        type=_of_shapes,
        help=f"only this one of {', '.join(MODELS)}, with @8x4 behind it a copy as wide as real ones; may be given several times",
    )
    demo.add_argument(
        "--objects", type=int, default=4, help="most objects in a scene, 2 to 6 (default 4, the benchmark)"
    )
    demo.add_argument(
        "--keep", nargs="+", default=["50%", "25%", "10%"], help="ratios as 0.25 or 25%% (default 50%% 25%% 10%%)"
    )

    run = command("run", _run, "ask a checkpoint about images or a video, with and without compression")
    run.add_argument(
        "model",
        help=f"folder or hub name of a supported checkpoint, or one of {', '.join(MODELS)}; NAME@8x4: a copy of it that answers "
        "the same with a language model 8 and a vision encoder 4 times as wide (also for bench, sweep, eval)",
    )
    run.add_argument("--image", type=Path, action="append", default=[], help="picture; may be given several times")
    run.add_argument("--video", type=Path, metavar="FILE", help="a video; needs the extra 'video'")
    run.add_argument("--frames", type=int, metavar="N", help=f"exactly so many of it (default: at most {MOST_FRAMES})")
    run.add_argument("--fps", type=float, help="so many frames of it a second")
    run.add_argument("--question", required=True)
    run.add_argument(
        "--plan",
        default="divprune(keep=0.25)",
        help="default: divprune(keep=0.25), a quarter of the tokens; others: 'divprune(keep=50%%) >> fastv(layer=2, keep=64)'",
    )
    run.add_argument(
        "--positions", choices=("keep", "reindex"), help="position ids of kept tokens (default: the method's)"
    )
    run.add_argument("--max-new-tokens", type=int, default=64)
    add_load_options(run)
    run.add_argument("--out", type=OutPicture, help="also write a PNG of the kept tokens")

    cli_check.add(command, _load)
    cli_models.add(command)
    cli_serve.add(command)
    command("methods", _methods, "all methods with kind, paper and options; `sweep MODEL --plan all` measures them")

    tune.add_command(command, _load, _open_image, MODELS)
    bench.add_command(command, _load, _open_image, MODELS)
    evaluate.add_commands(command, _load, MODELS)

    train = command("train", _train, "train an embedded model on the synthetic benchmark (restartable)")
    trained = ("llava-shapes", "llava-next-shapes", "qwen3-vl-shapes", "internvl-shapes", CLIP, PAGES, VIDEO)
    train.add_argument("model", choices=trained, help="all but llava-shapes start from one in the package")
    train.add_argument("--out", type=OutFolder, help="default: runs/MODEL")
    train.add_argument("--device", default=None)
    cli_learn.add(command)
    cli_explain.add(command, _load, _open_image)
    explain_train.add(command)
    return parser


def _of_shapes(name: str) -> str:
    if split(name)[0] not in MODELS:
        raise argparse.ArgumentTypeError(f"{name}: choose among {', '.join(MODELS)}")
    return name


def _quiet() -> None:
    """No bars of transformers between our lines; for the process of the command only."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _demo(options: argparse.Namespace, console: Console) -> None:
    from .budget import read_keep
    from .demo import run

    _quiet()
    if options.questions < 7:
        raise UserError(f"--questions {options.questions}: at least 7, one of each type")
    ratios = [read_keep(keep) for keep in options.keep]
    if counts := [keep for keep in ratios if isinstance(keep, int)]:
        raise UserError(
            f"--keep {counts[0]}: a count, and these models have pictures of other numbers of tokens: give a ratio"
        )
    run(options.out, options.questions, ratios, console, options.objects, options.model or MODELS)


def _open_image(path: Path) -> Any:
    from .pictures import open_picture

    return open_picture(path, f"--image {path}")


def _open_video(options: argparse.Namespace) -> tuple[Any, ...]:
    """The frames of --video that are asked for, if there is one."""
    from .videos import read_video

    if options.video is None:
        if given := [name for name in ("frames", "fps") if getattr(options, name) is not None]:
            raise UserError(f"--{given[0]} chooses frames of a video: give --video FILE")
        return ()
    most = MOST_FRAMES if options.frames is None and options.fps is None else None
    return (read_video(options.video, options.frames, options.fps, most=most, name=f"--video {options.video}"),)


def _load(options: argparse.Namespace) -> tuple[Any, Any, str]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from .eval.team import Team

    _quiet()
    written, widths = split(options.model)
    name = checkpoint(written)
    device = options.device or Team.here().device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=options.dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load {name!r} as an image-text model: {str(error).splitlines()[0]}") from error
    if torch.device(device).type == "cpu" and options.dtype == "auto":
        model = model.float()
    if widths:
        from .eval.widen import widen

        model = widen(model, *widths)
    return model.to(device).eval(), processor, device


def _run(options: argparse.Namespace, console: Console) -> None:
    import torch

    from . import api
    from .eval.cost.record import prompt_text
    from .eval.data import Question
    from .eval.inputs import inputs_of
    from .eval.prompts import unknown_words
    from .eval.synthetic.benchmark import takes_any_shape
    from .plan import as_pipeline
    from .videos import check_frames
    from .visualize import Panel, encoded_view, kept_figure, kept_overlay

    pictures = [_open_image(path) for path in options.image]
    clips = _open_video(options)
    plan = as_pipeline(options.plan, positions=options.positions)
    check_least(options, max_new_tokens=1)
    if options.out and clips:
        raise UserError(
            "--out draws what is kept of pictures; for a video: mmcompress explain MODEL --video FILE --plan PLAN"
        )
    model, processor, _ = _load(options)
    if unknown := unknown_words(processor, [options.question]):
        warnings.warn(unknown, UserWarning, stacklevel=1)
    question = Question("--question", options.question, tuple(pictures), videos=clips)
    said = prompt_text(processor, options.question, len(pictures), len(clips))
    _, inputs, wrong = inputs_of(model, processor, [question], [said], [0])
    if wrong:
        raise UserError(f"--question cannot be asked: {wrong[question.id]}")
    inputs = inputs.to(model.device, model.dtype)
    for clip in clips:
        check_frames(plan, model, inputs)
        console.print(f"{len(clip)} of {clip.total} frames, {clip.span}", highlight=False, markup=False)

    def answer() -> str:
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=options.max_new_tokens)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    console.print(f"stock       {answer()}", markup=False)
    api.compress(model, plan, timing=True)
    console.print(f"compressed  {answer()}", markup=False)
    if not pictures and not clips:
        console.print("no --image and no --video: nothing to compress, the stock model ran")
        return
    console.print(str(api.report(model, inputs)), highlight=False, markup=False)
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
        fields = ", ".join(f"{f.name}={f.default!r}" for f in cls.fields() if f.name != "on")
        idea = (cls.__doc__ or "").strip().splitlines()[0]
        table.add_row(name, cls.kind, cls.paper or "baseline", fields, idea)
    console.print(table)


def _train(options: argparse.Namespace, console: Console) -> None:
    from .eval.synthetic.clip import ClipTrainer
    from .eval.synthetic.families import FAMILIES
    from .eval.synthetic.pages.train import GO_ON, PageTrainer
    from .eval.synthetic.train import Trainer
    from .eval.synthetic.transfer import RECIPES, Transfer
    from .eval.synthetic.videos.train import VideoRecipe, VideoTrainer

    out = options.out or Path("runs") / options.model
    if options.model == CLIP:
        ClipTrainer(out, device=options.device).run()
    elif options.model == PAGES:
        PageTrainer(out, GO_ON, options.device).run()
    elif options.model == VIDEO:
        VideoTrainer(out, VideoRecipe(), options.device).run()
    elif options.model in FAMILIES:
        Transfer(out, FAMILIES[options.model](), RECIPES[options.model], options.device).run()
    else:
        Trainer(out, device=options.device).run()
