"""Images a second of training over the batch and over the network's width.

    python -m benchmarks.speed.growth --out=DIR [--short] [--peer] [--precision NAME]

Batches of 8 to 256 (on a GPU 32 to 2,048) at full width, and widths of a quarter to all
at batch 128, beside the roofline of each point. `--peer` adds PyTorch in the form that
is its best in `train_step` (torch.compile, channels_last).
"""

import argparse
import statistics
import sys
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks.speed import jax_alexnet, measure, roofline
from benchmarks.speed.measure import Setting

ROUNDS = {"short": 2, "long": 5}
BATCHES = (8, 16, 32, 64, 128, 256)
GPU_BATCHES = (32, 128, 512, 2048)
WIDTHS = (0.25, 0.5, 0.75, 1.0)
_IMAGES_A_CALL = 4096  # on a GPU


def points(on_gpu: bool, short: bool, precision: str) -> dict[str, list[Setting]]:
    """What is measured, by what grows."""
    batches = (8, 16) if short else (GPU_BATCHES if on_gpu else BATCHES)
    widths = WIDTHS[:2] if short else WIDTHS
    fixed = 16 if short else 128

    def at(batch: int, width: float) -> Setting:
        steps = max(1, min(50, _IMAGES_A_CALL // batch)) if on_gpu else 1
        return Setting(batch, precision, width, steps)

    return {
        "batch": [at(batch, 1.0) for batch in batches],
        "width": [at(fixed, width) for width in widths],
    }


def measured(
    setting: Setting, peer: Any, device: str, rounds: int, limits: tuple[float, float]
) -> dict[str, Any]:
    """A point: rates of ours and, with a form of it, of the peer, and the roofline."""
    print(f"{setting} ...", file=sys.stderr, flush=True)
    candidates: dict[str, Any] = {"ours": jax_alexnet.Trainer(setting)}
    if peer is not None:
        from benchmarks.speed import torch_alexnet

        candidates["torch"] = torch_alexnet.trainer(setting, peer, device)
    seconds = measure.alternate(candidates, rounds=rounds)
    costs = roofline.training(jax_alexnet.network(setting), setting.batch)
    record = {
        "batch": setting.batch,
        "width": setting.width,
        "seconds": seconds,
        "images_per_second": {who: setting.images_per_second(s) for who, s in seconds.items()},
        "roofline_images_per_second": setting.batch / roofline.seconds(costs, *limits),
    }
    if peer is not None:
        record["ratio"] = measure.ratio(seconds, "ours", "torch")
    return record


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A table for each thing that grows."""
    texts = []
    for what, records in found.items():
        names = list(records[0]["seconds"])
        header = [what, *(f"{name}, images/s" for name in names), "roofline"]
        header += ["ours, of the roofline"] + (["ours / torch"] if names[1:] else [])
        rows = []
        for record in records:
            rates = record["images_per_second"]
            middle = [statistics.median(rates[name]) for name in names]
            limit = record["roofline_images_per_second"]
            row = [f"{record[what]:g}", *(f"{rate:,.1f}" for rate in middle)]
            row += [f"{limit:,.1f}", f"{middle[0] / limit:.0%}"]
            if "ratio" in record:
                row.append(f"{record['ratio']['median']:.2f}")
            rows.append(row)
        texts.append(measure.markdown_table(header, rows))
    return "\n\n".join(texts)


def chart(found: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """A panel for each thing that grows."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (what, records) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        at = [record[what] for record in records]
        for name in records[0]["seconds"]:
            rates = [record["images_per_second"][name] for record in records]
            middle = [statistics.median(r) for r in rates]
            axes.plot(at, middle, "o-", color="C0" if name == "ours" else "0.6", label=name)
            axes.fill_between(at, *zip(*((min(r), max(r)) for r in rates)), alpha=0.2)
        limits = [record["roofline_images_per_second"] for record in records]
        axes.plot(at, limits, "--", color="C3", label="roofline")
        axes.set_xlabel(what)
        if what == "width":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
            axes.set_xscale("log", base=2)
            axes.set_xticks(at, [f"{n:,}" for n in at])
    figure.axes[0].set_ylabel("images/s")
    figure.axes[0].legend()
    figure.suptitle(title)
    return figure


def options() -> argparse.Namespace:
    parser = measure.command_line(__doc__)
    parser.add_argument("--peer", action="store_true", help="PyTorch beside ours")
    parser.add_argument("--precision", help="float32; on a GPU bfloat16")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    on_gpu = jax.default_backend() != "cpu"
    precision = chosen.precision or ("bfloat16" if on_gpu else "float32")
    peer = None
    if chosen.peer:
        from benchmarks.speed.torch_alexnet import Form

        peer = Form("roots", "default", channels_last=True)
    limits = measure.gemm_rate(precision), measure.copy_bandwidth()
    rounds = ROUNDS["short" if chosen.short else "long"]
    device = "cuda" if on_gpu else "cpu"
    found = {
        what: [measured(s, peer, device, rounds, limits) for s in settings]
        for what, settings in points(on_gpu, chosen.short, precision).items()
    }
    measure.write_result(
        chosen.out,
        "growth",
        {
            "precision": precision,
            "peer": peer.name if peer else "",
            "gemm_flops_per_second": limits[0],
            "copy_bytes_per_second": limits[1],
            "points": found,
        },
        table=table(found),
        figure=chart(found, f"Training, {precision}"),
    )


if __name__ == "__main__":
    main()
