"""Images per second of training over the batch and over the network's width.

    python -m benchmarks.speed.growth --out=DIR [--short] [--precision NAME]

Batches of 8 to 256 (on a GPU 32 to 2,048) at full width, and widths of a quarter to all
at batch 128, beside the roofline of each point.
"""

import statistics
import sys
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks.speed import jax_alexnet, measure, roofline
from benchmarks.speed.measure import Setting

WIDTHS = (0.25, 0.5, 0.75, 1.0)
_IMAGES_A_CALL = 4096  # on a GPU

Points = dict[str, list[dict[str, Any]]]


def settings(on_gpu: bool, short: bool, precision: str) -> dict[str, list[Setting]]:
    """Return the settings to measure, by "batch" and "width", which grow."""
    batches = (8, 16, 32, 64, 128, 256)
    if on_gpu:
        batches = (32, 128, 512, 2048)
    if short:
        batches = (8, 16)

    def at(batch: int, width: float) -> Setting:
        steps = max(1, min(50, _IMAGES_A_CALL // batch)) if on_gpu else 1
        return Setting(batch, precision, width, steps)

    return {
        "batch": [at(batch, 1.0) for batch in batches],
        "width": [at(16 if short else 128, width) for width in WIDTHS[: 2 if short else 4]],
    }


def measured(setting: Setting, rounds: int, limits: tuple[float, float]) -> dict[str, Any]:
    """Return the rates at a setting and its roofline."""
    print(f"{setting} ...", file=sys.stderr, flush=True)
    seconds = measure.alternate({"ours": jax_alexnet.Trainer(setting)}, rounds=rounds)["ours"]
    costs = roofline.training(jax_alexnet.network(setting), setting.batch)
    return {
        "batch": setting.batch,
        "width": setting.width,
        "seconds": seconds,
        "images_per_second": setting.images_per_second(seconds),
        "roofline_images_per_second": setting.batch / roofline.seconds(costs, *limits),
    }


def table(found: Points) -> str:
    """Return a table for each thing that grows."""
    texts = []
    for what, records in found.items():
        rows = []
        for record in records:
            limit = record["roofline_images_per_second"]
            middle = statistics.median(record["images_per_second"])
            rates = [f"{middle:,.1f}", f"{limit:,.1f}", f"{middle / limit:.0%}"]
            rows.append([f"{record[what]:g}", *rates])
        header = [what, "ours, images/s", "roofline", "ours, of the roofline"]
        texts.append(measure.markdown_table(header, rows))
    return "\n\n".join(texts)


def chart(found: Points) -> Figure:
    """Draw a panel for each thing that grows."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (what, records) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        at = [record[what] for record in records]
        rates = [record["images_per_second"] for record in records]
        axes.plot(at, [statistics.median(r) for r in rates], "o-", label="ours")
        axes.fill_between(at, [min(r) for r in rates], [max(r) for r in rates], alpha=0.2)
        limits = [record["roofline_images_per_second"] for record in records]
        axes.plot(at, limits, "--", color="C3", label="roofline")
        axes.set_xlabel(what)
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [f"{n:g}" for n in at])
        axes.set_yscale("log")
    figure.axes[0].set_ylabel("images/s of training")
    figure.axes[0].legend()
    return figure


def main() -> None:
    parser = measure.command_line(__doc__)
    parser.add_argument("--precision", help="float32; on a GPU bfloat16")
    chosen = parser.parse_args()
    on_gpu = jax.default_backend() != "cpu"
    precision = chosen.precision or ("bfloat16" if on_gpu else "float32")
    limits = measure.gemm_rate(precision), measure.copy_bandwidth()
    found = {
        what: [measured(setting, 2 if chosen.short else 5, limits) for setting in several]
        for what, several in settings(on_gpu, chosen.short, precision).items()
    }
    record = {
        "precision": precision,
        "gemm_flops_per_second": limits[0],
        "copy_bytes_per_second": limits[1],
        "points": found,
    }
    measure.write_result(chosen.out, "growth", record, table=table(found), figure=chart(found))


if __name__ == "__main__":
    main()
