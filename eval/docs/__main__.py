# SPDX-License-Identifier: Apache-2.0
"""Fill the tables of docs/ from the records, and draw the Pareto plot: `python -m mmcompress.eval.docs`."""

from __future__ import annotations

from .tables import pages, pareto


def main() -> None:
    for path, text in pages().items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"filled {path.name}")
    pareto()


if __name__ == "__main__":
    main()
