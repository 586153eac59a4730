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
from alexnet_jax.training.config import Config, ConfigError, as_json, flat, validate
from alexnet_jax.training.workdir import from_stored, read_config

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
        """Return the values that are searched; (None,) without a search."""
        return (None,) if self.search is None else next(iter(self.search.values()))


@dataclass(frozen=True)
class Measurement:
    """A run's value of a metric.

    Attributes:
      value: in the metric's unit.
      censored: the run ended before the value was known; it is above `value`.
      tie: tells censored runs apart, lower is better.
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
        return Measurement(last["epoch"], censored=True, tie=last[self.key])


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
    metric: FinalError | EpochsTo = FinalError()
    compare: Literal["difference", "ratio"] = "difference"
    seeds: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        if self.compare not in ("difference", "ratio"):
            raise SweepError(f"compare={self.compare!r} must be difference or ratio.")
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise SweepError(f"rows {', '.join(names)}: two have the same name.")
        for baseline in (self.baseline, *(row.baseline for row in self.rows)):
            if baseline is not None and baseline not in names:
                raise SweepError(f"baseline={baseline!r} must be a row: {', '.join(names)}.")


def load(path: str | os.PathLike[str]) -> Sweep:
    """Return the sweep of a file; "FILE:ARGUMENT" is get_sweep(ARGUMENT).

    Raises:
      SweepError: there is no such file, or no sweep in it.
    """
    path, colon, argument = os.fspath(path).partition(":")
    if not Path(path).is_file():
        shipped = sorted(file.name for file in (ROOT / "configs/sweeps").glob("*.py"))
        raise SweepError(
            f"{path}: there is no such file in {Path.cwd()}; configs/sweeps/ has "
            f"{', '.join(shipped)}."
        )
    try:
        return load_lib.run_file(f"{path}{colon}{argument}", "get_sweep")
    except ConfigError as error:
        raise SweepError(
            f"{error} It must define get_sweep(), which returns a sweeps.Sweep."
        ) from error


@dataclass(frozen=True)
class Run:
    """One training run: a row, a seed, and perhaps a candidate of the row's search."""

    row: str
    candidate: Any
    seed: int
    config: str
    overrides: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its folder in the sweep's runs/."""
        value = "" if self.candidate is None else f"-{slug(as_text(self.candidate))}"
        return f"{slug(self.row)}{value}/seed_{self.seed}"

    def flags(self) -> list[str]:
        """Return the flags of `main` except --workdir."""
        fields = [f"--config.{k}={as_text(v)}" for k, v in self.overrides.items()]
        return [f"--config={self.config}", *fields]

    def fields(self) -> dict[str, Any]:
        """Return every field of its config, as config.json stores it."""
        config = set_fields(load_config(self.config), self.overrides, "")
        return flat(as_json(config))


