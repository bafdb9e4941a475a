# SPDX-License-Identifier: Apache-2.0
"""The command as people meet it: fast, with help, and readable; and the public names, which come when they are used."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

import mmcompress as mm
from mmcompress import cli
from mmcompress.catalog import FILE, catalog, check_plan, entry
from mmcompress.cli import COMMANDS, main, module_of
from mmcompress.cli.narrow import fitted

NAMES = [name for commands in COMMANDS.values() for name in commands]


# ---------------------------------------------------------------------- nothing heavy before it is needed
def test_help_and_mistakes_are_answered_without_torch() -> None:
    lines = [
        ["--help"], ["--version"], [], ["nonsense"], ["methods"], *([name, "--help"] for name in NAMES),
        ["run", "llava-shapes", "--questoin", "?"], ["run", "llava-shapes", "--question", "?", "--plan", "visionzp"],
        ["run", "llava-shapes", "--question", "?", "--plan", "fastv(keep=1.5)"],
        ["run", "llava-shapes", "--question", "?", "--plan", "fastv >> visionzip"],
        ["eval", "llava-shape"], ["sweep", "llava-shapes", "--plan", "divprun(keep={keep})"],
        ["bench", "llava", "--plan", "visionzip(kep=0.5)"], ["tune", "llava-shapes", "--plan", "vflowopt("],
        ["check", "llava-shapes", "--plan", "x.y"], ["demo", "--keep", "64"], ["eval", "llava-shapes", "--out", "/proc/x"],
    ]  # fmt: skip
    code = (
        "import sys, mmcompress\n"
        "from mmcompress.cli import main\n"
        f"for line in {lines!r}:\n"
        "    try:\n"
        "        status = main(line)\n"
        "    except SystemExit as end:\n"
        "        status = end.code\n"
        "    late = {'torch', 'transformers', 'torchvision', 'numpy', 'PIL'} & set(sys.modules)\n"
        "    assert not late, (line, late)\n"
        "    free = not line or '--help' in line or line[0] in ('--version', 'methods')\n"
        "    assert status == (0 if free and line else 2), (line, status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for text in (
        "did you mean 'visionzip'?",
        "did you mean 'keep'?",
        "did you mean 'llava-shapes'?",
        "keep=1.5: a ratio",
    ):
        assert text in done.stderr


def test_the_catalog_is_up_to_date() -> None:
    here = {name: entry(cls) for name, cls in mm.methods().items() if cls.__module__.startswith("mmcompress.methods")}
    assert json.loads(json.dumps(here)) == catalog(), f"python -m mmcompress.methods writes {FILE.name} again"


@pytest.mark.parametrize(
    "plan",
    [
        "visionzap", "visionzip(keep=0.5", "visionzip(kep=0.5)", "visionzip(0.5)", "divprune(keep=0)", "divprune(keep='x')",
        "fastv(layer=0)", "fastv >> divprune", "tome >> downsample", "plan(divprune, position='keep')", "divprune(on='smell')",
        "plan(divprune, positions='here')", "plan(fastv, mass=True)", "aim >> divprune", "nowhere.json", "f(x) + 1", "",
    ],
)  # fmt: skip
def test_a_wrong_plan_is_refused_alike_with_and_without_torch(plan: str) -> None:
    said = []
    for read in (mm.as_pipeline, check_plan):
        with pytest.raises((ValueError, TypeError)) as error:
            read(plan)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_what_is_known_without_torch_refuses_no_right_plan() -> None:
    plans = [name for name, cls in mm.methods().items() if cls.__module__.startswith("mmcompress.methods")]
    for name, cls in mm.methods().items():
        if any(field.name == "keep" for field in cls.fields()):
            plans += [f"{name}(keep={keep})" for keep in ("25%", "1.0", "64")]
    plans += [
        "plan(voronoi(keep=0.25) >> dart(layer=2, keep=0.4), positions='keep', mass=True)",
        "tome(r=(4, 2)) >> fastv",
    ]
    right = 0
    for plan in plans:
        try:
            mm.as_pipeline(plan)
        except (ValueError, TypeError):
            continue
        check_plan(plan)
        right += 1
    assert right > 120


def test_public_names_come_when_they_are_used() -> None:
    tree = ast.parse(inspect.getsource(mm))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {
        (node.module, alias.name) for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert shown - {("methods", "*")} == {(module, name) for module, names in mm._MODULES.items() for name in names}
    assert {name for _, name in shown} - {"*"} | set(mm.methods.__module__ and mm._PUBLIC) == set(mm._PUBLIC)
    import mmcompress.methods as ours  # the function, as ever: the module is in sys.modules

    assert callable(ours) and callable(mm.trace) and callable(mm.methods)
    assert set(mm.__all__) == {*mm._PUBLIC, *sys.modules["mmcompress.methods"].__all__}
    assert all(getattr(mm, name) is not None for name in mm.__all__) and {*mm.__all__} <= set(dir(mm))
    assert mm.visuals.Visuals is mm.Visuals and not hasattr(mm, "nonsense")


# ---------------------------------------------------------------------- help
def parser_of(name: str) -> argparse.ArgumentParser:
    (commands,) = (a for a in cli._parser([name])._actions if isinstance(a, argparse._SubParsersAction))
    found: argparse.ArgumentParser = commands.choices[name]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_option_says_what_it_is_and_every_example_is_read(name: str) -> None:
    parser = parser_of(name)
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.help, (name, action.dest)
        plain = action.default in (None, False, argparse.SUPPRESS) or action.default == []
        if action.option_strings and not plain:
            assert "default" in (parser._get_formatter()._expand_help(action) if action.help else ""), action.dest
    example = module_of(name).EXAMPLE
    assert example in parser.format_help() and text.count("example:") == 1
    words = shlex.split(example)
    if words[0] == "mmcompress":
        options, rest = cli._parser(words[1:]).parse_known_args(words[1:])
        assert options.command == name and (not rest or name == "serve")
        for option, value in cli._checked(options):
            if not isinstance(value, Path):
                value.check(option)


def test_every_command_is_in_the_list_and_in_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in NAMES) and all(f"\n{group}:\n" in said for group in COMMANDS)
    files = {path.stem for path in Path(cli.__file__).parent.iterdir() if path.stem not in ("__init__", "__pycache__")}
    assert files - {"common", "lmms", "narrow"} == {name.replace("-", "_") for name in NAMES}


# ---------------------------------------------------------------------- own methods
def test_a_file_with_own_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str], registry: None) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\nimport mmcompress as mm\n"
        "@mm.register('every_other')\n@dataclass(frozen=True, repr=False)\nclass EveryOther(mm.InputStage):\n"
        "    '''Keep every other token.'''\n    keep: float | int = 0.5\n"
        "    def select(self, visuals):\n        return mm.Selection.top(visuals.features[..., 0], visuals.k)\n"
    )
    assert main(["methods", "every_other"]) == 2
    assert "unknown method 'every_other'" in capsys.readouterr().err
    for line in (["--import", str(path), "methods"], ["methods", "--import", str(path)]):
        assert main(line) == 0
        assert "every_other" in capsys.readouterr().out
    assert main(["methods", "every_other"]) == 0
    assert "every_other(keep=0.5)" in capsys.readouterr().out
    check_plan("every_other(keep=0.25) >> fastv")
    with pytest.raises(ValueError, match="has no option 'kep'"):
        check_plan("every_other(kep=0.25)")
    assert main(["--import", str(tmp_path / "no.py"), "methods"]) == 2
    assert "no.py: no such file" in capsys.readouterr().err


@pytest.fixture()
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from mmcompress import plan

    monkeypatch.setattr(plan, "_registry", dict(mm.methods()))
    yield
    sys.modules.pop("mine", None)


# ---------------------------------------------------------------------- tables
def test_no_plan_is_cut_on_a_narrow_screen() -> None:
    plan = "visionzip(keep=0.25) >> fastv(layer=2, keep=0.5)"
    table = Table(title="a table", caption="what it means")
    for heading in ("plan", "accuracy", "of stock", "verdict", "FLOPs", "speed-up", "prefill ms", "visual tokens"):
        table.add_column(heading)
    table.add_row("stock", "95.7 %", "", "", "100 %", "", "123.4 ± 1.0", "144")
    table.add_row(plan, "93.6 %", "97.8 %", "too few questions to tell", "61.6 %", "1.31x", "94.2 ± 1.0", "36")

    def shown(width: int) -> str:
        console = Console(width=width, file=None, record=True, quiet=False)
        with console.capture() as got:
            console.print(fitted(table, console))
        return got.get()

    wide, narrow = shown(200), shown(80)
    assert wide.count(plan) == 1 and "┃" in wide
    assert f"\n{plan}\n" in narrow and "verdict too few questions to tell" in narrow and "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80 and "a table" in narrow and "what it means" in narrow


def said_by(line: list[str], capsys: pytest.CaptureFixture[str], **_: Any) -> str:
    assert main(line) == 0
    return capsys.readouterr().out


def test_methods_at_a_glance_and_one_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = said_by(["methods"], capsys)
    assert max(map(len, said.splitlines())) <= 80 and all(f"  {name} " in said for name in catalog())
    one = said_by(["methods", "fastv"], capsys)
    assert "fastv(layer=2, keep=0.5, query='last')" in one and "arXiv" in one and "inside the LLM" in one
    assert main(["methods", "fastw"]) == 2
    assert "did you mean 'fastv'?" in capsys.readouterr().err
