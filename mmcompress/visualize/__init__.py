# SPDX-License-Identifier: Apache-2.0
"""Pictures of what was kept and of what the model looked at, and the HTML page with all of it."""

from ..explain.fates import Step, steps
from .figures import fate_picture, heat_picture, layers_figure, scores_figure, stages_figure, words_figure
from .film import kept_animation, kept_sheet, tokens_figure, word_animation, word_strip
from .frames import animation, contact_sheet
from .headline import Gain, headlines
from .kept import Panel, encoded_view, kept_figure, kept_overlay
from .page import Page, page
from .payload import faithfulness
from .show import show
from .write import write_all

__all__ = [
    "Gain",
    "Page",
    "Panel",
    "Step",
    "animation",
    "contact_sheet",
    "encoded_view",
    "faithfulness",
    "fate_picture",
    "headlines",
    "heat_picture",
    "kept_animation",
    "kept_figure",
    "kept_overlay",
    "kept_sheet",
    "layers_figure",
    "page",
    "scores_figure",
    "show",
    "stages_figure",
    "steps",
    "tokens_figure",
    "word_animation",
    "word_strip",
    "words_figure",
    "write_all",
]