@dataclass(frozen=True)
class Plan:
    """A sweep with the seeds and the settings of the command line.

    Attributes:
      settings: config field -> text as on the command line; they win over the sweep.

    Raises:
      SweepError: a field does not exist, a row's config is not valid, two runs would
        share a folder, the rows differ in a setting, or seeds are not different numbers.
    """

    name: str
    sweep: Sweep
    seeds: Sequence[int]
    settings: Mapping[str, str] = field(default_factory=dict)
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        in_range = all(0 <= seed < 2**32 for seed in self.seeds)
        if not in_range or not 0 < len(set(self.seeds)) == len(self.seeds):
            raise SweepError(
                f"--seeds={','.join(map(str, self.seeds))} must be different numbers "
                "from 0 to 4294967295, such as 0,1,2."
            )
        folders: set[str] = set()
        for row in self.sweep.rows:
            for name in self.settings:
                if name in {*row.overrides, *(row.search or ())}:
                    raise SweepError(
                        f"--set {name}={self.settings[name]}: the rows of sweep "
                        f"{self.name!r} differ in it (row {row.name!r}); change it in "
                        "the sweep's file."
                    )
            for candidate in row.candidates():
                run = self.run(row, self.seeds[0], candidate)
                if run.name in folders:
                    raise SweepError(
                        f"row {row.name!r} would share the folder {run.name} with "
                        "another run; give it another name."
                    )
                folders.add(run.name)

    def run(self, row: Row, seed: int, candidate: Any = None) -> Run:
        """Return a run of a row; errors as for `Plan`."""
        key = (row.name, as_text(candidate))
        if key not in self._made:  # a config and its flags take a while
            self._made[key] = self._make(row, candidate)
        file, overrides = self._made[key]
        return Run(row.name, candidate, seed, file, {**overrides, "seed": seed})

    def _make(self, row: Row, candidate: Any) -> tuple[str, dict[str, Any]]:
        """Return the config file and the overrides of its runs, without the seed."""
        file = _config_path(row.config or self.sweep.config)
        where = f"sweep {self.name!r}, row {row.name!r}: "
        overrides = {**self.sweep.overrides, **row.overrides}
        if row.search is not None:
            overrides[next(iter(row.search))] = candidate
        config = set_fields(load_config(file), overrides, where)
        if "seed" in {*overrides, *self.settings}:
            raise SweepError(f"{where}seed is not set so; give --seeds=0,1,2.")
        set_fields(config, self.settings, "--set ")
        fields = flat(config.to_dict())
        try:
            validate(config, devices=False)
        except ConfigError as error:
            raise SweepError(f"row {row.name!r}: {error}") from error
        return file, overrides | {name: fields[name] for name in self.settings}

    def runs(self, results: Mapping[str, Measurement | None]) -> list[Run]:
        """Return the runs that are known to be needed.

        Args:
          results: of the runs that have ended, by name; None for a broken one. The
            further seeds of a search are known once all candidates have a result.
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

    def is_beaten(self, run: Run, epoch: float, results: Mapping[str, Measurement | None]) -> bool:
        """Return True if a run at `epoch` has lost to a candidate that was faster.

        This holds for `EpochsTo` only: the rest of the run changes nothing then.
        """
        if run.candidate is None or not isinstance(self.sweep.metric, EpochsTo):
            return False
        row = next(row for row in self.sweep.rows if row.name == run.row)
        others = (self.run(row, run.seed, c).name for c in row.candidates())
        reached = (results.get(name) for name in others if name != run.name)
        return run.seed == self.seeds[0] and any(
            other is not None and not other.censored and other.value < epoch for other in reached
        )


def best(runs: Sequence[Run], results: Mapping[str, Measurement | None]) -> Run | None:
    """Return the run with the lowest result; a censored one only if there is no other.

    Returns the single run of a row without a search; None if all candidates are broken.
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
    """Return a text as part of a path: letters, digits, dots, dashes, the rest "_"."""
    return re.sub(r"[^\w.\-]+", "_", text).strip("_")


def load_config(file: str) -> Config:
    """Return the config of a file of configs/, for example "configs/cifar10.py:3".

    Raises:
      SweepError: there is no such file, or it makes no config.
    """
    try:
        return load_lib.load_config(_config_path(file))
    except ConfigError as error:
        raise SweepError(f"config {file!r}: {error}") from error


def _config_path(file: str) -> str:
    """Return the path as given if it exists, else in the repository."""
    path, colon, argument = file.partition(":")
    if not Path(path).is_file():
        path = str(ROOT / path)
    if not Path(path).is_file():
        raise SweepError(f"config {file!r}: there is no such file.")
    return f"{path}{colon}{argument}"


def set_fields(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """Change fields of a config, in place, by the flags of `main`.

    Raises:
      SweepError: beginning with `where`; there is no such field, or it does not take
        the value.
    """
    if not values:
        return config
    known = flat(config.to_dict())
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise SweepError(f"{where}{name}: the config has no such field{hint}")
    texts = (f"--config.{name}={as_text(value)}" for name, value in values.items())
    argv = ["sweep", *texts]
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=parsed, sys_argv=argv)
    try:
        parsed(argv)
    except (flags.Error, TypeError, ValueError) as error:
        words = " ".join(str(error).split()).replace("flag --config.", "")
        raise SweepError(f"{where}{words}") from error
    return config


def as_text(value: Any) -> str:
    """Return a value as the command line takes it."""
    return value if isinstance(value, str) else repr(value)


def differences(run: Run, stored: Path) -> list[str]:
    """Return lines that say how a workdir's config.json differs from a run's config.

    A field that is missing there has its default.
    """
    own = read_config(stored.parent) or {}
    old, new = flat(as_json(from_stored(own))), run.fields()
    return [
        f"{name}: {old[name]} there, {new[name]} asked for"
        for name in sorted(new)
        if old[name] != new[name]
    ]
