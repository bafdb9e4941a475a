# SPDX-License-Identifier: Apache-2.0
"""The house: who may import whom, licence lines, and a wheel that is complete."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "mmcompress": "mmcompress",
    "adapters": "mmcompress.adapters",
    "kernels": "mmcompress.kernels",
    "eval": "mmcompress.eval",
}

FLOORS = [
    ("kernels",),
    ("ops",),
    (
        "_checkout",
        "budget",
        "visuals",
        "selection",
        "stage",
        "plan",
        "catalog",
        "presets",
        "weights",
        "pictures",
        "videos",
        "decoders",
        "records",
    ),
    ("methods",),
    ("runtime",),
    ("adapters",),
    ("api", "trace", "flops", "dominance"),
    ("explain", "learn", "visualize"),
    (
        "eval",
        "demo",
        "demo_tables",
        "assets",
        "spending",
        "advice",
        "app",
        "playground",
        "tune",
        "architectures",
        "check",
    ),
    ("cli", "__main__"),
]
"""From the ground up; a module may import from its own floor and from those below."""


@functools.cache
def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    found["mmcompress.assets"] = ROOT / "assets" / "__init__.py"
    return found


def floor(module: str) -> int | None:
    """The floor of `mmcompress.x.y`; None for the package itself, which shows everything."""
    parts = module.split(".")
    return next(i for i, names in enumerate(FLOORS) if parts[1] in names) if len(parts) > 1 else None


@functools.cache
def imported(name: str, path: Path) -> set[str]:
    """Modules of this project that a file imports, at any depth of its code."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{target}.{alias.name}"
                found.add(inner if inner in known else target)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {f for f in found if f.split(".")[0] == "mmcompress"}


def test_no_import_points_upwards() -> None:
    wrong = []
    for name, path in modules().items():
        mine = floor(name)
        for target in imported(name, path):
            theirs = floor(target)
            if mine is not None and theirs is not None and theirs > mine:
                wrong.append(f"{name} imports {target}")
    assert not wrong, wrong


def test_no_imports_run_in_a_circle() -> None:
    left = {name: imported(name, path) - {name} for name, path in modules().items()}
    while free := [name for name, targets in left.items() if not targets & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


def test_adapters_stay_small() -> None:
    """Facts about families, and what runs inside vLLM: each has a budget of its own."""
    lines = [len(path.read_text().splitlines()) for path in (ROOT / "adapters").rglob("*.py")]
    serving = sum(len(path.read_text().splitlines()) for path in (ROOT / "adapters" / "vllm").rglob("*.py"))
    assert sum(lines) - serving <= 2000
    assert serving <= 1050, serving


@pytest.mark.parametrize("lower", ["kernels", "ops", "methods"])
def test_methods_and_ops_need_no_transformers(lower: str) -> None:
    for name, path in modules().items():
        if name.split(".")[1:2] == [lower]:
            assert "transformers" not in path.read_text(), name


def test_every_file_names_its_licence() -> None:
    files = [p for folder in [*FOLDERS, "tests", "assets"] for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 40
    missing = [
        str(p) for p in files if p.read_text() and not p.read_text().startswith("# SPDX-License-Identifier: Apache-2.0")
    ]
    assert not missing, missing


def test_the_wheel_is_complete(tmp_path: Path) -> None:
    """Build it, install it into an empty environment that only sees the libraries, import everything, read an asset."""
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for line in listed.stdout.splitlines():
        if (ROOT / line).is_file():
            (source / line).parent.mkdir(parents=True, exist_ok=True)
            (source / line).write_bytes((ROOT / line).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    home = tmp_path / "home"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = (
        "import importlib, pathlib, sys, mmcompress, mmcompress.assets as assets\n"
        f"assert pathlib.Path(mmcompress.__file__).is_relative_to({str(home)!r}), mmcompress.__file__\n"
        "[importlib.import_module(name) for name in sys.argv[1:]]\n"
        "from transformers import AutoConfig, AutoProcessor\n"
        "path = assets.model_path()\n"
        "assert AutoConfig.from_pretrained(path).model_type == 'llava'\n"
        "assert AutoProcessor.from_pretrained(path).image_token == '<image>'\n"
        "assert (path / 'model.safetensors').stat().st_size > 10**6\n"
        "assert (pathlib.Path(mmcompress.__file__).parent / 'py.typed').exists()\n"
        "from mmcompress.architectures import architectures\n"
        "assert len(architectures()) >= 100 and architectures(['llava-1.5-7b'])\n"
        "print('complete')\n"
    )
    # what runs inside vLLM is imported by tests/serving, in an environment of its own
    names = [n for n, path in modules().items() if not n.endswith("__main__") and "\nfrom vllm" not in path.read_text()]
    out = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip().endswith("complete")
