"""Summarise a sweep: means over seeds, effects, and verdicts on published figures."""

import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alexnet_jax.sweeps.plan import EpochsTo, Measurement, Paper, Plan, Row, Sweep, as_text, best
from alexnet_jax.system import machine
from alexnet_jax.system.files import atomic_write
from alexnet_jax.training.writers import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from alexnet_jax.sweeps.run import Job

Comparison = Literal["difference", "ratio"]
# The verdict is "differs" if ours is further from the published effect than this.
STANDARD_ERRORS = 2.0
_NOISE = (
    "Mean ± sample standard deviation over seeds. Effects are paired by seed, ± their "
    f"standard error. An effect agrees if it is within {STANDARD_ERRORS:g} standard "
    "errors; if no effect is within them too, that says little."
)
_CSV_COLUMNS = (
    *("row", "candidate", "seeds", "value_bound", "value", "deviation"),
    *("effect_bound", "effect", "standard_error"),
    *("paper_value", "paper_effect", "verdict"),
)


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds.

    Attributes:
      mean: None if no run has ended.
      spread: the sample standard deviation of values, or the standard error of an
        effect; None for one seed.
      bound: ">" or "<" if censored runs make the mean a bound, else "".
    """

    mean: float | None = None
    spread: float | None = None
    bound: str = ""
    count: int = 0

    def words(self, form: str) -> str:
        """Return for example "40.66 ± 0.12"; `form` is a format such as "+.2f"."""
        if self.mean is None:
            return ""
        spread = "" if self.spread is None else f" ± {self.spread:.2f}"
        return f"{self.bound}{self.mean:{form}}{spread}"


@dataclass(frozen=True)
class Line:
    """One row of the summary.

    Attributes:
      name: the row's name.
      candidate: the winner of the row's search; None without a search.
      values: seed -> measurement, of the finished runs.
      value: their mean and sample standard deviation.
      effect: against the baseline, see `compare`.
      tried: candidate -> result with the first seed (None: broken or missing).
    """

    name: str
    candidate: Any
    values: Mapping[int, Measurement]
    value: Estimate
    effect: Estimate
    paper: Paper | None
    verdict: str
    tried: Mapping[str, Measurement | None] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The row's name, with the winner of its search in parentheses."""
        chosen = "" if self.candidate is None else f" ({as_text(self.candidate)})"
        return self.name + chosen


def summarize(plan: Plan, results: Mapping[str, Measurement | None]) -> list[Line]:
    """Return one line per row, from the results of the runs by name."""
    lines = {row.name: _line(plan, row, results) for row in plan.sweep.rows}
    compared = []
    for row in plan.sweep.rows:
        line, base = lines[row.name], lines[row.baseline or plan.sweep.baseline]
        if line is not base:
            effect = compare(line.values, base.values, plan.sweep.compare)
            words = verdict(effect, line.paper, plan.sweep.compare)
            line = dataclasses.replace(line, effect=effect, verdict=words)
        compared.append(line)
    return compared


def _line(plan: Plan, row: Row, results: Mapping[str, Measurement | None]) -> Line:
    runs = [plan.run(row, plan.seeds[0], c) for c in row.candidates()]
    chosen = best(runs, results)
    values = {}
    if chosen is not None:
        for seed in plan.seeds:
            result = results.get(plan.run(row, seed, chosen.candidate).name)
            if result is not None:
                values[seed] = result
    tried = {as_text(run.candidate): results.get(run.name) for run in runs}
    return Line(
        name=row.name,
        candidate=None if chosen is None else chosen.candidate,
        values=values,
        value=mean_of_values(list(values.values())),
        effect=Estimate(),
        paper=row.paper,
        verdict="",
        tried={} if row.search is None else tried,
    )


def mean_of_values(values: Sequence[Measurement]) -> Estimate:
    """Return mean and sample standard deviation; a lower bound if any is censored."""
    if not values:
        return Estimate()
    numbers = [value.value for value in values]
    censored = any(value.censored for value in values)
    several = len(numbers) > 1 and not censored
    return Estimate(
        mean=statistics.fmean(numbers),
        spread=statistics.stdev(numbers) if several else None,
        bound=">" if censored else "",
        count=len(numbers),
    )


