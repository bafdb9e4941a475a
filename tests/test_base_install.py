# SPDX-License-Identifier: Apache-2.0
"""What `pip install` gives without extras: enough for the first example of the README and for every embedded model."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mmcompress.assets import MODELS
from mmcompress.eval.docs.tables import fresh_sweeps
from mmcompress.eval.evaluator import STOCK
from mmcompress.eval.margins import Answers, Margin
from packaging.requirements import Requirement

import mmcompress as mm
from mmcompress.cli.sweep import KEEPS

ROOT = Path(__file__).parent.parent


def listed(group: str) -> list[str]:
    """The distributions of a list in pyproject.toml (Python 3.10 cannot read TOML)."""
    text = re.search(rf"^{group} = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.S | re.M)
    assert text is not None
    return [Requirement(entry).name for entry in re.findall(r'"([^"]+)"', text[1])]


def called(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brought() -> set[str]:
    """The distributions that the dependencies and what they depend on bring."""
    found: set[str] = set()
    waiting = [called(name) for name in listed("dependencies")]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(called(need.name))
    return found


@pytest.mark.slow
def test_first_example_and_embedded_models_without_extras(tmp_path: Path) -> None:
    """In a process that sees no module of any other distribution."""
    base = brought()
    assert {"torchvision", "accelerate", "jinja2"} <= base and not {"matplotlib", "timm", "pyarrow"} & base
    packages = importlib.metadata.packages_distributions()
    hidden = sorted(
        module
        for module, names in packages.items()
        if not {called(name) for name in names} & (base | {"mmcompress"}) and module.isidentifier()
    )
    assert {"matplotlib", "timm", "open_clip", "optuna", "scipy", "peft", "pyarrow"} <= set(hidden)
    example = (ROOT / "README.md").read_text().split("## First example\n")[1].split("```python\n")[1].split("```")[0]
    code = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
import torch
from mmcompress.assets import MODELS, model_path
from mmcompress.cli import main
from mmcompress.eval.synthetic import items
item = items(1)[0]
item.picture.save("a.png")
for name in MODELS:
    assert main(["run", name, "--image", "a.png", "--question", item.question.text]) == 0, name
{example}
assert mm.trace(model).visuals[0].kept == 36
print("all ran")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and done.stdout.endswith("all ran\n"), done.stderr[-3000:]
    assert done.stdout.count("compressed  ") == len(MODELS)
    assert "compressed: h 3 3" in done.stdout


def test_plans_that_readme_and_helps_name_are_plans() -> None:
    """Every text that looks like a plan, and the options of every extra that the README tells to install."""
    text = (ROOT / "README.md").read_text()
    plans = re.findall(r'"((?:[a-z_0-9]+\([a-z_]+=[^"()]*\))(?: >> [a-z_0-9]+\([^"()]*\))*)"', text)
    assert len(plans) >= 5
    for plan in plans:
        if not plan.startswith("contrast"):  # the example of a method of one's own
            mm.as_pipeline(plan)
    extras = re.findall(r"\.\[([a-z,]+)\]", text)
    assert extras and all(listed(extra) for names in extras for extra in names.split(","))
    assert [mm.budget.read_keep(keep) for keep in KEEPS] == [0.5, 0.25, 0.1]


def test_the_first_numbers_of_the_readme_are_those_of_the_records() -> None:
    """What voronoi, divprune and chance cost over all embedded models on fresh questions, and the speed-up on the mid-size ones."""
    bench = json.loads((ROOT / "results" / "bench.json").read_text())
    rows = [row for family in bench["families"].values() for row in family["rows"]]
    faster = [row["prefill_speedup"] for row in rows if row["plan"] == "divprune(keep=0.25)"]
    fresh = Answers(fresh_sweeps(MODELS), "shapes")
    assert len(faster) == 5 and min(faster) > 1 and len(fresh.models) == len(MODELS)

    def lost(name: str, keep: float) -> Margin:
        return fresh.margin(STOCK, fresh.named[name, keep])

    text = " ".join((ROOT / "README.md").read_text().split("## Install")[0].split())
    assert f"{min(faster):.2f} to {max(faster):.2f} times faster" in text
    assert f"{sum(fresh.questions.values()):,} fresh questions" in text
    own, fewer = lost("voronoi", 0.25), lost("voronoi", 0.1)
    assert f"{own.value:.1f} ± {own.error:.1f} points worse with `voronoi(keep=0.25)`" in text
    assert f"{lost('divprune', 0.25).value:.1f} with `divprune`" in text
    assert f"{lost('random', 0.25).value:.1f} with tokens drawn at random" in text
    assert f"tenth of the tokens {fewer.value:.1f} ± {fewer.error:.1f} worse with `voronoi`" in text
