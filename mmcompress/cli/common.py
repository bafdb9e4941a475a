# SPDX-License-Identifier: Apache-2.0
"""What several commands share: types of options that are checked before any work, and how a checkpoint is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..assets import MODELS, checkpoint, split
from ..records import check_output

if TYPE_CHECKING:
    from rich.console import Console


class Checked:
    """The type of an option that `main` checks before any work, without torch."""

    def check(self, option: str) -> None:
        """Raise ValueError if what was given to `option` cannot be right."""
        raise NotImplementedError


class OutFile(type(Path()), Checked):  # type: ignore[misc]
    """A file to be written."""

    def check(self, option: str) -> None:
        check_output(option, self)


class OutPicture(OutFile):
    """A picture that matplotlib writes, of a kind that it knows."""

    def check(self, option: str) -> None:
        from ..visualize.figure import need_matplotlib

        figure, canvas = need_matplotlib()
        check_output(option, self, kinds=sorted(canvas(figure()).get_supported_filetypes()))


class OutFolder(OutFile):
    """A folder to be written into."""

    def check(self, option: str) -> None:
        check_output(option, self, folder=True)


class Plan(str, Checked):
    """A plan."""

    def check(self, option: str) -> None:
        from ..catalog import check_plan

        check_plan(self)


class Model(str, Checked):
    """Folder or hub name of a checkpoint, or an embedded model."""

    def check(self, option: str) -> None:
        checkpoint(split(self)[0])


def add_model(parser: argparse.ArgumentParser) -> None:
    """The checkpoint that a command is about."""
    parser.add_argument(
        "model",
        type=Model,
        help=f"folder or hub name of a checkpoint, or one of {', '.join(MODELS)}; NAME@8x4: a copy of one that answers the "
        "same with a language model 8 and a vision encoder 4 times as wide",
    )


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Where and in which type a checkpoint is loaded."""
    parser.add_argument("--device", help="where it runs: cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of weights and features; auto: the checkpoint's on a GPU, float32 on a CPU",
    )


def check_least(options: argparse.Namespace, **least: int) -> None:
    """Raise ValueError for a number of the options that is below its least value."""
    for name, value in least.items():
        if getattr(options, name) is not None and getattr(options, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {value}")


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """How benchmarks of videos show them."""
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="of each video of a benchmark at most so many, evenly spread (default 32; eval --harness lmms: 8)",
    )
    parser.add_argument(
        "--subtitles",
        action="store_true",
        help="videomme, longvideobench: what is said while a frame is shown, before the question",
    )


def showing(options: argparse.Namespace, *tasks: str) -> Any:
    """How videos are shown, of the options of `add_video_options`. Raises ValueError where no task has videos on disk."""
    from ..eval.data import Showing
    from ..eval.data.films import FILMS

    check_least(options, frames=1)
    if (options.frames is not None or options.subtitles) and not {*tasks} & {*FILMS}:
        given = "--subtitles" if options.frames is None else "--frames"
        raise ValueError(f"{given} belongs to benchmarks of videos: --task {', '.join(FILMS)}")
    return Showing(**({} if options.frames is None else {"frames": options.frames}), subtitles=options.subtitles)


def open_image(path: Path) -> Any:
    """A picture, or an error that a user understands."""
    from ..pictures import open_picture

    return open_picture(path, f"--image {path}")


def say_presets(console: Console, model: Any, plans: Sequence[str] | None) -> None:
    """What the presets among some plans are for a model."""
    from ..api import plan_for
    from ..presets import NAMES

    for name in dict.fromkeys(plan.strip() for plan in plans or () if plan.strip() in NAMES):
        found = plan_for(model, name)
        console.print(f"{found!r} is {found.preset}", markup=False, highlight=False, soft_wrap=True)


def quiet() -> None:
    """No bars of transformers between our lines; for the process of the command only."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load(options: argparse.Namespace) -> tuple[Any, Any, str]:
    """Model, processor and device of the options: `model`, and those of `add_load_options`."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..eval.team import Team

    quiet()
    written, widths = split(options.model)
    name = checkpoint(written)
    device = options.device or Team.here().device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=options.dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load {name!r} as an image-text model: {str(error).splitlines()[0]}") from error
    if torch.device(device).type == "cpu" and options.dtype == "auto":
        model = model.float()
    if widths:
        from ..eval.widen import widen

        model = widen(model, *widths)
    return model.to(device).eval(), processor, device
