# SPDX-License-Identifier: Apache-2.0
"""Bayesian search of the options of a plan for one model, on samples without labels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.table import Table
from torch import Tensor
from typing_extensions import Self

from .api import _stock, compressed, plan_for, trace
from .budget import percent
from .plan import as_pipeline
from .records import Lines, RecordError, write_json
from .spending import at_budget, check, spent
from .stage import Pipeline, Stage

Space: TypeAlias = "Mapping[str, Sequence[Any]]"
"""What is searched: "method.option" (or "method#2.option" for the second stage of that method) with (low, high), both of them
included, whole numbers where both are; or with a list of choices."""


@dataclass(frozen=True)
class Objective:
    """What plans are judged by; more is better.

    observe  what is of interest in a forward pass of the model on one entry of the samples.
    compare  what was observed on the stock model and on the compressed one: a value for each sample of the entry, [B].
    """

    name: str
    observe: Callable[[Any, Mapping[str, Any]], Any]
    compare: Callable[[Any, Any], Tensor]


def final_state(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden state of the last token of each prompt behind the final norm, [B, D]: what the first answer token is read from."""
    stock = _stock(model)
    hidden = getattr(stock, stock.base_model_prefix)(**inputs, use_cache=False).last_hidden_state
    mask = inputs.get("attention_mask")
    if mask is None:
        return hidden[:, -1]
    place = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), place, 0).amax(1).to(hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def cosine(stock: Tensor, compressed: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(stock.double(), compressed.double(), dim=-1)


FINAL_STATE = Objective("cosine of the final state", final_state, cosine)
"""VFlowOpt's: how little compression turns the state that the first answer token is read from."""


@dataclass(frozen=True)
class Trial:
    """One plan that was tried. number: 0 is the plan as it was given; value: mean over the samples; share: visual tokens left, mean
    over layers and samples; note: why it counts 0, where it does."""

    number: int
    params: dict[str, Any]
    value: float
    share: float
    note: str = ""


@dataclass(frozen=True)
class Tuned:
    """What a search has found. `trials` in the order they were run; `best` is the first of the largest value."""

    stages: tuple[Stage, ...]
    positions: str | None
    trials: list[Trial]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Trial:
        return max(self.trials, key=lambda trial: trial.value)

    @property
    def plan(self) -> Pipeline:
        return Pipeline(_with(self.stages, self.best.params), self.positions)

    def table(self, rows: int = 10) -> Table:
        """The best trials, and the plan as it was given."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.params))
        table = Table(
            title=f"{self.about['plan']} on {self.about['samples']} samples, best of {len(self.trials)} plans"
        )
        short = Counter(name.rpartition(".")[2] for name in names)
        options = [o if short[o := name.rpartition(".")[2]] == 1 else name for name in names]
        for heading in ("trial", self.about["objective"], "tokens left", *options):
            table.add_column(heading, justify="right")
        ranked = sorted(self.trials, key=lambda trial: (-trial.value, trial.number))
        for trial in [*ranked[:rows], *(t for t in ranked[rows:] if t.number == 0)]:
            values = [trial.params.get(name, "") for name in names]
            cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
            number = str(trial.number) if trial.number else "as given"
            table.add_row(number, f"{trial.value:.4f}", f"{trial.share:.1%}", *cells)
        return table

    def to_dict(self) -> dict[str, Any]:
        """The best plan as plain values, which `compress` takes, and how it was found."""
        best, given = self.best, self.trials[0]
        stages = [{"method": stage.name, **stage.options()} for stage in _with(self.stages, best.params)]
        found = {"value": best.value, "as_given": given.value, "share": best.share, "trials": len(self.trials) - 1}
        return {"stages": stages, "positions": self.positions, "tuned": {**self.about, **found}}

    def save(self, path: Path | str) -> Path:
        """Write the plan file."""
        return write_json(path, self.to_dict())


def tune(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    plan: Any,
    space: Space | None = None,
    objective: Objective = FINAL_STATE,
    *,
    budget: float | None = None,
    unit: str = "tokens",
    trials: int = 50,
    seed: int = 0,
    journal: Path | str | None = None,
    show: Callable[[Trial], None] | None = None,
) -> Tuned:
    """Search the options of `plan` with which `model` does best by `objective` on `samples` (model inputs, on its device).

    space    what is searched, besides what the methods of the plan declare themselves (`search_space`, as vflowopt does); it
             goes before that where both name an option.
    budget   the largest part of the visual tokens that may be left on average over the layers of the LLM (a token per visual
             more, for rounding), or with unit="flops" of the FLOPs of its LLM layers, text included; plans with more than that
             count 0. In a plan of one stage before the LLM, or of one recipe, it is also the `keep`, unless that is searched;
             with FLOPs the largest `keep` within them is found first, also of a stage in the LLM.
    trials   how many plans are tried besides the given one (0: none), by a Gaussian process with expected improvement
             (optuna), the first ten at random. Values that are not numbers count 0, and so do options that do not go together.
    seed     the same seed gives the same search on the same machine, also if it was interrupted.
    journal  file of all trials; a search that finds its own there goes on from it, also with more trials than before.
    show     called with every trial when it is there.

    The model must be stock or is put back into its state; it is never trained. Raises ImportError without optuna and scipy
    (`pip install "mmcompress[tune]"`), and ValueError for an empty space or a journal of another search.
    """
    written = plan_for(model, plan)
    stages, positions = written.stages, written.positions
    check(budget, unit)
    bounds = _bounds(stages, space or {}) if trials else {}
    if not samples:
        raise ValueError("no samples to tune on")
    stages = at_budget(
        stages, budget, unit, space or {}, lambda tried: _share(model, samples[:8], tried, positions, unit)
    )
    bounds = _bounds(stages, space or {}) if trials else {}
    suggest = _Suggest(bounds, seed) if trials else None
    about = {"plan": " >> ".join(map(repr, stages)), "objective": objective.name, "seed": seed}
    about["budget"] = budget if unit == "tokens" else f"{unit}={budget}"
    search = {**about, "positions": positions, "space": {k: list(v) for k, v in bounds.items()}}
    with _Journal(journal, {**search, "samples": _fingerprint(samples), "model": _name(model)}) as log:
        judge = _Judge(model, samples, objective, budget, positions, unit)
        done = log.trials
        for trial in done:
            if show is not None:
                show(trial)
        for number in range(len(done), trials + 1):
            params = suggest(done[1:]) if number and suggest else {}
            trial = judge(number, stages, params)
            log.add(trial)
            if show is not None:
                show(trial)
    return Tuned(stages, positions, log.trials, {**about, "model": _name(model), "samples": judge.count})


# ---------------------------------------------------------------------- space
def parse_space(texts: Sequence[str]) -> dict[str, Sequence[Any]]:
    """A space from lines like "divprune.keep=0.1:0.5", "holov.num_strips=2:8" or "fopru.strategy=rank|row"."""
    space: dict[str, Sequence[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        ends = values.split(":")
        try:
            if not all(name.strip().partition(".")) or not values.strip():
                raise ValueError
            space[name.strip()] = (
                tuple(_literal(end) for end in ends) if len(ends) == 2 else [_literal(v) for v in values.split("|")]
            )
        except ValueError as error:
            raise ValueError(
                f"cannot read the range {text!r}: write method.option=low:high, or method.option=one|other"
            ) from error
    return space


def _literal(text: str) -> Any:
    text = text.strip()
    if (part := percent(text)) is not None:
        return part
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"True": True, "False": False, "None": None}.get(text, text)


def _names(stages: Sequence[Stage]) -> Iterator[tuple[str, Stage]]:
    """Every stage with its name in a space."""
    seen: Counter[str] = Counter()
    for stage in stages:
        seen[stage.name] += 1
        yield (stage.name if seen[stage.name] == 1 else f"{stage.name}#{seen[stage.name]}"), stage


def _with(stages: Sequence[Stage], params: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages with other values of some options."""
    found = []
    for name, stage in _names(stages):
        own = {key.rpartition(".")[2]: value for key, value in params.items() if key.rpartition(".")[0] == name}
        found.append(dataclasses.replace(stage, **own) if own else stage)
    return tuple(found)


def own_space(plan: Any, space: Space, declared: bool = False) -> dict[str, Sequence[Any]]:
    """The part of `space` that names options of the plan; declared: also what its methods declare themselves."""
    found: dict[str, Sequence[Any]] = {}
    for name, stage in _names(as_pipeline(plan).stages):
        if declared:
            own: Mapping[str, Sequence[Any]] = getattr(stage, "search_space", dict)()
            found |= {f"{name}.{option}": values for option, values in own.items()}
        found |= {key: values for key, values in space.items() if key.rpartition(".")[0] == name}
    return found


def _bounds(stages: Sequence[Stage], space: Space) -> dict[str, Sequence[Any]]:
    """Everything that is searched, checked."""
    bounds: dict[str, Sequence[Any]] = {}
    options: dict[str, list[str]] = {}
    for name, stage in _names(stages):
        options[name] = list(stage.options())
        declared: Mapping[str, Sequence[Any]] = getattr(stage, "search_space", dict)()
        bounds |= {f"{name}.{option}": values for option, values in declared.items()}
    for key, values in space.items():
        name, _, option = key.rpartition(".")
        if name not in options or option not in options[name]:
            known = ", ".join(f"{n}.{o}" for n, names in options.items() for o in names)
            raise ValueError(f"the plan has no option {key!r} to search: there is {known}")
        ordered = isinstance(values, tuple)
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
        if not values or (ordered and (len(values) != 2 or not numbers or values[0] > values[1])):
            raise ValueError(f"{key}: {values!r} is no range: give (low, high), or a list of choices")
        bounds[key] = values
    if not bounds:
        raise ValueError(
            f"nothing to search in {' >> '.join(map(repr, stages))}: give ranges, like --search {next(iter(options))}.keep=0.1:0.5 "
            f"(space= in Python)"
        )
    return dict(sorted(bounds.items()))


# ---------------------------------------------------------------------- judging
class _Judge:
    """Evaluates plans on samples whose stock runs were observed once."""

    def __init__(
        self,
        model: Any,
        samples: Sequence[Mapping[str, Any]],
        objective: Objective,
        budget: float | None,
        positions: str | None,
        unit: str = "tokens",
    ) -> None:
        self.model, self.samples, self.objective = model, samples, objective
        self.budget, self.positions, self.unit = budget, positions, unit
        with torch.no_grad(), compressed(model, "uniform(keep=1.0)"):  # drops nothing
            self.wanted = [objective.observe(model, inputs) for inputs in samples]
        self.count = sum(len(inputs["input_ids"]) for inputs in samples)

    def __call__(self, number: int, stages: tuple[Stage, ...], params: dict[str, Any]) -> Trial:
        values: list[float] = []
        left, full, visuals = 0.0, 0, 0
        try:
            with torch.no_grad(), compressed(self.model, Pipeline(_with(stages, params), self.positions)):
                for inputs, wanted in zip(self.samples, self.wanted, strict=True):
                    found = self.objective.observe(self.model, inputs)
                    values += self.objective.compare(wanted, found).nan_to_num(0.0, 0.0, 0.0).tolist()
                    mine = spent(trace(self.model), self.unit)
                    left, full, visuals = left + mine[0], full + mine[1], visuals + mine[2]
        except ValueError as error:
            if number == 0:
                raise
            return Trial(number, params, 0.0, math.nan, str(error))
        if self.budget is not None and left > self.budget * full + visuals:
            what = "visual tokens" if self.unit == "tokens" else "FLOPs"
            note = f"{left / full:.3f} of the {what} are left, more than the budget"
            return Trial(number, params, 0.0, left / full, note)
        return Trial(number, params, sum(values) / len(values), left / full)


def _share(
    model: Any, samples: Sequence[Mapping[str, Any]], stages: tuple[Stage, ...], positions: str | None, unit: str
) -> float:
    """What stages leave on samples."""
    left, full = 0.0, 0
    with torch.no_grad(), compressed(model, Pipeline(stages, positions)):
        for inputs in samples:
            final_state(model, inputs)
            mine = spent(trace(model), unit)
            left, full = left + mine[0], full + mine[1]
    return left / full


def need_optuna() -> Any:
    """The module, or an ImportError that says how to get it."""
    try:
        import optuna
        import scipy  # noqa: F401 - the Gaussian process needs it
    except ImportError as error:
        raise ImportError(f'tuning needs optuna and scipy ({error}): pip install "mmcompress[tune]"') from error
    return optuna


class _Suggest:
    """Options to try next, a function of the trials so far and of the seed alone."""

    def __init__(self, bounds: Mapping[str, Sequence[Any]], seed: int) -> None:
        self.optuna, self.seed = need_optuna(), seed
        self.distributions: dict[str, Any] = {}
        kinds = self.optuna.distributions
        for name, values in bounds.items():
            if not isinstance(values, tuple):
                self.distributions[name] = kinds.CategoricalDistribution(values)
            elif all(isinstance(v, int) for v in values):
                self.distributions[name] = kinds.IntDistribution(values[0], values[1])
            else:
                self.distributions[name] = kinds.FloatDistribution(float(values[0]), float(values[1]))

    def __call__(self, done: Sequence[Trial]) -> dict[str, Any]:
        optuna = self.optuna
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                # made anew each time: a sampler that goes on would depend on where the search was interrupted
                sampler = optuna.samplers.GPSampler(seed=self.seed * 100_003 + len(done), deterministic_objective=True)
                study = optuna.create_study(direction="maximize", sampler=sampler)
                for trial in done:
                    made = optuna.trial.create_trial(
                        params=trial.params, distributions=self.distributions, value=trial.value
                    )
                    study.add_trial(made)
                return dict(study.ask(self.distributions).params)
        finally:
            optuna.logging.set_verbosity(level)


# ---------------------------------------------------------------------- journal
class _Journal:
    """Trials of one search, one JSON object per line of a file, behind a line that says which search it is."""

    def __init__(self, path: Path | str | None, search: dict[str, Any]) -> None:
        self.lines, self.trials = (None if path is None else Lines(Path(path))), list[Trial]()
        if self.lines is not None:
            try:
                self._go_on(self.lines, json.loads(json.dumps(search)))
            except BaseException:
                self.lines.close()
                raise

    def _go_on(self, lines: Lines, search: dict[str, Any]) -> None:
        if not lines.values:
            lines.append([search])
            return
        before, *trials = lines.values
        if wrong := [key for key in search if before.get(key) != search[key]]:
            raise RecordError(
                f"{lines.path} is the journal of another search (other {', '.join(wrong)}): delete it, or name another file"
            )
        self.trials = [Trial(**line) for line in trials]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.lines is not None:
            self.lines.close()

    def add(self, trial: Trial) -> None:
        if self.lines is not None:
            self.lines.append([asdict(trial)])
        self.trials.append(trial)


def _fingerprint(samples: Sequence[Mapping[str, Any]]) -> str:
    """The same for the same inputs only."""
    digest = hashlib.sha256()
    for inputs in samples:
        for name in sorted(inputs):
            value = inputs[name]
            digest.update(f"{name} {getattr(value, 'shape', value)}".encode())
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def _name(model: Any) -> str:
    """The same for the same weights only, wherever they lie."""
    stock, digest = _stock(model), hashlib.sha256()
    for name, weight in stock.named_parameters():
        some = weight.detach().flatten()[:8].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some)
    return f"{type(stock).__name__} {digest.hexdigest()[:16]}"
