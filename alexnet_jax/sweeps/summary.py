"""Summarise a sweep: means over seeds, effects, and verdicts on published figures."""

import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alexnet_jax.sweeps.plan import EpochsTo, Measurement, Paper, Plan, Row, Sweep, as_text
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
        """Return for example "40.66 ± 0.12"; `form` is a format, for example "+.2f"."""
        if self.mean is None:
            return ""
        spread = "" if self.spread is None else f" ± {self.spread:.2f}"
        return f"{self.bound}{self.mean:{form}}{spread}"


@dataclass
class Line:
    """One row of the summary.

    Attributes:
      candidate: the winner of the row's search; None without a search or a result.
      values: seed -> measurement, of the finished runs.
      value: their mean and sample standard deviation.
      effect: against the baseline, see `compare`.
      tried: candidate of the search -> its value.
    """

    row: Row
    candidate: Any
    values: Mapping[int, Measurement]
    value: Estimate
    tried: Mapping[str, Estimate]
    effect: Estimate = Estimate()
    verdict: str = ""

    @property
    def title(self) -> str:
        """The row's name, with the winner of its search in parentheses."""
        name = self.row.name
        return name if self.candidate is None else f"{name} ({as_text(self.candidate)})"


def summarize(plan: Plan, results: Mapping[str, Measurement | None]) -> list[Line]:
    """Return one line per row, from the results of the runs by name."""
    sweep = plan.sweep
    lines = {row.name: _line(plan, row, results) for row in sweep.rows}
    for line in lines.values():
        baseline = lines[line.row.baseline or sweep.baseline]
        if line is not baseline:
            line.effect = compare(line.values, baseline.values, sweep.compare)
            line.verdict = verdict(line.effect, line.row.paper, sweep.compare)
    return list(lines.values())


def _line(plan: Plan, row: Row, results: Mapping[str, Measurement | None]) -> Line:
    """Return a row's line, without an effect, of the best candidate of its search."""
    found: dict[Any, dict[int, Measurement]] = {c: {} for c in row.candidates()}
    for run in plan.of_row(row):
        result = results.get(run.name)
        if result is not None:
            found[run.candidate][run.seed] = result
    best = min(found, key=lambda candidate: _rank(list(found[candidate].values())))
    tried = {as_text(c): mean_of_values(list(values.values())) for c, values in found.items()}
    winner = best if found[best] else None
    value = tried[as_text(best)]
    return Line(row, winner, found[best], value, {} if row.search is None else tried)


def _rank(values: Sequence[Measurement]) -> tuple[int, bool, float]:
    """Return the sort key of a candidate; the best has the lowest.

    A candidate with fewer finished runs comes after one with more, and one with a
    censored run after one without.
    """
    censored = any(value.censored for value in values)
    numbers = [value.last_error if censored else value.value for value in values]
    return -len(values), censored, statistics.fmean(numbers) if numbers else 0.0


def mean_of_values(values: Sequence[Measurement]) -> Estimate:
    """Return mean and sample standard deviation; a lower bound if any is censored."""
    if not values:
        return Estimate()
    numbers = [value.value for value in values]
    if any(value.censored for value in values):
        return Estimate(statistics.fmean(numbers), None, ">", len(numbers))
    spread = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Estimate(statistics.fmean(numbers), spread, "", len(numbers))


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
    bound = ">" if above else "<" if below else ""
    error = None
    if len(effects) > 1 and not bound:
        error = statistics.stdev(effects) / math.sqrt(len(effects))
    return Estimate(statistics.fmean(effects), error, bound, len(effects))


def verdict(effect: Estimate, paper: Paper | None, by: Comparison) -> str:
    """Compare an effect with the published one.

    Returns:
      "agrees within the noise" if the two are at most `STANDARD_ERRORS` standard errors
      apart (`at_least`: ours is no further below), with "; so would no effect" if zero
      effect is as near; "differs"; "one seed: no noise known"; or "" if nothing was
      published, or our effect is unknown or a bound.
    """
    if paper is None or paper.effect is None or effect.mean is None or effect.bound:
        return ""
    if effect.spread is None:
        return "one seed: no noise known"
    short = paper.effect - effect.mean
    noise = STANDARD_ERRORS * effect.spread
    if (short if paper.at_least else abs(short)) > noise:
        return "differs"
    is_clear = abs(effect.mean - (1.0 if by == "ratio" else 0.0)) > noise
    return "agrees within the noise" + ("" if is_clear else "; so would no effect")


