# SPDX-License-Identifier: Apache-2.0
"""Everything that wants a GPU, by one command: `make gpu` (`python -m mmcompress.eval.gpu`).

`plan` lists the steps with their seconds, `run` goes through them, each in a process that may fail or be late by itself, and
writes one folder. A step is a function of `Bench` that names its items; an item yields rows. `--dry` runs every step on the CPU,
the kernels in Triton's interpreter, on tiny shapes: it shows that the steps work, and its record says that it measured nothing.
"""
