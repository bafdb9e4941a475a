# SPDX-License-Identifier: Apache-2.0
"""`mmcompress run`: one question, stock and compressed."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common
from .common import OutPicture, Plan, add_load_options, add_model, check_least

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress run llava-shapes --image a.png --question 'what color is the star ?' --plan 'voronoi(keep=25%)'"
MOST_FRAMES = 16
"""Frames of a video that a model is shown where nothing says how many."""


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model(parser)
    parser.add_argument("--image", type=Path, action="append", default=[], help="picture; may be given several times")
    parser.add_argument("--video", type=Path, metavar="FILE", help="a video; needs the extra 'video'")
    parser.add_argument(
        "--frames", type=int, metavar="N", help=f"exactly so many of it (default: at most {MOST_FRAMES})"
    )
    parser.add_argument("--fps", type=float, help="so many frames of it a second (default: by --frames)")
    parser.add_argument("--question", required=True, help="what to ask")
    parser.add_argument(
        "--plan",
        type=Plan,
        default="balanced",
        help="fast, balanced or quality, a method or several in a row, as 'divprune(keep=50%%) >> fastv(layer=2, keep=64)'",
    )
    parser.add_argument(
        "--positions", choices=("keep", "reindex"), help="position ids of kept tokens (default: the method's)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens")
    add_load_options(parser)
    parser.add_argument("--out", type=OutPicture, help="also write a PNG of the kept tokens")


def run(options: argparse.Namespace, console: Console) -> None:
    """Ask twice, and say what the compressed call did."""
    import torch

    from .. import api
    from ..eval.cost.record import prompt_text
    from ..eval.data import Question
    from ..eval.inputs import inputs_of
    from ..eval.prompts import unknown_words
    from ..eval.synthetic.benchmark import takes_any_shape
    from ..plan import as_pipeline
    from ..videos import check_frames
    from ..visualize import Panel, encoded_view, kept_figure, kept_overlay

    pictures = [common.open_image(path) for path in options.image]
    clips = _open_video(options)
    as_pipeline(options.plan, positions=options.positions)  # a mistake is said before the model is loaded
    check_least(options, max_new_tokens=1)
    if options.out and clips:
        raise ValueError(
            "--out draws what is kept of pictures; for a video: mmcompress explain MODEL --video FILE --plan PLAN"
        )
    model, processor, _ = common.load(options)
    if unknown := unknown_words(processor, [options.question]):
        warnings.warn(unknown, UserWarning, stacklevel=1)
    question = Question("--question", options.question, tuple(pictures), videos=clips)
    said = prompt_text(processor, options.question, len(pictures), len(clips))
    _, inputs, wrong = inputs_of(model, processor, [question], [said], [0])
    if wrong:
        raise ValueError(f"--question cannot be asked: {wrong[question.id]}")
    inputs = inputs.to(model.device, model.dtype)
    plan = api.plan_for(model, options.plan, positions=options.positions)
    for clip in clips:
        check_frames(plan, model, inputs)
        console.print(f"{len(clip)} of {clip.total} frames, {clip.span}", highlight=False, markup=False)

    def answer() -> str:
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=options.max_new_tokens)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    stock = answer()
    console.print(f"stock       {stock}", markup=False)
    api.compress(model, plan, timing=True)
    compressed = answer()
    console.print(f"compressed  {compressed}", markup=False)
    if not pictures and not clips:
        console.print("no --image and no --video: nothing to compress, the stock model ran")
        return
    console.print(str(api.report(model, inputs)), highlight=False, markup=False)
    if options.out:
        visuals = api.trace(model).visuals
        whole = takes_any_shape(model)  # else the processor may have cut the middle out
        views = pictures if whole else [encoded_view(processor, pixels) for pixels in inputs["pixel_values"]]
        rows = []
        for view, visual in zip(views, visuals, strict=True):
            left = len(visual.kept_cells(10**6))
            rows.append(
                [
                    Panel(view, f"image {visual.index + 1}, stock: all {visual.tokens} tokens", stock),
                    Panel(kept_overlay(view, visual), f"{plan!r}: {left} tokens at the last layer", compressed),
                ]
            )
        console.print(f"kept tokens: {kept_figure(rows, options.question, options.out)}", markup=False)


def _open_video(options: argparse.Namespace) -> tuple[Any, ...]:
    """The frames of --video that are asked for, if there is one."""
    from ..videos import read_video

    if options.video is None:
        if given := [name for name in ("frames", "fps") if getattr(options, name) is not None]:
            raise ValueError(f"--{given[0]} chooses frames of a video: give --video FILE")
        return ()
    most = MOST_FRAMES if options.frames is None and options.fps is None else None
    return (read_video(options.video, options.frames, options.fps, most=most, name=f"--video {options.video}"),)
