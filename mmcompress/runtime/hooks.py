# SPDX-License-Identifier: Apache-2.0
"""Hooks that follow their model: modules may be replaced (LoRA, quantisation) or copied while the model is compressed."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from .scope import ENCODE, FORWARD, leave

ENGINE = "_mmcompress_engine"
"""Attribute of a model, and of its body, that holds the engine."""


def idle(*args: Any, **kwargs: Any) -> None:
    """What a hook is in a copy of the module that carries it."""


def _idle() -> Any:
    return idle


class Hook(functools.partial):
    """A hook of a module. It does not go into copies: PEFT copies modules (`modules_to_save`), which would take engine and model
    along; the engine of a copied model puts its own hooks in."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return idle

    def __reduce__(self) -> tuple[Any, ...]:
        return _idle, ()


def carried(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """The hooks of a module around its forward pass, by number."""
    return module._forward_pre_hooks, module._forward_hooks


class Places:
    """Where the modules stand that carry hooks: every step of the way from `root` down to each of them."""

    def __init__(self, root: nn.Module, handles: list[RemovableHandle]) -> None:
        modules, ours = dict(root.named_modules()), {handle.id for handle in handles}
        ways: dict[str, None] = {}
        for path, module in modules.items():
            if path and any(ours & table.keys() for table in carried(module)):
                parts = path.split(".")
                ways |= dict.fromkeys(".".join(parts[:n]) for n in range(1, len(parts) + 1))
        self.names = [way.rpartition(".")[2] for way in ways]
        self.tables = [modules[way.rpartition(".")[0]]._modules for way in ways]
        self.modules = [modules[way] for way in ways]
        self.switches = [module for module in self.modules if "original_module" in module._modules]
        """Wrappers of PEFT, which lead to a copy or to the original."""
        self.running = [running(module) for module in self.switches]
        self.counted = list({id(table): table for table in self.tables}.values())
        self.counts = [len(table) for table in self.counted]

    def changed(self) -> bool:
        """Whether another module stands at one of the places now, or beside it. Some 10 us for a large model."""
        there = list(map(dict.get, self.tables, self.names))
        if there != self.modules or list(map(len, self.counted)) != self.counts:
            return True
        return bool(self.switches) and list(map(running, self.switches)) != self.running


def running(module: Any) -> Any:
    """The module itself; of a wrapper that PEFT has put around one (`modules_to_save`), what runs inside."""
    while "original_module" in module._modules:
        copies = {} if module.disable_adapters else module._modules.get("modules_to_save", {})
        module = next((copies[name] for name in module.active_adapters if name in copies), module.original_module)
    return module


class Following:
    """What works by hooks on the modules of one model, and looks for these modules again when they have been replaced.

    adapter   where things are; `adapter.model` is the model.
    handles   of all hooks. replaced: methods of modules that stand behind a wrapper: (module, name, what the instance had there).
    holders   modules that hold the engine as an attribute: the model, and its body.
    places    where the modules with hooks stand, and doors_at those at which calls enter; None in a fresh copy.
    """

    kept: ClassVar[tuple[str, ...]] = ("adapter", "plan", "replaced", "holders")
    """Attributes that a copy has too. It finds everything else in its own model, at its first call."""

    adapter: Any
    plan: Any

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.places: Places | None = None
        self.doors_at: Places | None = None
        self.replaced: list[tuple[Any, str, Any]] = []
        self.holders: tuple[Any, ...] = ()
        self.lock = threading.RLock()

    def find(self, adapter: Any) -> None:
        """Look for all that is needed in the model of `adapter`; raises if the plan cannot work there."""
        raise NotImplementedError

    def doors(self) -> Iterable[RemovableHandle]:
        """Put in the hooks at which calls enter: bound methods, which are alive in copies of the whole model too."""
        raise NotImplementedError

    def hooks(self) -> Iterable[RemovableHandle]:
        """Put in all other hooks, and what stands in the place of methods."""
        raise NotImplementedError

    def replace(self, module: Any, name: str, method: Any) -> None:
        """Put `method` in the place of a method of this one instance."""
        self.replaced.append((module, name, module.__dict__.get(name)))
        setattr(module, name, method)

    def install(self) -> None:
        """Put everything in. If anything fails half-way, everything is taken out again."""
        if self.places is not None and self.places.changed():  # since it was taken out
            self.find(self.adapter.again())
        model = self.adapter.model
        self.holders = (model, self.adapter.base)
        try:
            for handle in self.doors():
                self.handles.append(handle)
            self.doors_at, doors = Places(model, self.handles), len(self.handles)
            for handle in self.hooks():
                self.handles.append(handle)
            ours = {handle.id for handle in self.handles[doors:]}
            for module in model.modules():
                for table in carried(module):
                    table.update({number: Hook(table[number]) for number in ours & table.keys()})
            self.places = Places(model, self.handles)
            for holder in self.holders:
                setattr(holder, ENGINE, self)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take everything out again; the model is as it was, and an interrupted call is over."""
        for part in (FORWARD, ENCODE):
            leave(self, part)
        self._unhook()

    def _unhook(self) -> None:
        for handle in self.handles:
            handle.remove()
        for module, name, before in self.replaced:
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)
        for module in self.holders[0].modules():
            _tidy(module, self)
        for holder in self.holders:
            holder.__dict__.pop(ENGINE, None)
        self.handles, self.replaced = [], []

    def follow(self) -> None:
        """Find everything again if modules of the model have been replaced. Raises RuntimeError where that does not work."""
        if not self.moved:
            return
        with self.lock:
            if not self.moved:
                return  # another thread was faster
            before = dict(self.__dict__)
            try:
                self.find(self.adapter.again())
            except Exception as error:
                self.__dict__.update(before)
                raise RuntimeError(
                    f"modules of this model were replaced after compress(), and {self.plan!r} does not work on what is there now "
                    f"({type(error).__name__}: {error}): call mmcompress.compress(model, plan) again, or "
                    f"mmcompress.uncompress(model)"
                ) from error
            self.places = None
            self._unhook()
            self.install()

    @property
    def moved(self) -> bool:
        """Whether what stands in the model is not what was found."""
        return self.places is None or self.places.changed()

    # ------------------------------------------------------------------ copies
    @property
    def whole(self) -> bool:
        """Whether there is a model: the copy of a part of one has none, and its engine does nothing."""
        return "adapter" in self.__dict__

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.kept if name in self.__dict__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Following.__init__(self)
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = memo[id(self)] = object.__new__(type(self))
        whole = self.whole and id(self.adapter.model) in memo
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo) if whole else {})
        return other


def _tidy(module: nn.Module, owner: Any) -> None:
    """Take out what copying has left in a module: idle hooks, and the doors of the copied engine."""
    more = (
        module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs, module._forward_hooks_always_called
    )  # fmt: skip
    for table in carried(module):
        for number, hook in list(table.items()):
            if hook is idle or getattr(hook, "__self__", None) is owner:
                for part in (table, *more):
                    part.pop(number, None)
