"""The rows and runs of a sweep: a file of configs/sweeps/ with `get_sweep()`."""

import difflib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from absl import flags
from ml_collections import config_flags

from alexnet_jax.training import load as load_lib
from alexnet_jax.training.config import (
    Config,
    ConfigError,
    as_json,
    flat,
    validate,
)

ROOT = Path(__file__).parents[2]
COMPARISONS = ("difference", "ratio")


class SweepError(ValueError):
    """What is wrong with a sweep or with what was asked of it, in words."""


# What a sweep consists of.


@dataclass(frozen=True)
class Paper:
    """What was published about a row.

    Attributes:
      value: in the sweep's metric (errors in per cent), None: not published.
      effect: row minus baseline, or row over baseline, as the sweep compares; None:
        not published.
      measured_on: the data, and the views if they are known.
      source: where it stands.
      at_least: the effect is "over" so much.
    """

    value: float | None = None
    effect: float | None = None
    measured_on: str = ""
    source: str = ""
    at_least: bool = False


@dataclass(frozen=True)
class Row:
    """A setting that is run with every seed.

    Attributes:
      name: unique in its sweep.
      overrides: config field -> value, such as {"model.overrides.lrn": False}.
      paper: what was published about it.
      config: another config file than the sweep's.
      search: one config field and its candidates. All are run with the first seed; the
        best by the sweep's metric with the others.
      baseline: another row to compare with than the sweep's.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    paper: Paper | None = None
    config: str | None = None
    search: Mapping[str, Sequence[Any]] | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        if self.search is not None and (len(self.search) != 1 or not self.candidates()):
            raise SweepError(
                f"row {self.name!r}: search={self.search} must be one field and its "
                'candidates, such as {"optim.learning_rate": (1e-3, 3e-3)}.'
            )

    def candidates(self) -> Sequence[Any]:
        """The values that are searched; (None,) without a search."""
        return (None,) if self.search is None else next(iter(self.search.values()))


@dataclass(frozen=True)
class Measurement:
    """A run's value of a metric.

    Attributes:
      value: in the metric's unit.
      censored: the run ended before the value was known; it is above `value`.
      tie: what tells censored runs apart, the lower the better.
    """

    value: float
    censored: bool = False
    tie: float = 0.0

    def __str__(self) -> str:
        return f"{'>' if self.censored else ''}{self.value:.2f}"


@dataclass(frozen=True)
class FinalError:
    """An error of the last evaluation, in per cent; lower is better."""

    key: str = "eval/top1_error"

    def __str__(self) -> str:
        return f"{self.key} (%)"

    def measure(self, records: Sequence[Mapping[str, Any]]) -> Measurement | None:
        """The last record's that has it; None: there is none."""
        values = [record[self.key] for record in records if self.key in record]
        return Measurement(100 * values[-1]) if values else None


@dataclass(frozen=True)
class EpochsTo:
    """Epochs until the training error, a mean between two records, was so low."""

    target: float = 0.25
    key: str = "train/top1_error"

    def __str__(self) -> str:
        return f"epochs to {100 * self.target:g}% training error"

    def measure(self, records: Sequence[Mapping[str, Any]]) -> Measurement | None:
        """The epoch of the first such record; without one, censored at the last.

        Records of fewer steps than the others do not count: where a run was stopped, and
        where it went on.
        """
        found = [record for record in records if self.key in record]
        if not found:
            return None
        steps = [0, *(record["step"] for record in found)]
        windows = [after - before for before, after in itertools.pairwise(steps)]
        whole = max(windows)
        for record, window in zip(found, windows, strict=True):
            if window == whole and record[self.key] <= self.target:
                return Measurement(record["epoch"])
        last = found[-1]
        return Measurement(last["epoch"], censored=True, tie=last[self.key])


@dataclass(frozen=True)
class Sweep:
    """Rows that are trained alike but for what they change.

    Attributes:
      about: a sentence: what is asked.
      config: file of configs/, ":ARGUMENT" and all, for rows without their own.
      rows: unique names.
      baseline: the row that the others are compared with.
      measured_on: the data that it runs on, unless it is told others.
      overrides: config field -> value, for all rows; a row's own win.
      metric: what a run is judged by.
      compare: with the baseline, by "difference" or by "ratio".
      seeds: of the runs, unless others are asked for.
    """

    about: str
    config: str
    rows: Sequence[Row]
    baseline: str
    measured_on: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    metric: FinalError | EpochsTo = FinalError()
    compare: Literal["difference", "ratio"] = "difference"
    seeds: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        if self.compare not in COMPARISONS:
            raise SweepError(
                f"compare={self.compare!r} must be one of {', '.join(COMPARISONS)}."
            )
        check_seeds(self.seeds, f"seeds={self.seeds}")
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise SweepError(f"rows {', '.join(names)}: two have the same name.")
        for baseline in (self.baseline, *(row.baseline for row in self.rows)):
            if baseline is not None and baseline not in names:
                raise SweepError(
                    f"baseline={baseline!r} must be a row: {', '.join(names)}."
                )