def compare(
    row: Mapping[int, Measurement], baseline: Mapping[int, Measurement], by: Comparison
) -> Estimate:
    """Return the mean effect of a row over the seeds that it shares with the baseline.

    Per seed the effect is row - baseline, or row / baseline. `spread` is the standard
    error: the sample standard deviation over sqrt(seeds). Censored runs of the row make
    the mean a lower bound, those of the baseline an upper one; of both, nothing is known.
    """
    seeds = [seed for seed in row if seed in baseline]
    above = any(row[seed].censored for seed in seeds)
    below = any(baseline[seed].censored for seed in seeds)
    if not seeds or (above and below):
        return Estimate()
    pairs = [(row[seed].value, baseline[seed].value) for seed in seeds]
    if by == "ratio":
        effects = [ours / base if base else math.nan for ours, base in pairs]
    else:
        effects = [ours - base for ours, base in pairs]
    error = None
    if len(effects) > 1 and not above and not below:
        error = statistics.stdev(effects) / math.sqrt(len(effects))
    bound = ">" if above else "<" if below else ""
    return Estimate(statistics.fmean(effects), error, bound, len(effects))


def verdict(effect: Estimate, paper: Paper | None, by: Comparison) -> str:
    """Compare an effect with the published one.

    Returns:
      "agrees within the noise" if the two are at most `STANDARD_ERRORS` standard errors
      apart (`at_least`: ours is no further below), with "; so would no effect" if zero
      effect is as near; "differs"; "one seed: no noise known"; or "" if nothing was
      published, or our effect is unknown or a bound.
    """
    unknown = effect.mean is None or effect.bound
    if paper is None or paper.effect is None or unknown:
        return ""
    if effect.spread is None or effect.mean is None:
        return "one seed: no noise known"
    short = paper.effect - effect.mean
    distance = short if paper.at_least else abs(short)
    noise = STANDARD_ERRORS * effect.spread
    if distance > noise:
        return "differs"
    no_effect = 1.0 if by == "ratio" else 0.0
    is_clear = abs(effect.mean - no_effect) > noise
    return "agrees within the noise" + ("" if is_clear else "; so would no effect")


