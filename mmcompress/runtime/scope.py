# SPDX-License-Identifier: Apache-2.0
"""Whose call is running in this thread: the one place where the state of a call is found.

Hooks know the module that is called, not the call that calls it. Several threads may run one model at once, so nothing that
belongs to a call may live on the model, an engine or a tap: it lives in a scope, and scopes stand on a stack of the thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

FORWARD, ENCODE = "forward", "encode"


class Scope:
    """One forward pass of a model, or one call of its vision encoder, in one thread.

    owner  the engine that opened it. part: FORWARD or ENCODE.
    state  what taps and facades keep during it; each uses itself as the key.
    """

    def __init__(self, owner: Any, part: str = FORWARD) -> None:
        self.owner, self.part = owner, part
        self.state: dict[Any, Any] = {}


class _Stack(threading.local):
    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.notes: tuple[int, dict[str, Any]] = (0, {})
        self.last: tuple[Callable[[], Any], Any] = (lambda: None, None)


_STACK = _Stack()


def enter(scope: Scope) -> Scope:
    """Open `scope`. What an interrupted call of the same owner and part left open is closed before: neither can contain itself."""
    leave(scope.owner, scope.part)
    _STACK.scopes.append(scope)
    return scope


def leave(owner: Any, part: str = FORWARD) -> None:
    """Close the scope of `owner` and all that was opened inside it. Nothing happens if there is none."""
    for i, scope in enumerate(_STACK.scopes):
        if scope.owner is owner and scope.part == part:
            del _STACK.scopes[i:]
            return


def current(owner: Any, part: str = FORWARD) -> Scope | None:
    """The open scope of `owner` in this thread, None if there is none."""
    for scope in reversed(_STACK.scopes):
        if scope.owner is owner and scope.part == part:
            return scope
    return None


def running() -> bool:
    """Whether a forward pass of a compressed model runs in this thread."""
    return any(scope.part == FORWARD for scope in _STACK.scopes)


def notes(owner: Any) -> dict[str, Any]:
    """What `owner` leaves between calls of this thread: what was encoded for the forward pass that follows, what its loss has to
    know. The next owner that asks clears it, so that nothing grows."""
    if _STACK.notes[0] != id(owner):
        _STACK.notes = (id(owner), {})
    return _STACK.notes[1]


def remember(owner: Any, record: Any) -> None:
    """Keep the record of the last call of `owner` in this thread."""
    _STACK.last = (weakref.ref(owner), record)


def remembered(owner: Any) -> Any:
    """The record of the last call in this thread, if it was one of `owner`."""
    mine, record = _STACK.last
    return record if mine() is owner else None
