# SPDX-License-Identifier: Apache-2.0
"""`python -m mmcompress.eval.gpu`: everything that wants a GPU, in nine minutes, into one folder."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from .plan import GROUPS, STEPS, seconds
from .run import run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mmcompress.eval.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the record (default results/gpu; dry: runs/gpu)")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny shapes: shows that the steps work")
    parser.add_argument("--only", nargs="+", default=(), metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--commit", help="of the code, where there is no repository to ask")
    parser.add_argument("--list", action="store_true", help="say what there is")
    given = parser.parse_args()
    if unknown := [name for name in given.only if name not in STEPS]:
        parser.error(f"no step {unknown[0]!r}; choose among {', '.join(STEPS)}")
    if given.list:
        for group in GROUPS:
            print("\n".join(f"{step.name:<12}{step.seconds:>4} s  {step.text}" for step in group))
        print(f"{sum(seconds(group, False) for group in GROUPS)} s in all; steps in groups of {list(map(len, GROUPS))}")
        return
    import torch

    if not given.dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry shows that the steps work, and measures nothing")
    folder = given.out or Path("runs/gpu" if given.dry else "results/gpu")
    run(folder, given.dry, given.commit, given.only, functools.partial(print, flush=True))


if __name__ == "__main__":
    main()
