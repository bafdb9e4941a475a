# SPDX-License-Identifier: Apache-2.0
"""The cuts of a plan between the layers of a language model."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..ops.precision import wide
from ..ops.relevance import text_relevance
from ..selection import Selection, gather
from ..stage import LayerStage, Pipeline, Selecting, Stage
from ..visuals import Layout, Visuals
from .cache import ledger_of
from .call import Call, pools_of, rows_alike
from .layers import AROUND, CHANGES, LISTENS, WANTS, Cut, Heads, LayerTap, TransitionTap
from .needs import names_of
from .packing import Group, pack, renumbered, sent
from .probe import Forms, attention_in, final_norm, mlp_in
from .rotary import Tables, layer_tables, shifted
from .scope import current
from .shards import whole
from .signals import kind_of

NOWHERE = torch.empty(0, 0, dtype=torch.int64)
"""Places in no rows."""


def choose(stage: Selecting, visuals: Visuals) -> Selection:
    """The decision of a stage, made in full precision and with the promised shape: a third-party method that breaks the
    budget must not get further."""
    with torch.autocast(visuals.features.device.type, enabled=False):
        selection = stage.select(visuals)
    promised = (len(visuals.features), visuals.k)
    if selection.keep.shape != promised:
        raise ValueError(f"{stage!r} returned keep of shape {tuple(selection.keep.shape)}, its budget is {promised}")
    return selection


@torch.no_grad()
def words_meant(call: Call, pools: Collection[int], embeds: Tensor) -> Tensor:
    """How much each token of the instruction is meant by the visual tokens of some pools, [B, M]; 0 elsewhere."""
    found = torch.zeros(embeds.shape[:2], dtype=wide(embeds[:0]).dtype, device=embeds.device)
    for rows, at, text in rows_alike(call, pools, lambda row: 0).values():
        relevance = text_relevance(embeds[rows, at], embeds[rows, text])
        found = found.index_put((rows.expand_as(text), text), relevance)
    return found


def of_words(pools: Collection[int]) -> str:
    """The name under which `words_meant` of some pools is kept in a call."""
    return f"text_relevance of {pools}"


class Cutter:
    """Decides the cuts; `at` says which stage cuts before which layer, and the how manieth of its cuts that is.

    owner  whose scopes its taps record in. forms: how the attention modules work; each one that a signal reads is probed here.
    """

    def __init__(self, owner: Any, forms: Forms, plan: Pipeline, reindexes: bool) -> None:
        language_model = forms.language_model
        self.owner, self.forms, self.language_model = owner, forms, language_model
        self.plan, self.reindexes, self.pools = plan, reindexes, pools_of(plan)
        layers = language_model.layers
        self.depth: int = len(layers)
        self.at = plan.cuts(self.depth)
        self.exit_stage = next(iter(plan.exit_stages), None)
        self.exits = set(self.exit_stage.layers(self.depth)) - set(self.at) if self.exit_stage is not None else set()
        self.acts = frozenset({*self.at, *self.exits})
        self.written = {i: repr(stage) for i, (stage, _) in self.at.items()}
        asking: list[tuple[int, Stage]] = [(i, stage) for i, (stage, _) in self.at.items()]
        asking += [(i, self.exit_stage) for i in self.exits if self.exit_stage is not None]
        self.layer_taps: dict[int, LayerTap] = {}
        self.norm: Any = None
        for i, stage in asking:
            for kind, _, where in (name.partition("@") for name in names_of(stage.needs)):
                if kind in AROUND and where == "next":
                    forms.of(i, repr(stage), "norm", *WANTS.get(kind, ()))
                elif kind in AROUND:
                    tapped = forms.of(i - 1, repr(stage), *WANTS.get(kind, ())).attention
                    self.layer_taps[i - 1] = LayerTap(owner, tapped)
                elif kind in ("final_states", "text_final_states"):
                    self.norm = final_norm(language_model, repr(stage))
        changing = {i: stage for stage in plan.layer_stages for i in self._changing(stage)}
        self.transition_taps = {
            i: TransitionTap(owner, attention_in(layers[i], repr(stage)), mlp_in(layers[i], repr(stage)))
            for i, stage in sorted(changing.items())
        }
        self.taps: tuple[LayerTap | TransitionTap, ...] = (*self.layer_taps.values(), *self.transition_taps.values())

    def install(self) -> list[RemovableHandle]:
        return [handle for tap in self.taps for handle in tap.install()]

    def arm(self) -> None:
        """Listen to the call that begins."""
        scope = current(self.owner)
        assert scope is not None
        scope.state[LISTENS] = True

    @property
    def first(self) -> int | None:
        """The first layer that may see fewer tokens than the language model is given."""
        return min(self.acts, default=None)

    def pools_in(self, stage: Stage) -> list[int]:
        """The pools of tokens that a stage acts on."""
        return sorted({self.pools[modality] for modality in stage.modalities})

    def drops(self, tokens: Mapping[int, int]) -> bool:
        """Whether any cut drops some of the `tokens` of each pool that enter the language model, or an exit may."""

        def entering(stage: Stage) -> int:
            return sum(tokens.get(pool, 0) for pool in self.pools_in(stage))

        if self.exit_stage is not None and self.exits and entering(self.exit_stage):
            return True
        # what a stage before leaves is not more, and what comes to this one is known only then
        return any(min(stage.budgets(n, self.depth)) < n for stage in self.plan.layer_stages if (n := entering(stage)))

    def _changing(self, stage: LayerStage) -> set[int]:
        """The layers whose changes of tokens a stage adds up."""
        wheres = {name.partition("@")[2] for name in names_of(stage.needs) if kind_of(name) in CHANGES}
        return {i for where in wheres for i in self._summed(stage, where, stage.cuts(self.depth)[-1])}

    def _summed(self, stage: LayerStage, where: str, end: int) -> Sequence[int]:
        """The layers before layer `end` that a signal "transitions@where" adds up: those from one on (a number, or a part of the
        depth; one before the first cut), or those of a list "3+4+9+"."""
        if "+" in where:
            return [i for i in map(int, where.rstrip("+").split("+")) if i < end]
        start = round(float(where) * self.depth) if "." in where else int(where)
        return range(min(start, stage.cuts(self.depth)[0] - 1), end)

    @torch.no_grad()
    def cut(self, call: Call, index: int, hidden: Tensor, given: Tables) -> None:
        """Decide the cut before layer `index` and append the group of tokens that is left. `given`: rotary tables of the first
        layer."""
        assert call.pools is not None and call.texts is not None and call.record is not None
        stage, number = self.at[index]
        pools, before = self.pools_in(stage), call.groups[-1]
        here = call.patch_counts(pools)
        if number == 0:
            call.entered = here
        budgets = {row: stage.budgets(tokens, self.depth)[number] for row, tokens in enumerate(call.entered) if tokens}
        if all(k >= here[row] for row, k in budgets.items()):
            return
        counts, left = list(before.counts), list(here)
        device = call.pools.device
        places = torch.arange(before.physical, device=device).expand(call.batch, -1)
        if before.valid is not None:
            places = places.masked_fill(~before.valid, -1)
        around = self._around(call, index, hidden, given, pools)
        merges, scores, mass = [], [], before.mass
        if mass is None and self.plan.weighs:
            mass = torch.ones(places.shape, device=device)
        groups = rows_alike(call, pools, lambda row: budgets.get(row, 0), stage.lays)
        for (tokens, k, _, lying), (rows, at, text) in groups.items():
            if k >= tokens:
                continue
            stand = torch.full_like(at, -1)
            if k:
                cut = replace(around, rows=rows, at=at, text=text)
                signals = {name: cut.signal(name).to(device) for name in names_of(stage.needs)}
                features = hidden[rows.to(hidden.device), at.to(hidden.device)]
                layout, slots = lying or Layout.raster(1, 1, tokens), None
                if lying is not None:
                    slots = call.kept["cells"][rows, at]
                chosen = choose(stage, Visuals(features, layout, k, signals, slots, cut=number))
                slots = gather(at, chosen.keep)
                stand = stand.scatter(1, chosen.keep, slots.sort(dim=1).values)
                if chosen.merges:
                    merges.append((rows, at, chosen))
                if mass is not None:
                    mass = mass.index_put((rows, slots), chosen.sizes(mass[rows, at]))
                if chosen.scores is not None:
                    scores.append((rows, at, chosen.scores.detach()))
            places = places.index_put((rows, at), stand)
        for row, k in budgets.items():
            if k < left[row]:
                counts[row] += k - left[row]
                left[row] = k
        self._append(call, index, places, counts, self.plan.positions or stage.positions, merges, mass)
        self._count(call, pools, left)
        call.groups[-1].stage, call.groups[-1].scores = self.written[index], scores

    @staticmethod
    def _count(call: Call, pools: list[int], left: list[int]) -> None:
        """Note how many tokens of some pools are left in each row. Where a budget was shared by pools that other stages tell apart,
        only the device knows how many are of which: this waits for it."""
        assert call.pools is not None
        for row, total in enumerate(left):
            shared = [pool for pool in pools if call.pool_counts[pool][row]]
            for pool in shared if sum(call.pool_counts[pool][row] for pool in shared) > total else ():
                alone = total if len(shared) == 1 or not total else int((call.pools[row] == pool).sum())
                call.pool_counts[pool][row] = alone

    @torch.no_grad()
    def leave(self, call: Call, index: int, hidden: Tensor, given: Tables) -> None:
        """Ask, before layer `index`, which rows lose all their visual tokens, and append the group that is left. Waits for the
        device."""
        assert call.pools is not None and call.texts is not None and self.exit_stage is not None
        before, stage = call.groups[-1], self.exit_stage
        pools = self.pools_in(stage)
        around = self._around(call, index, hidden, given, pools)
        gone: list[int] = []
        for (tokens, *_), (rows, at, text) in rows_alike(call, pools, lambda row: 0).items():
            cut = replace(around, rows=rows, at=at, text=text)
            signals = {name: cut.signal(name) for name in names_of(stage.needs)}
            features = hidden[rows.to(hidden.device), at.to(hidden.device)]
            visuals = Visuals(features, Layout.raster(1, 1, tokens), 0, signals)
            with torch.autocast(hidden.device.type, enabled=False):
                out = stage.leave(visuals, index).tolist()
            gone += [row for row, leaves in zip(rows[:, 0].tolist(), out, strict=True) if leaves]
        if not gone:
            return
        counts, left = list(before.counts), call.patch_counts(pools)
        device = call.pools.device
        places = torch.arange(before.physical, device=device).expand(call.batch, -1)
        if before.valid is not None:
            places = places.masked_fill(~before.valid, -1)
        leaves = np.zeros((call.batch, 1), bool)
        leaves[gone] = True
        places = places.masked_fill(call.patches(pools) & sent(leaves, device), -1)
        for row in gone:
            counts[row] -= left[row]
            left[row] = 0
        self._append(call, index, places, counts, self.plan.positions or "keep", [], before.mass)
        self._count(call, pools, left)
        call.groups[-1].stage = repr(stage)

    def _append(
        self,
        call: Call,
        index: int,
        places: Tensor,
        counts: list[int],
        policy: str,
        merges: list[tuple[Tensor, Tensor, Selection]],
        mass: Tensor | None,
    ) -> None:
        """The group of tokens that layers from `index` on see: `places` [B, S] in that of the group before, -1 where they are
        gone."""
        assert call.pools is not None and call.texts is not None
        before = call.groups[-1]
        packed = pack(places, counts)

        def follow(index: Tensor | None) -> Tensor:
            return packed.source if index is None else index.gather(1, packed.source)

        assert before.positions is not None
        positions, here = renumbered(
            before.positions, places, packed, before.valid, self.reindexes and policy == "reindex"
        )
        gone = before.gone if here is None else here if before.gone is None else before.gone + here
        call.pools, call.texts = follow(call.pools), follow(call.texts)
        if packed.valid is not None:
            call.pools, call.texts = call.pools * packed.valid, call.texts & packed.valid
        call.kept = {name: follow(values) for name, values in call.kept.items()}
        assert before.place is not None
        if packed.valid is None:
            place = before.place.gather(1, packed.place)
        else:
            place = before.place.gather(1, packed.place.clamp_min(0)).masked_fill(~packed.valid, -1)
        group = Group(
            index, before.logical, packed.source.shape[1], counts, packed.valid, follow(before.source), place,
            follow(before.from_base), packed.source, min(before.tail, packed.source.shape[1]), positions, gone, merges,
            mass=None if mass is None else follow(mass),
        )  # fmt: skip
        call.groups.append(group)

    def _around(self, call: Call, index: int, hidden: Tensor, given: Tables | None, pools: list[int]) -> Cut:
        """What can be asked about a cut of some pools before layer `index`, for no rows yet."""
        group, words = call.groups[-1], of_words(pools)
        kept = {**call.kept, "text_relevance": call.kept[words]} if words in call.kept else call.kept

        def heads(i: int, states: Tensor, tables: Tables | None, ran: bool, cache: Any = None) -> Heads:
            assert group.positions is not None
            positions = shifted(group.positions, ledger_of(call.cache, i))
            return Heads(self.forms.of(i, self.plan), states, tables, group.valid, call, i, ran, positions, cache)

        def before() -> Heads:
            states, tables, cache = self.layer_taps[index - 1].seen
            return heads(index - 1, states, tables, True, cache)

        def behind() -> Heads:
            ledger = ledger_of(call.cache, index)
            tables = given  # some layers are given none
            if given is not None:
                tables = layer_tables(self.language_model, index, call, group, ledger, hidden, given)
            return heads(index, self.forms.of(index, self.plan).entering(hidden), tables, ran=False)

        def norm(states: Tensor) -> Tensor:
            with whole(self.forms.root, self.norm):
                return self.norm(states)

        def transitions(start: str, absolute: bool) -> Tensor:
            assert call.pools is not None
            name = f"{absolute=} transitions from {start}"
            total, done = call.kept.get(name), call.summed.get(name, 0)  # of earlier cuts
            if total is None:
                total = torch.zeros(call.batch, group.physical, device=call.pools.device)
            for i in (i for i in self._summed(self.at[index][0], start, index) if i >= done):
                then = call.group_of(i)
                values = self.transition_taps[i].value(then.valid, absolute)
                for later in call.groups[call.groups.index(then) + 1 :]:
                    assert later.from_previous is not None
                    values = values.gather(1, later.from_previous.to(values.device))
                total = total + values.to(total.device)
            call.kept[name], call.summed[name] = total, index
            return total

        return Cut(
            NOWHERE, NOWHERE, NOWHERE, hidden, norm, functools.cache(before), functools.cache(behind), transitions, kept,
        )  # fmt: skip
