# SPDX-License-Identifier: Apache-2.0
"""Training of the compressor of `explain_compress` on relevance labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import resolve
from ..methods.explain_compress import Compressor
from ..ops.explained import relevance_target, target_divergence

KEEPS = (0.5, 0.25, 0.1)


@dataclass(frozen=True, eq=False)
class Pair:
    """One visual of one sample: what the compressor reads of it, and its relevance, both [N] float32."""

    attention: Tensor
    relevance: Tensor


@dataclass(frozen=True)
class Fitting:
    """How a compressor is trained. patience: epochs without a better held-out loss after which it stops."""

    epochs: int = 100
    batch: int = 128
    rate: float = 1e-3
    patience: int = 12
    kernel: int = 3
    scaling: str = "zscore"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate}: a learning rate above 0")


Epoch = Callable[[int, float, float], None]
"""(number of the epoch, its loss, held-out loss)"""


def padded(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, relevance [U, N] and which tokens are there [U, N], for the longest of `pairs`."""
    counts = torch.tensor([len(pair.attention) for pair in pairs])
    here = torch.arange(int(counts.max())) < counts[:, None]
    attention, relevance = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        for rows in ([p.attention for p in pairs], [p.relevance for p in pairs])
    )
    return attention, relevance, here


def losses(net: Compressor, pairs: Sequence[Pair], batch: int = 256) -> Tensor:
    """Divergence of what `net` predicts from the target, of each pair."""
    device, found = next(net.parameters()).device, []
    for first in range(0, len(pairs), batch):
        attention, relevance, here = (t.to(device) for t in padded(pairs[first : first + batch]))
        found.append(target_divergence(relevance_target(relevance, here), net(attention, here)))
    return torch.cat(found)


def fit(
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    how: Fitting | None = None,
    device: str = "cpu",
    show: Epoch | None = None,
) -> Compressor:
    """Train a compressor on `train` by Adam with a cosine; the one of the epoch with the lowest loss on `held_out` is returned.

    Visuals that nothing is relevant in are left out. Raises ValueError if there are no others.
    """
    how = how or Fitting()
    train, held_out = ([p for p in pairs if float(p.relevance.max()) > 0] for pairs in (train, held_out))
    if not train or not held_out:
        raise ValueError(
            f"{len(train)} visuals to learn from and {len(held_out)} to hold out, for answers owe nothing to any other: give more "
            f"data"
        )
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        net = Compressor(kernel=how.kernel, scaling=how.scaling).to(device)
        order = torch.Generator().manual_seed(how.seed)
        optimizer = torch.optim.Adam(net.parameters(), lr=how.rate)
        steps = math.ceil(len(train) / how.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs * steps)
        best, state, since = math.inf, copy.deepcopy(net.state_dict()), 0
        for epoch in range(how.epochs):
            total = 0.0
            drawn = torch.randperm(len(train), generator=order).tolist()
            for first in range(0, len(drawn), how.batch):
                part = [train[i] for i in drawn[first : first + how.batch]]
                loss = losses(net, part, len(part)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(part)
            with torch.no_grad():
                now = float(losses(net, held_out).mean())
            if show is not None:
                show(epoch + 1, total / len(train), now)
            if now < best:
                best, state, since = now, copy.deepcopy(net.state_dict()), 0
            else:
                since += 1
                if since >= how.patience:
                    break
    net.load_state_dict(state)
    return net.eval()


@torch.no_grad()
def agreement(net: Compressor, pairs: Sequence[Pair], keeps: Sequence[float] = KEEPS) -> dict[str, float]:
    """How near `net` comes to the oracle on `pairs`: the mean divergence, that of a flat guess, and the part of the oracle's top
    tokens that it keeps, that the attention itself (proxy) keeps, and that chance would."""
    pairs = [p for p in pairs if float(p.relevance.max()) > 0]
    device = next(net.parameters()).device
    targets = [relevance_target(p.relevance) for p in pairs]
    flat = [target_divergence(t, torch.full_like(t, -math.log(len(t)))) for t in targets]
    found = {
        "divergence": float(losses(net, pairs).mean()),
        "divergence of a flat guess": float(torch.stack(flat).mean()),
    }
    for keep in keeps:
        shares: dict[str, list[float]] = {"learned": [], "proxy": [], "chance": []}
        for pair in pairs:
            k = resolve(keep, len(pair.attention))
            oracle = _top(pair.relevance, k)
            guesses = {"learned": net(pair.attention[None].to(device))[0].cpu(), "proxy": pair.attention}
            for name, guess in guesses.items():
                shares[name].append(float(torch.isin(_top(guess, k), oracle).float().mean()))
            shares["chance"].append(k / len(pair.attention))
        for name, values in shares.items():
            found[f"overlap {name} {100 * keep:.0f} %"] = sum(values) / len(values)
    return found


def _top(scores: Tensor, k: int) -> Tensor:
    return scores.sort(descending=True, stable=True).indices[:k]
