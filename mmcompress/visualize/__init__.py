# SPDX-License-Identifier: Apache-2.0
"""Pictures of what was kept and of what the model looked at, and the HTML page with all of it."""

from .fates import Step, steps
from .figures import fate_picture, heat_picture, layers_figure, scores_figure, stages_figure, words_figure
from .frames import animation, contact_sheet
from .kept import Panel, encoded_view, kept_figure, kept_overlay
from .page import Page, page
from .payload import faithfulness
from .show import show
from .write import write_all

__all__ = [
    "Page",
    "Panel",
    "Step",
    "animation",
    "contact_sheet",
    "encoded_view",
    "faithfulness",
    "fate_picture",
    "heat_picture",
    "kept_figure",
    "kept_overlay",
    "layers_figure",
    "page",
    "scores_figure",
    "show",
    "stages_figure",
    "steps",
    "words_figure",
    "write_all",
]