def summary_table(plan: Plan, lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return the header and one list of cells per row."""
    sweep = plan.sweep
    form = ".2f" if sweep.compare == "ratio" else "+.2f"
    word = "over" if sweep.compare == "ratio" else "minus"
    header = ["row", "seeds", str(sweep.metric), f"{word} {sweep.baseline}"]
    header += ["published", f"{word} its baseline", "verdict"]
    rows = []
    for row, line in zip(sweep.rows, lines, strict=True):
        value = effect = ""
        if line.paper is not None and line.paper.value is not None:
            value = f"{line.paper.value:g}"
        if line.paper is not None and line.paper.effect is not None:
            over = "over " if line.paper.at_least else ""
            effect = f"{over}{line.paper.effect:{form}}"
        own = line.effect.words(form)
        if row.baseline and own:
            own += f" ({word} {row.baseline})"
        ours = [line.value.words(".2f"), own]
        rows.append([line.title, str(line.value.count), *ours, value, effect, line.verdict])
    return header, rows


def search_table(plan: Plan, lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return the header, and each candidate's result with the first seed."""
    rows = []
    for line in lines:
        for candidate, result in line.tried.items():
            words = "none" if result is None else str(result)
            chosen = line.candidate is not None and candidate == as_text(line.candidate)
            rows.append([line.name, candidate, f"**{words}**" if chosen else words])
    names = sorted({name for row in plan.sweep.rows for name in row.search or ()})
    return ["row", ", ".join(names), str(plan.sweep.metric)], rows


def published(sweep: Sweep) -> list[str]:
    """Return one sentence per source of published figures."""
    found: dict[str, list[str]] = {}
    for row in sweep.rows:
        if row.paper is not None:
            about = (row.paper.measured_on, row.paper.source)
            source = f"{about[0]} ({about[1]})" if all(about) else "".join(about)
            found.setdefault(source, []).append(row.name)
    return [f"Published on {where}: {', '.join(r)}." for where, r in found.items()]


def write(
    plan: Plan,
    jobs: "Mapping[str, Job]",
    results: Mapping[str, Measurement | None],
    out: Path,
    command: str,
) -> str:
    """Write summary.{md,csv,png} and sweep.json; return the Markdown page.

    Args:
      jobs, results: by run name.
      command: the command line, which the summary shows.
    """
    lines = summarize(plan, results)
    about = machine.machine(command)
    page = _page(plan, lines, about, list(jobs.values()))
    with atomic_write(out / "summary.md") as file:
        file.write(page.encode())
    _write_csv(out / "summary.csv", lines)
    _draw(plan, lines, jobs, out / "summary.png")
    record = {
        "sweep": plan.name,
        "about": plan.sweep.about,
        "machine": about,
        "metric": str(plan.sweep.metric),
        "compare": plan.sweep.compare,
        "baseline": plan.sweep.baseline,
        "measured_on": plan.sweep.measured_on,
        "seeds": list(plan.seeds),
        "settings": {
            name: machine.without_paths([f"{name}={value}"]).partition("=")[2]
            for name, value in plan.settings.items()
        },
        "rows": [dataclasses.asdict(line) for line in lines],
        "runs": {name: _run_record(plan, job, results.get(name)) for name, job in jobs.items()},
    }
    with atomic_write(out / "sweep.json") as file:
        file.write(json.dumps(record).encode() + b"\n")
    return page


def _run_record(plan: Plan, job: "Job", result: Measurement | None) -> dict[str, Any]:
    overrides = job.run.overrides.items()
    record = {
        "overrides": {k: v for k, v in overrides if k not in plan.settings},
        "result": result and dataclasses.asdict(result),
        **job.read_status(),
        "state": job.state,
    }
    return record | ({"error": job.error} if job.error else {})


def _page(plan: Plan, lines: Sequence[Line], about: dict[str, Any], jobs: "Sequence[Job]") -> str:
    """Return the summary as Markdown."""
    sweep = plan.sweep
    source = plan.settings.get("data.source")
    data = sweep.measured_on if source is None else "what `data.source` names"
    parts = [
        f"# {plan.name} ({about['date']})",
        sweep.about,
        f"    {about['command']}",
        f"{machine.in_words(about)}. Measured on {data}.",
        machine.markdown_table(*summary_table(plan, lines)),
        _NOISE,
        *published(sweep),
    ]
    if any(line.tried for line in lines):
        parts += ["## Search", f"With seed {plan.seeds[0]}; the best is in bold."]
        parts.append(machine.markdown_table(*search_table(plan, lines)))
    if beaten := [job.run.name for job in jobs if job.beaten]:
        parts.append(f"Ended when another candidate had won: {', '.join(beaten)}.")
    missing = []
    for job in jobs:
        if job.state != "finished":
            reason = f" ({job.error.splitlines()[0]})" if job.error else ""
            missing.append(f"- {job.run.name}: {job.state}{reason}")
    if missing:
        parts += ["## Not in these numbers", "\n".join(missing)]
    return "\n\n".join(parts) + "\n"


def _write_csv(path: Path, lines: Sequence[Line]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_CSV_COLUMNS)
        for line in lines:
            value, effect, paper = line.value, line.effect, line.paper
            writer.writerow(
                [line.name, line.candidate, value.count, value.bound, value.mean]
                + [value.spread, effect.bound, effect.mean, effect.spread]
                + [paper and paper.value, paper and paper.effect, line.verdict]
            )


def _draw(plan: Plan, lines: Sequence[Line], jobs: "Mapping[str, Job]", path: Path) -> None:
    from alexnet_jax.sweeps import figures

    metric = plan.sweep.metric
    if isinstance(metric, EpochsTo):
        rows = {}
        for line in lines:
            found = [
                read_metrics(job.folder / METRICS_FILE)
                for job in jobs.values()
                if (job.run.row, job.run.candidate) == (line.name, line.candidate)
                and job.state == "finished"
            ]
            if found:
                rows[line.title] = found
        figure = figures.error_curves(rows, metric.target)
    else:
        figure = figures.sweep_results(plan.sweep, lines)
    figure.savefig(path, dpi=150)
