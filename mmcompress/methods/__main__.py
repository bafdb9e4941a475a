# SPDX-License-Identifier: Apache-2.0
"""`python -m mmcompress.methods` writes the catalog of the methods in this folder."""

from __future__ import annotations

import json

from ..catalog import FILE, entry
from ..plan import methods
from . import __name__ as here

FILE.write_text(
    "{\n"
    + ",\n".join(
        f"{json.dumps(name)}: {json.dumps(entry(cls), ensure_ascii=False)}"
        for name, cls in methods().items()
        if cls.__module__.startswith(here)
    )
    + "\n}\n"
)
print(f"written: {FILE}")