def check_seeds(seeds: Sequence[int], shown: str) -> None:
    """Raise SweepError, beginning with `shown`, unless there are seeds, and all differ."""
    in_range = all(0 <= seed < 2**32 for seed in seeds)
    if not in_range or not 0 < len(set(seeds)) == len(seeds):
        raise SweepError(
            f"{shown} must be different numbers from 0 to 4294967295, such as 0,1,2."
        )


def load(path: str | os.PathLike[str]) -> Sweep:
    """The sweep of a file; "FILE:ARGUMENT" is get_sweep(ARGUMENT), as of configs.

    Raises:
      SweepError: if there is no such file, or no sweep in it.
    """
    path, colon, argument = os.fspath(path).partition(":")
    if not Path(path).is_file():
        shipped = sorted(file.name for file in (ROOT / "configs/sweeps").glob("*.py"))
        raise SweepError(
            f"{path}: there is no such file in {Path.cwd()}; configs/sweeps/ has "
            f"{', '.join(shipped)}."
        )
    try:
        sweep = load_lib.run_file(f"{path}{colon}{argument}", "get_sweep")
    except ConfigError as error:
        raise SweepError(
            f"{error} It must define get_sweep(), which returns a sweeps.Sweep."
        ) from error
    if not isinstance(sweep, Sweep):
        raise SweepError(f"{path}: get_sweep() must return a sweeps.Sweep.")
    return sweep


# Its runs.


@dataclass(frozen=True)
class Run:
    """One training run: a row's, with a seed and perhaps a candidate of its search."""

    row: str
    candidate: Any
    seed: int
    config: str
    overrides: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Where it is below the sweep's runs/."""
        value = "" if self.candidate is None else f"-{slug(as_text(self.candidate))}"
        return f"{slug(self.row)}{value}/seed_{self.seed}"

    def flags(self) -> list[str]:
        """What main is told, but for the workdir."""
        fields = [f"--config.{k}={as_text(v)}" for k, v in self.overrides.items()]
        return [f"--config={self.config}", *fields]

    def fields(self) -> dict[str, Any]:
        """Every field of its config as a workdir's config.json has it."""
        config = set_fields(load_config(self.config), self.overrides, "")
        return flat(as_json(config))


@dataclass(frozen=True)
class Plan:
    """A sweep with the seeds and the settings that were asked for.

    Attributes:
      settings: config field -> text as on the command line; they win over the sweep.
    """

    name: str
    sweep: Sweep
    seeds: Sequence[int]
    settings: Mapping[str, str] = field(default_factory=dict)
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for row in self.sweep.rows:
            for name in self.settings:
                if name in {*row.overrides, *(row.search or ())}:
                    raise SweepError(
                        f"--set {name}={self.settings[name]}: the rows of sweep "
                        f"{self.name!r} differ in it (row {row.name!r}); change it in "
                        "the sweep's file."
                    )
        folders: dict[str, str] = {}
        for row in self.sweep.rows:
            for candidate in row.candidates():
                run = self.run(row, self.seeds[0], candidate)
                if folders.setdefault(run.name, row.name) != row.name:
                    raise SweepError(
                        f"rows {folders[run.name]!r} and {row.name!r} would share the "
                        f"folder {run.name}; give one another name."
                    )
            if len({self.run(row, 0, c).name for c in row.candidates()}) < len(
                row.candidates()
            ):
                raise SweepError(f"row {row.name!r}: two candidates share a folder.")

    def _check(self, row: Row, config: Config) -> None:
        """Raises SweepError for a config that main would refuse, devices aside."""
        try:
            validate(config, devices=False)
        except ConfigError as error:
            raise SweepError(f"row {row.name!r}: {error}") from error
        key = getattr(self.sweep.metric, "key", "")
        if key.startswith("eval/") and not config.data.eval_split:
            raise SweepError(
                f"sweep {self.name!r} compares {key}, and data.eval_split is empty."
            )
        if key.startswith("eval/views_") and config.eval_views == 1:
            raise SweepError(
                f"sweep {self.name!r} compares {key}: eval_views must not be 1."
            )

    def run(self, row: Row, seed: int, candidate: Any = None) -> Run:
        """A row's run.

        Raises:
          SweepError: for an override or a setting that its config does not take, or a
            config that main would refuse.
        """
        key = (row.name, as_text(candidate))
        if key not in self._made:  # a config and its flags take a while
            self._made[key] = self._make(row, candidate)
        file, overrides = self._made[key]
        return Run(row.name, candidate, seed, file, {**overrides, "seed": seed})

    def _make(self, row: Row, candidate: Any) -> tuple[str, dict[str, Any]]:
        """The config file and the overrides of its runs, but for the seed."""
        file = _config_path(row.config or self.sweep.config)
        where = f"sweep {self.name!r}, row {row.name!r}: "
        overrides = {**self.sweep.overrides, **row.overrides}
        if row.search is not None:
            overrides[next(iter(row.search))] = candidate
        config = set_fields(load_config(file), overrides, where)
        if "seed" in {*overrides, *self.settings}:
            raise SweepError(f"{where}seed is not set so; give --seeds=0,1,2.")
        parse_fields(config, self.settings, "--set ")
        fields = flat(config.to_dict())
        overrides |= {name: fields[name] for name in self.settings}
        self._check(row, set_fields(config, {"seed": self.seeds[0]}, where))
        return file, overrides

    def runs(self, results: Mapping[str, Measurement | None]) -> list[Run]:
        """The runs that are known to be needed.

        Args:
          results: of the runs that have ended, by name; None for a broken one. Only
            when all candidates of a search have one are its further seeds known.
        """
        found = []
        for row in self.sweep.rows:
            first = [self.run(row, self.seeds[0], c) for c in row.candidates()]
            found += first
            if row.search is None or all(run.name in results for run in first):
                chosen = best(first, results)
                if chosen is not None:
                    seeds = self.seeds[1:]
                    found += [self.run(row, s, chosen.candidate) for s in seeds]
        return found

    def is_beaten(
        self, run: Run, epoch: float, results: Mapping[str, Measurement | None]
    ) -> bool:
        """Whether a candidate that is at `epoch` has lost to one that was there sooner.

        Only where epochs are what counts; then the rest of its run changes nothing.
        """
        if run.candidate is None or not isinstance(self.sweep.metric, EpochsTo):
            return False
        row = next(row for row in self.sweep.rows if row.name == run.row)
        others = (self.run(row, run.seed, c).name for c in row.candidates())
        reached = (results.get(name) for name in others if name != run.name)
        return run.seed == self.seeds[0] and any(
            other is not None and not other.censored and other.value < epoch
            for other in reached
        )


