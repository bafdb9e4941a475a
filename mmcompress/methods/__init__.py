# SPDX-License-Identifier: Apache-2.0
"""One file per method; importing this package registers all of them."""

from .divprune import DivPrune
from .fastv import FastV
from .random import Random
from .tome import ToMe
from .uniform import Uniform
from .visionzip import VisionZip

__all__ = ["DivPrune", "FastV", "Random", "ToMe", "Uniform", "VisionZip"]
