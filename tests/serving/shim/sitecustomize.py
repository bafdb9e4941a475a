# SPDX-License-Identifier: Apache-2.0
"""For the environment of the tests alone: torchvision's wheel on the index is built for CUDA, and beside a torch for the CPU its
operators are missing. Preprocessing needs none of them; two only have to have a name before torchvision is imported."""

import importlib.abc
import sys


class _Names(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            import torch

            if "+cpu" in torch.__version__:
                torch._torchvision_names = library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _Names())
