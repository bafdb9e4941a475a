# SPDX-License-Identifier: Apache-2.0
"""The mmcompress command: one file per subcommand, of which only the one that is asked for is imported, and torch by none of them
before the options are read and checked."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import __version__
from .common import Checked

WIDTH = 160
"""Columns of what goes into a file or a pipe, where nothing says how wide it may be: tables are readable there too."""

COMMANDS = {
    "use": {
        "demo": "an embedded model with all and with some of its visual tokens: answers, accuracy, time saved, a page",
        "run": "ask a checkpoint about images or a video, with and without compression",
        "suggest": "which plan to take for a checkpoint on your pictures and this machine",
        "app": "a page to play with: your picture, a question, a plan; answers, time and kept tokens side by side",
        "serve": "vLLM's server for OpenAI's API, with compressed images; further options are vLLM's",
        "vllm-overrides": "what makes vLLM compress images, as text for its option --hf-overrides",
    },
    "measure": {
        "bench": "prefill, decode and KV cache of a checkpoint or of random models, stock and compressed in one run",
        "eval": "answer a benchmark, stock and with plans (restartable)",
        "compare": "records of `mmcompress eval` side by side: retention, flips; same, better, worse or too few to tell",
        "sweep": "plans x keep ratios x tasks: answers, costs, plots and a report in one folder (restartable)",
    },
    "understand": {
        "explain": "show what a model looked at and which tokens were kept: an HTML page and pictures",
        "methods": "all methods, or what one does and which options it has",
        "models": "what every architecture of transformers takes, as the crossed test found it",
        "check": "what one checkpoint can do with mmcompress, from its config alone",
    },
    "train": {
        "tune": "search the options of a plan for a checkpoint, and write the best plan (restartable)",
        "learn": "train what a method learns for a checkpoint, on the synthetic benchmark (restartable)",
        "explain-train": "train the compressor of explain_compress for a checkpoint (restartable)",
        "train": "train an embedded model on the synthetic benchmark (restartable)",
    },
}
"""Every subcommand by what it is for; its file has the name with _ for -."""

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


class _Stopped(KeyboardInterrupt):
    """Ended from outside by a signal."""

    number = signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command: 0 (`check` also 1), or 2 and one line for a mistake of the user and for what system, files or device refuse;
    130 if it is interrupted (128 + the signal if it is ended), with a line that says what is kept. What we did wrong ourselves is
    raised."""
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if getattr(sys.stdout, "errors", None) in ("strict", "surrogateescape"):  # printing ends no run
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(words)
    options, rest = parser.parse_known_args(words)
    if rest and "rest" not in options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    handlers = _listen()
    try:
        _check(options)
        with warnings.catch_warnings():
            warnings.showwarning = _warnings()
            status = options.module.run(options, _console())
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:
        _mute()
        return 0
    except KeyboardInterrupt as stop:
        named = f"{options.command} --harness lmms" if vars(options).get("harness") == "lmms" else options.command
        _say(f"stopped; {STOPPED.get(named, 'nothing was written').format(**vars(options))}")
        return 128 + getattr(stop, "number", signal.SIGINT)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
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


class _Help(argparse.RawDescriptionHelpFormatter):
    """Says what an option is where it is not given, unless its text does; texts of one paragraph are wrapped."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        one = textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)
        return super()._fill_text(text, width, indent) if "\n" in text else one

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        told = "default" in text or default in (None, False, argparse.SUPPRESS) or default == []
        return text if told or not action.option_strings else f"{text} (default: %(default)s)"


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of a command line: of the subcommands only those have options whose names are among its words."""
    width = max(60, shutil.get_terminal_size().columns - 2)
    listed = [
        "\n".join(
            [f"{group}:"]
            + [
                textwrap.fill(text, width, initial_indent=f"  {name:<16}", subsequent_indent=18 * " ")
                for name, text in commands.items()
            ]
        )
        for group, commands in COMMANDS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="mmcompress",
        usage="mmcompress [--version] [--import FILE] COMMAND ...",
        description="Fewer visual tokens for existing vision-language models.\n\n" + "\n\n".join(listed),
        epilog="`mmcompress COMMAND --help` has the options of a command and an example. Begin with: mmcompress demo",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"mmcompress {__version__}")
    imported: dict[str, Any] = {
        "action": "append",
        "type": Path,
        "metavar": "FILE",
        "help": "Python file with methods of your own (several allowed); also behind COMMAND",
    }
    parser.add_argument("--import", dest="imports", **imported)
    commands = parser.add_subparsers(
        prog="mmcompress", required=True, metavar="COMMAND", dest="command", help=argparse.SUPPRESS
    )
    for texts in COMMANDS.values():
        for name, text in texts.items():
            added = commands.add_parser(name, description=text[0].upper() + text[1:] + ".", formatter_class=_Help)
            if name in words:
                module = module_of(name)
                module.add(added)
                added.epilog = f"example:\n  {module.EXAMPLE}"
                added.add_argument("--import", dest="more_imports", **imported)
                added.set_defaults(module=module)
    return parser


def module_of(name: str) -> ModuleType:
    """The file of a subcommand: it has `add` (its options), `run` and `EXAMPLE`."""
    return import_module(f".{name.replace('-', '_')}", __name__)


def _check(options: argparse.Namespace) -> None:
    """What can be known without torch is right, what is to be written can be written, and the device is there: before any work."""
    for path in [*(options.imports or ()), *(options.more_imports or ())]:
        _import(path)
    for option, value in _checked(options):
        value.check(option)
    if device := getattr(options, "device", None):
        from ..eval.machine import check_device

        check_device(device)


def _checked(options: argparse.Namespace) -> Iterator[tuple[str, Checked]]:
    for name, value in vars(options).items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Checked):
                yield f"--{name.replace('_', '-')}", one


def _import(path: Path) -> None:
    """Run a file in which methods are registered."""
    if not path.is_file():
        raise ValueError(f"--import {path}: no such file; give a Python file in which @mmcompress.register stands")
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--import {path}: no Python file, its name does not end in .py")
    if getattr(sys.modules.get(path.stem), "__file__", None) == str(path):  # given twice
        return
    module = module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)


def _console() -> Any:
    """Where a command prints. Tables that are wider than it become a block per row, so that no plan is cut; it goes on unheard if
    what reads it has ended (`| head`): the work is not for the screen alone."""
    from rich.console import Console
    from rich.table import Table

    from .narrow import fitted

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            _mute()

        def print(self, *objects: Any, **how: Any) -> None:
            super().print(*(fitted(one, self) if isinstance(one, Table) else one for one in objects), **how)

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Ours(width=None if known else WIDTH)


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
    loaded = (
        (sys.modules.get("PIL.Image"), ["DecompressionBombError"]),
        (sys.modules.get("torch"), ["OutOfMemoryError", "AcceleratorError"]),
    )
    kinds = tuple(getattr(module, name) for module, names in loaded for name in names if hasattr(module, name))
    return isinstance(error, kinds)


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