def best(runs: Sequence[Run], results: Mapping[str, Measurement | None]) -> Run | None:
    """The run with the lowest result; a censored one only if there is no other.

    The single run of a row without a search; None if all candidates are broken.
    """
    if len(runs) == 1:
        return runs[0]
    ranked = [
        (result.censored, result.tie if result.censored else result.value, i)
        for i, run in enumerate(runs)
        if (result := results.get(run.name)) is not None
    ]
    return runs[min(ranked)[2]] if ranked else None


def slug(text: str) -> str:
    """Letters, digits, dots and dashes of a text, the rest as "_": part of a path."""
    return re.sub(r"[^\w.\-]+", "_", text).strip("_")


# Its configs.


def load_config(file: str) -> Config:
    """The config of a file of configs/, such as "configs/cifar10.py:3".

    Raises:
      SweepError: if there is none, or it makes no config.
    """
    try:
        return load_lib.load_config(_config_path(file))
    except ConfigError as error:
        raise SweepError(f"config {file!r}: {error}") from error


def _config_path(file: str) -> str:
    """As given if it is there, else in the repository."""
    path, colon, argument = file.partition(":")
    if not Path(path).is_file():
        path = str(ROOT / path)
    if not Path(path).is_file():
        raise SweepError(f"config {file!r}: there is no such file.")
    return f"{path}{colon}{argument}"


def set_fields(config: Config, overrides: Mapping[str, Any], where: str) -> Config:
    """Changes fields of a config, in place, exactly as main would from `Run.flags`.

    Raises:
      SweepError: beginning with `where`, for a field that there is not, or a value
        that is of another type or cannot be written on a command line.
    """
    texts = {name: as_text(value) for name, value in overrides.items()}
    parse_fields(config, texts, where)
    fields = flat(config.to_dict())
    for name, value in overrides.items():
        found = fields[name]
        same_kind = isinstance(found, bool) == isinstance(value, bool)
        if found != value or not same_kind:
            raise SweepError(
                f"{where}{name}={value!r} must be of type {type(found).__name__}."
            )
    return config


def parse_fields(config: Config, texts: Mapping[str, str], where: str) -> None:
    """Changes fields of a config, in place, by main's own flags.

    Raises:
      SweepError: as `set_fields`.
    """
    if not texts:
        return
    known = flat(config.to_dict())
    for name in texts:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise SweepError(f"{where}{name}: the config has no such field{hint}")
    argv = ["sweep", *(f"--config.{name}={text}" for name, text in texts.items())]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        words = " ".join(str(error).split()).replace("flag --config.", "")
        raise SweepError(f"{where}{words}") from error


def as_text(value: Any) -> str:
    """A value as main's command line takes it."""
    return value if isinstance(value, str) else repr(value)


def differences(run: Run, stored: Path) -> list[str]:
    """How a workdir's config.json differs from what a run asks for now.

    A field that there was not yet when it was stored had what is now its default.

    Raises:
      ConfigError: if the file is damaged.
    """
    own = load_lib.read_config(stored.parent) or {}
    old, new = flat(as_json(load_lib.from_stored(own))), run.fields()
    return [
        f"{name}: {old[name]} there, {new[name]} asked for"
        for name in sorted(new)
        if old[name] != new[name]
    ]
