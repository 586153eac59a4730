"""The rows and runs of a sweep: a file of configs/sweeps/ with `get_sweep()`."""

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from absl import flags
from ml_collections import config_flags

from alexnet_jax.training.config import Config, ConfigError, as_json, flat, validate
from alexnet_jax.training.load import load_config

ROOT = Path(__file__).parents[2]


class SweepError(ValueError):
    """A user error in a sweep or in its command line."""


@dataclass(frozen=True)
class Paper:
    """Published figures of a row.

    Attributes:
      value: in the sweep's metric (errors in per cent); None: not published.
      effect: row minus baseline, or row over baseline, as the sweep compares; None:
        not published.
      measured_on: the data, and the views if they are known.
      source: where it was published.
      at_least: `effect` is a lower bound.
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
      overrides: config field -> value, for example {"model.overrides.lrn": False}.
      paper: its published figures.
      config: another config file than the sweep's.
      search: one config field and its candidates, for example
        {"optim.learning_rate": (1e-3, 3e-3)}. Each is run with every seed; the best by
        the sweep's metric stands for the row.
      baseline: another row to compare with than the sweep's.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    paper: Paper | None = None
    config: str | None = None
    search: Mapping[str, Sequence[Any]] | None = None
    baseline: str | None = None

    def candidates(self) -> Sequence[Any]:
        """Return the values that are searched; (None,) without a search."""
        if self.search is None:
            return (None,)
        (values,) = self.search.values()
        return values


@dataclass(frozen=True)
class Measurement:
    """A run's value of a metric.

    Attributes:
      value: in the metric's unit.
      censored: the run ended before the value was known; it is above `value`.
      last_error: training error at the end of a censored run, which ranks such runs.
    """

    value: float
    censored: bool = False
    last_error: float = 0.0


@dataclass(frozen=True)
class FinalError:
    """An error of the last evaluation, in per cent; lower is better."""

    key: str = "eval/top1_error"

    def __str__(self) -> str:
        return f"{self.key} (%)"

    def measure(self, records: Sequence[Mapping[str, Any]]) -> Measurement | None:
        """Return the last value in the records; None without any."""
        values = [record[self.key] for record in records if self.key in record]
        return Measurement(100 * values[-1]) if values else None


@dataclass(frozen=True)
class EpochsTo:
    """Epochs until the training error, a mean between two records, is at the target."""

    target: float = 0.25
    key: str = "train/top1_error"

    def __str__(self) -> str:
        return f"epochs to {100 * self.target:g}% training error"

    def measure(self, records: Sequence[Mapping[str, Any]]) -> Measurement | None:
        """Return the epoch of the first such record, else the last epoch, censored.

        Records over fewer steps than the others, after a stop or a resume, do not count.
        """
        found = [record for record in records if self.key in record]
        if not found:
            return None
        steps = [0, *(record["step"] for record in found)]
        windows = [after - before for before, after in itertools.pairwise(steps)]
        for record, window in zip(found, windows, strict=True):
            if window == max(windows) and record[self.key] <= self.target:
                return Measurement(record["epoch"])
        last = found[-1]
        return Measurement(last["epoch"], censored=True, last_error=last[self.key])


Metric = FinalError | EpochsTo


@dataclass(frozen=True)
class Sweep:
    """Rows that are trained alike except for their overrides.

    Attributes:
      about: the question, in one sentence.
      config: file of configs/, with its ":ARGUMENT", for rows without their own.
      rows: with unique names.
      baseline: the row that the others are compared with.
      measured_on: the data of the config.
      overrides: config field -> value, for all rows; a row's own win.
      metric: how a run is judged.
      compare: with the baseline, by "difference" or by "ratio".
      seeds: of the runs, unless the command line has others.
    """

    about: str
    config: str
    rows: Sequence[Row]
    baseline: str
    measured_on: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    metric: Metric = FinalError()
    compare: Literal["difference", "ratio"] = "difference"
    seeds: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        if self.compare not in ("difference", "ratio"):
            raise SweepError(f"compare={self.compare!r} must be difference or ratio.")
        names = [row.name for row in self.rows]
        for baseline in (self.baseline, *(row.baseline for row in self.rows)):
            if baseline is not None and baseline not in names:
                raise SweepError(f"baseline={baseline!r} must be a row: {', '.join(names)}.")


@dataclass(frozen=True)
class Run:
    """One training run of a row.

    Attributes:
      candidate: of the row's search; None without a search.
      config: path of its config file, with its ":ARGUMENT".
      overrides: config field -> value.
      fields: every field of its config, as config.json stores it.
    """

    row: str
    candidate: Any
    seed: int
    config: str
    overrides: Mapping[str, Any]
    fields: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its folder in the sweep's runs/."""
        parts = [self.row] if self.candidate is None else [self.row, as_text(self.candidate)]
        return f"{'-'.join(map(_slug, parts))}/seed_{self.seed}"

    def flags(self) -> list[str]:
        """Return the flags of `main` except --workdir."""
        return [f"--config={self.config}", *_field_flags(self.overrides)]


