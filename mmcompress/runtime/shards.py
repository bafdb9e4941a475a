# SPDX-License-Identifier: Apache-2.0
"""Parameters outside the forward pass of the module that owns them: FSDP2 holds them in shards there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of `module` are distributed tensors now."""
    return any(hasattr(p, "device_mesh") and hasattr(p, "placements") for p in module.parameters())


UNIT = (
    "{} is a unit of fully_shard by itself, and what is made once more behind its forward pass has a gradient: shard whole "
    "decoder layers instead"
)


def check_unit(module: nn.Module) -> None:
    """Raise NotImplementedError where `module` or a part of it is a unit of FSDP2: its parameters are gone behind its forward."""
    if any(hasattr(part, "unshard") and hasattr(part, "reshard") for part in module.modules()):
        raise NotImplementedError(UNIT.format(type(module).__name__))


@contextmanager
def whole(root: nn.Module, *modules: nn.Module) -> Iterator[None]:
    """Parameters of `modules`, which lie in `root`, as plain tensors meanwhile.

    Raises NotImplementedError where they are distributed, but not by `fully_shard`: tensor parallelism leaves each process some
    of the heads, and none of them knows the mean."""
    with ExitStack() as stack:
        for module in modules:
            if is_sharded(module):
                if torch.is_grad_enabled():  # what is unsharded here is gone again in the backward pass
                    raise NotImplementedError(UNIT.format(type(module).__name__))
                for owner in _owners(root, module):
                    owner.unshard()
                    stack.callback(owner.reshard)
                if is_sharded(module):
                    raise NotImplementedError(
                        f"the parameters of {type(module).__name__} are spread over processes, and not by fully_shard: attention "
                        f"of all heads is known to none; choose a method that acts before the language model"
                    )
        yield


def _owners(root: nn.Module, module: nn.Module) -> list[Any]:
    """Modules of FSDP2 that hold parameters of `module`: the innermost around it, and those inside."""
    from torch.distributed.fsdp import FSDPModule

    name = next((name for name, one in root.named_modules() if one is module), "")
    chain: list[nn.Module] = [root]
    for part in name.split(".") if name else ():
        chain.append(getattr(chain[-1], part))
    around = [one for one in reversed(chain) if isinstance(one, FSDPModule)][:1]
    return around + [one for one in module.modules() if isinstance(one, FSDPModule) and one not in around]