def summary_table(sweep: Sweep, lines: Sequence[Line]) -> str:
    """Return the table of the rows, in Markdown."""
    form, word = (".2f", "over") if sweep.compare == "ratio" else ("+.2f", "minus")
    header = ["row", "seeds", str(sweep.metric), f"{word} {sweep.baseline}"]
    header += ["published", f"{word} its baseline", "verdict"]
    rows = []
    for line in lines:
        paper = line.row.paper or Paper()
        published = "" if paper.value is None else f"{paper.value:g}"
        published_effect = "" if paper.effect is None else f"{paper.effect:{form}}"
        if paper.at_least:
            published_effect = f"over {published_effect}"
        effect = line.effect.words(form)
        if line.row.baseline and effect:
            effect += f" ({word} {line.row.baseline})"
        ours = [line.title, str(line.value.count), line.value.words(".2f"), effect]
        rows.append([*ours, published, published_effect, line.verdict])
    return machine.markdown_table(header, rows)


def search_table(sweep: Sweep, lines: Sequence[Line]) -> str:
    """Return the table of the candidates' results, in Markdown; the best is in bold."""
    rows = []
    for line in lines:
        for candidate, estimate in line.tried.items():
            words = estimate.words(".2f") or "none"
            chosen = candidate == as_text(line.candidate)
            rows.append([line.row.name, candidate, f"**{words}**" if chosen else words])
    names = sorted({name for row in sweep.rows for name in row.search or ()})
    return machine.markdown_table(["row", ", ".join(names), str(sweep.metric)], rows)


def published(sweep: Sweep) -> list[str]:
    """Return one sentence per source of published figures."""
    found: dict[str, list[str]] = {}
    for row in sweep.rows:
        if row.paper is not None:
            where = f"{row.paper.measured_on} ({row.paper.source})"
            found.setdefault(where, []).append(row.name)
    return [f"Published on {where}: {', '.join(r)}." for where, r in found.items()]


def write(plan: Plan, jobs: "Sequence[Job]", out: Path, command: str) -> str:
    """Write summary.{md,csv,png} and sweep.json; return the Markdown page.

    Args:
      command: the command line, which the summary shows.
    """
    lines = summarize(plan, {job.run.name: job.result for job in jobs})
    about = machine.machine(command)
    page = _page(plan, lines, about, jobs)
    with atomic_write(out / "summary.md") as file:
        file.write(page.encode())
    _write_csv(out / "summary.csv", lines)
    _draw(plan.sweep, lines, jobs, out / "summary.png")
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
        "runs": {
            job.run.name: {
                "overrides": {k: v for k, v in job.run.overrides.items() if k not in plan.settings},
                "result": job.result and dataclasses.asdict(job.result),
                **job.read_status(),
                "state": job.state,
                "error": job.error,
            }
            for job in jobs
        },
    }
    with atomic_write(out / "sweep.json") as file:
        file.write(json.dumps(record).encode() + b"\n")
    return page


def _page(plan: Plan, lines: Sequence[Line], about: dict[str, Any], jobs: "Sequence[Job]") -> str:
    sweep = plan.sweep
    data = "what `data.source` names" if "data.source" in plan.settings else sweep.measured_on
    parts = [
        f"# {plan.name} ({about['date']})",
        sweep.about,
        f"    {about['command']}",
        f"{machine.in_words(about)}. Measured on {data}.",
        summary_table(sweep, lines),
        _NOISE,
        *published(sweep),
    ]
    if any(line.tried for line in lines):
        parts += [
            "## Search",
            "Each candidate with every seed; the best is in bold.",
            search_table(sweep, lines),
        ]
    missing = [
        f"- {job.run.name}: {job.state}"
        + (f" ({' '.join(job.error.split())})" if job.error else "")
        for job in jobs
        if job.state != "finished"
    ]
    if missing:
        parts += ["## Not in these numbers", "\n".join(missing)]
    return "\n\n".join(parts) + "\n"


def _write_csv(path: Path, lines: Sequence[Line]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_CSV_COLUMNS)
        for line in lines:
            value, effect, paper = line.value, line.effect, line.row.paper or Paper()
            ours = [value.count, value.bound, value.mean, value.spread]
            effects = [effect.bound, effect.mean, effect.spread, paper.value, paper.effect]
            writer.writerow([line.row.name, line.candidate, *ours, *effects, line.verdict])


def _draw(sweep: Sweep, lines: Sequence[Line], jobs: "Sequence[Job]", path: Path) -> None:
    from alexnet_jax.sweeps import figures

    if isinstance(sweep.metric, EpochsTo):
        curves = {
            line.title: [
                read_metrics(job.folder / METRICS_FILE)
                for job in jobs
                if (job.run.row, job.run.candidate) == (line.row.name, line.candidate)
                and job.state == "finished"
            ]
            for line in lines
        }
        figure = figures.error_curves(curves, sweep.metric.target)
    else:
        figure = figures.sweep_results(sweep, lines)
    figure.savefig(path, dpi=150)