@dataclass
class Plan:
    """The runs of a sweep.

    Attributes:
      seeds: each row is run with each of them.
      settings: config field -> text as on the command line; they win over the sweep.
      runs: row by row.

    Raises:
      SweepError: a field does not exist, a config is not valid, two runs would share a
        folder, or the rows differ in a setting.
    """

    name: str
    sweep: Sweep
    seeds: Sequence[int]
    settings: Mapping[str, str] = field(default_factory=dict)
    runs: list[Run] = field(init=False)

    def __post_init__(self) -> None:
        self.runs = [
            self._run(row, candidate, seed)
            for row in self.sweep.rows
            for candidate in row.candidates()
            for seed in self.seeds
        ]
        names = [run.name for run in self.runs]
        for name in names:
            if names.count(name) > 1:
                raise SweepError(
                    f"two runs would share the folder {name}; give the rows of sweep "
                    f"{self.name!r} other names, or each seed once."
                )

    def of_row(self, row: Row) -> list[Run]:
        """Return the runs of a row, candidate by candidate."""
        return [run for run in self.runs if run.row == row.name]

    def _run(self, row: Row, candidate: Any, seed: int) -> Run:
        where = f"sweep {self.name!r}, row {row.name!r}"
        overrides = {**self.sweep.overrides, **row.overrides}
        if row.search is not None:
            overrides |= dict.fromkeys(row.search, candidate)
        if "seed" in {*overrides, *self.settings}:
            raise SweepError(f"{where}: the field seed cannot be set here; give --seeds=0,1,2.")
        for name in self.settings:
            if name in {*row.overrides, *(row.search or ())}:
                raise SweepError(
                    f"--set {name}={self.settings[name]}: the rows of sweep {self.name!r} "
                    f"differ in it (row {row.name!r}); change it in the sweep's file."
                )
        overrides |= {**self.settings, "seed": seed}
        file = row.config or self.sweep.config
        if not Path(file.partition(":")[0]).is_file():  # not called in the repository
            file = str(ROOT / file)
        config = make_config(file, overrides, where)
        try:
            validate(config, devices=False)
        except ConfigError as error:
            raise SweepError(f"{where}: {error}") from error
        return Run(row.name, candidate, seed, file, overrides, flat(as_json(config)))


def make_config(file: str, overrides: Mapping[str, Any], where: str) -> Config:
    """Return the config that `main` makes of a file and overrides.

    Raises:
      SweepError: beginning with `where`; there is no such field, or it does not take
        the value.
    """
    config = load_config(file)
    known = flat(config.to_dict())
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise SweepError(f"{where}: the config has no field {name}{hint}")
    argv = ["main", *_field_flags(overrides)]
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=parsed, sys_argv=argv)
    try:
        parsed(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise SweepError(f"{where}: {error}") from error
    return config


def _field_flags(overrides: Mapping[str, Any]) -> list[str]:
    return [f"--config.{name}={as_text(value)}" for name, value in overrides.items()]


def as_text(value: Any) -> str:
    """Return a value as the command line takes it."""
    return value if isinstance(value, str) else repr(value)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.\-]+", "_", text).strip("_")
