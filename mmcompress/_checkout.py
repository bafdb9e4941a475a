# SPDX-License-Identifier: Apache-2.0
"""In a checkout the folders adapters, assets, eval and kernels lie beside this one, in an installation inside it: both are found,
also by a Python that starts in a checkout while the package is installed elsewhere."""

import sys
from pathlib import Path

HOME = Path(__file__).parent
if not (HOME / "kernels").is_dir():
    sys.modules[__package__].__path__.append(str(HOME.parent))
