"""Training with real images, beside the step alone and the loader alone.

    python -m benchmarks.speed.end_to_end --out=DIR [--short] [--images=FOLDER]
        [--workers N]

The network of `configs/paper.py` at several widths, records of 256 x 256 JPEGs as in
`input_pipeline`, and the loop of `alexnet_jax.training.loop`: decode ahead, put on the
device, step. The limit is the slower of step and loader. On a CPU both compute on the same
cores, and without waste the times per image add up: 1/(1/step + 1/loader). The step alone
gets the same batch again and again.
"""

import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from alexnet_jax.data import statistics as statistics_lib
from alexnet_jax.data.loader import Batches, train_order
from alexnet_jax.training import experiment as experiment_lib
from alexnet_jax.training import timing
from alexnet_jax.training.experiment import Experiment
from alexnet_jax.training.steps import make_train_step
from benchmarks.speed import input_images, measure
from configs import paper

STEP, LOADER, TOGETHER = "step alone", "loader alone", "ours, end to end"
SECONDS_A_CALL = 2.5


def main() -> None:
    parser = measure.command_line(__doc__)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--images", type=Path, help=input_images.IMAGES_HELP)
    options = parser.parse_args()
    on_gpu = jax.default_backend() == "gpu"
    batch, dtype = (512, "bfloat16") if on_gpu else (64, "float32")
    widths = [1.0] if on_gpu else [1.0, 0.125, 0.03125]
    with tempfile.TemporaryDirectory() as name:
        source = input_images.records(options.images, Path(name))
        few = statistics_lib.compute(source, max_examples=500, workers=options.workers)
        runs = []
        for width in widths[-1:] if options.short else widths:
            config = paper.get_config()
            config.data.source, config.data.dir = "imagenet2012_256", name
            config.data.eval_split = ""
            config.data.batch_size, config.data.workers = batch, options.workers
            config.model.width, config.model.init, config.model.dtype = width, "he", dtype
            config.parallel.data = 1
            experiment = experiment_lib.build(config, statistics=few)
            runs.append({"width": width, **_measured(experiment, options.short)})
    record = {
        "batch": batch,
        "workers": options.workers,
        "same_cores": not on_gpu,
        "dtype": dtype,
        "runs": runs,
    }
    figure = measure.bar_charts([_bars(run, same_cores=not on_gpu) for run in runs])
    measure.write_result(options.out, "end_to_end", record, table=_table(record), figure=figure)


class _Training:
    """A network and its state; each method works for a number of steps."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.size = experiment.config.data.batch_size
        self.statistics = experiment.statistics_on_mesh()
        self.state = experiment.init_state()
        with self.batches(1) as batches:
            self.batch = experiment.put(next(batches))
        args = (self.state, self.batch, self.statistics)
        self.step = make_train_step(experiment.spec).lower(*args).compile()
        self.waited = self.seconds = 0.0

    def batches(self, count: int) -> Batches:
        """Return `count` shuffled batches; their threads start and end with them."""
        source = self.experiment.train_source
        return Batches(
            source,
            train_order(source.num_examples, 0),
            batch_size=self.size,
            num_examples=count * self.size,
            workers=self.experiment.config.data.workers,
        )

    def alone(self, count: int) -> None:
        """Step with one batch that lies on the device."""
        pending: deque[Any] = deque()
        for _ in range(count):
            self._submit(pending, self.batch)
        jax.block_until_ready(list(pending))

    def load(self, count: int) -> None:
        """Put batches on the device."""
        with self.batches(count) as batches:
            for batch in batches:
                jax.block_until_ready(self.experiment.put(batch))

    def together(self, count: int) -> None:
        """Do the work of `loop.train_and_evaluate` between two records."""
        started = time.perf_counter()
        pending: deque[Any] = deque()
        with self.batches(count) as batches:
            batch = self.experiment.put(next(batches))
            for _ in range(count - 1):
                loss = self._submit(pending, batch)
                batch = self.experiment.put(timing.next_batch(batches, loss))
            self._submit(pending, batch)
            jax.block_until_ready(list(pending))
            self.waited += batches.wait_seconds
        self.seconds += time.perf_counter() - started

    def _submit(self, pending: deque[Any], batch: Any) -> jax.Array:
        self.state, metrics = self.step(self.state, batch, self.statistics)
        pending.append(metrics["loss"])
        if len(pending) > timing.STEPS_IN_FLIGHT:
            pending.popleft().block_until_ready()
        return metrics["loss"]


def _measured(experiment: Experiment, short: bool) -> dict[str, Any]:
    training = _Training(experiment)
    work: dict[str, Callable[[int], None]] = {
        STEP: training.alone,
        LOADER: training.load,
        TOGETHER: training.together,
    }
    training.alone(1)
    counts = {name: _count(call, 0.3 if short else SECONDS_A_CALL) for name, call in work.items()}
    training.waited = training.seconds = 0.0
    seconds = measure.alternate(
        {name: lambda n=name: work[n](counts[n]) for name in work},
        rounds=2 if short else 5,
        warmup=0,
    )
    rates = {name: [counts[name] * training.size / s for s in seconds[name]] for name in work}
    rounds = list(zip(*(rates[name] for name in work), strict=True))
    return {
        "images_a_second": rates,
        "steps_a_call": counts,
        "of_the_slower": [e / min(s, load) for s, load, e in rounds],
        "of_both_on_the_same_cores": [e * (1 / s + 1 / load) for s, load, e in rounds],
        "data_wait_frac": training.waited / training.seconds,
    }


def _count(call: Callable[[int], None], seconds: float) -> int:
    """Return how many steps take about `seconds`, from two that are timed."""
    started = time.perf_counter()
    call(2)
    return max(2, round(2 * seconds / (time.perf_counter() - started)))


def _table(record: dict[str, Any]) -> str:
    header = ["width", STEP, LOADER, TOGETHER, "of the slower", "waiting for data"]
    if record["same_cores"]:
        header.insert(5, "of 1/(1/step + 1/loader)")
    rows = []
    for run in record["runs"]:
        row = [f"{run['width']:g}"]
        row += [f"{statistics.median(v):,.1f}" for v in run["images_a_second"].values()]
        row.append(measure.spread(run["of_the_slower"], ".3f"))
        if record["same_cores"]:
            row.append(measure.spread(run["of_both_on_the_same_cores"], ".3f"))
        rows.append([*row, f"{run['data_wait_frac']:.1%}"])
    table = measure.markdown_table(header, rows)
    return (
        f"{table}\n\nImages per second, batch {record['batch']}, {record['dtype']}, "
        f"{record['workers']} decoding threads; ratios are medians over the rounds "
        "(least to most)."
    )


def _bars(run: dict[str, Any], *, same_cores: bool) -> measure.Bars:
    rates = run["images_a_second"]
    step, loader = (statistics.median(rates[name]) for name in (STEP, LOADER))
    title = f"Width {run['width']:g}"
    if loader > 3 * step:  # its bar would dwarf the others
        rates = {name: v for name, v in rates.items() if name != LOADER}
        title += f" (loader alone: {loader:,.0f})"
    limit = 1 / (1 / step + 1 / loader) if same_cores else min(step, loader)
    words = "both on the same cores" if same_cores else "the slower of the two"
    return measure.Bars(title, "images per second", rates, ceiling=limit, ceiling_name=words)


if __name__ == "__main__":
    main()
