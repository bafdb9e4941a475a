# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .replay import cases, replay


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="replay recorded cases of a folder")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    folder = parser.parse_args(arguments).folder
    found = cases(folder)
    if not found:
        print(f"no cases <name>_<case>.npz in {folder}")
        return 1
    failed = 0
    for name, case, path in found:
        verdict = replay(name, path)
        failed += verdict not in ("ok", "skipped: no runner for this name")
        print(name, case, verdict)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
