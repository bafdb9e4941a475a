# SPDX-License-Identifier: Apache-2.0
"""README and docs: short enough, snippets run as they stand there, tables are those of their records, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mmcompress.eval.docs import methods as method_pages
from mmcompress.eval.docs.docstrings import as_markdown, parts_of
from mmcompress.eval.docs.tables import pages

import mmcompress as mm

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted((ROOT / "assets").glob("*/README.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
REPLAYED = ("holitom_inner",)
"""Methods that are known to depart from nothing."""
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
TEXT = (ROOT / "README.md").read_text()
WITH_VLLM = re.compile(r"from vllm|LLM\(")
"""Snippets that tests/serving runs, in an environment of its own."""


def blocks(path: Path, *languages: str) -> list[str]:
    return [code for language, code in BLOCK.findall(path.read_text()) if language in languages]


def test_the_readme_is_short_and_has_all_of_it() -> None:
    assert len(TEXT.splitlines()) <= 200
    assert len(TEXT.split()) <= 1800
    wanted = "Install, First example, Which one should I use?, Recipes, Supported models, Write your own, FAQ, Citation"
    for heading in wanted.split(", "):
        assert f"\n## {heading}\n" in TEXT, heading
    first = TEXT.split("## Install")[0]
    assert "not measured" in first.lower() or "was measured on a GPU yet" in first
    assert "results/llava-shapes_divprune.png" in first


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_snippets_of_python_run_as_pasted(tmp_path: Path) -> None:
    """Those of a page one after the other, as a reader would; one process for all pages and cards."""
    parts = {}
    for path in [*PAGES, *CARDS]:
        code = "\n".join(code for code in blocks(path, "python") if not WITH_VLLM.search(code))
        if code:
            name = str(path.relative_to(ROOT))
            parts[name] = f"print('== {name}')\nexec(compile({code!r}, {name!r}, 'exec'), {{'__name__': 'page'}})"
    said = run("\n".join(parts.values()), tmp_path)
    assert said.count("== ") == len(parts) >= 10
    told = BLOCK.findall(TEXT.split("## First example")[1])
    shown = next(text for language, text in told if language == "text")
    for line in shown.splitlines():
        assert line in said, line


def commands(path: Path) -> list[list[str]]:
    """Lines of shell blocks that call mmcompress, as words; what a reader has to fill in stays as it is."""
    found = []
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["mmcompress"]:
                found.append(words[1:])
    return found


@pytest.mark.parametrize("path", [p for p in PAGES if commands(p)], ids=lambda p: p.name)
def test_commands_have_the_options_that_they_have_in_the_pages(path: Path) -> None:
    from mmcompress import cli

    for words in commands(path):
        if words[0] in ("serve", "vllm-overrides"):
            continue
        options, rest = cli._parser(words).parse_known_args(words)
        assert not rest, (words, rest)
        assert options.command == words[0]


def test_shell_of_the_readme_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmcompress.eval.synthetic import items

    from mmcompress.cli import main

    items(7)[6].picture.save(tmp_path / "picture.png")
    for words in commands(ROOT / "README.md"):
        assert main([str(tmp_path / w) if w == "picture.png" else w for w in words]) == 0, words
    assert "h 3 3" in capsys.readouterr().out


def test_commands_in_the_text_are_commands() -> None:
    """Every `mmcompress WORD` in backticks, in all pages."""
    from mmcompress.cli import COMMANDS

    known = {name for group in COMMANDS.values() for name in group}
    for path in PAGES:
        for word in re.findall(r"`mmcompress ([a-z-]+)", path.read_text()):
            assert word in known, f"{path.name}: mmcompress {word}"


def test_tables_are_those_of_the_records() -> None:
    """Else: `python -m mmcompress.eval.docs`."""
    found = pages()
    assert {path.name for path in found} >= {
        "results.md",
        "speed.md",
        "kernels.md",
        "mass.md",
        "training.md",
        "explanations.md",
    }
    for path, text in found.items():
        assert path.read_text() == text, path.name


def test_links_lead_somewhere() -> None:
    made = {"docs/methods/index.md"}
    for path in [*PAGES, ROOT / "CHANGELOG.md"]:
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
        for to in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in to or to.startswith(("#", "mailto:")):
                continue
            target, _, at = to.partition("#")
            found = (path.parent / target).resolve()
            assert found.exists() or str(found.relative_to(ROOT)) in made, f"{path.name}: {to}"
            if at:
                headings = re.findall(r"^#+ (.+)$", found.read_text(), re.M)
                assert at in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], (
                    f"{path.name}: {to}"
                )


def test_nothing_stands_twice() -> None:
    """No long line of prose in two pages."""
    seen: dict[str, str] = {}
    for path in PAGES:
        for line in path.read_text().splitlines():
            if len(line) > 90 and not line.startswith(("|", "![", "```", "Shown by")):
                assert line not in seen, f"{path.name} and {seen[line]}: {line}"
                seen[line] = path.name


def test_a_page_for_every_method_from_one_template() -> None:
    found = method_pages.site(None)
    for name in method_pages.ours():
        text = found[f"methods/{name}.md"]
        for heading in ("When to use it", "Options", "Cost", "Paper", "What it departs from", "Measured"):
            assert f"\n## {heading}\n" in text, (name, heading)
        assert f"[`{name}`]({name}.md)" in found["methods/index.md"]
        assert mm.methods()[name].__doc__
    assert "Start of" not in found["methods/index.md"]


def test_a_picture_of_a_method(tmp_path: Path) -> None:
    assert method_pages.draw(tmp_path, ["divprune", "cmai"]) == ["divprune"]
    assert (tmp_path / "divprune.png").stat().st_size < 100_000


def test_docstrings_in_parts() -> None:
    doc = """Keep what is left. Cost N D.

    Doe et al., "Title. With a point", CVPR 2025, arXiv 2501.01234. It looks at `a`, i.e. at all (of N.) and keeps it.

    a    what it looks at,
         on two lines.

    Cost N log N. Departs from the reference: none is dropped. Nor this.
    """
    parts = parts_of(doc)
    assert parts.idea == "Keep what is left." and parts.cost == "Cost N D. Cost N log N."
    assert parts.departs == "Departs from the reference: none is dropped. Nor this."
    assert "Doe et al." in parts.paper and len(parts.body) == 2
    assert as_markdown(parts.body[1]) == "* **a** what it looks at,\n  on two lines."


def test_the_longest_name_of_a_list_has_one_space() -> None:
    assert as_markdown("plan   a\nlonger b\nSome text.").splitlines()[:2] == ["* **plan** a", "* **longer** b"]


def test_a_report_is_a_table_in_notebooks() -> None:
    made = mm.Report("a(keep=<1>)", [(0, 0, "image", 4, 1)], [3], 6, 1, 2, None, 0, 0, {}, {})
    assert "<th>plan</th><td>a(keep=&lt;1&gt;)</td>" in made._repr_html_()
    assert "1 of 4 tokens" in made._repr_html_()


def test_the_package_is_found_by_a_python_that_stands_in_the_checkout() -> None:
    """As after a plain `pip install .`: without the finder of an editable installation."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        "import mmcompress.kernels, mmcompress.assets, mmcompress.eval, mmcompress; print(mmcompress.kernels.__file__)"
    )
    assert str(ROOT / "kernels") in run(code, ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path: Path, tmp_path: Path) -> None:
    """Their cells, in one process, from top to bottom; what they show is in the file."""
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert len(cells) >= 4 and any(c["outputs"] for c in cells)
    run("\n".join("".join(c["source"]) for c in cells), tmp_path)


def test_what_a_project_has() -> None:
    assert len(NOTEBOOKS) == 3
    for name in (
        "CITATION.cff",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Dockerfile",
        ".github/workflows/tests.yml",
        "mkdocs.yml",
    ):
        assert (ROOT / name).is_file(), name
    from mmcompress.assets import CLIP, MODELS
    from mmcompress.assets import PAGES as READER

    assert {p.parent.name for p in CARDS} >= {*MODELS, READER, CLIP}
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version and f"version: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()
    listed = re.search(r"^docs = \[(.+)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    made = re.search(r"^DOCS_PACKAGES := (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert listed and made and listed[1].replace(", ", " ") == made[1]


def test_every_option_of_a_method_has_a_meaning() -> None:
    """And every method says what it departs from, where it has a reference."""
    from mmcompress.eval.docs.methods import _departs, _options, ours

    for name, cls in ours().items():
        assert "see below" not in _options(cls, cls.__doc__ or ""), name
        said = parts_of(cls.__doc__ or "").departs
        assert not _departs(name, cls, said).startswith("Nothing known.") or name in REPLAYED, name
