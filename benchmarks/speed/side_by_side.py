"""Ours against the peer's best form, for `train_step` and `inference`.

A quick pass over the peer's forms (`torch_alexnet.Form`) picks its fastest, which then
takes turns with ours. Without torch only ours is measured.
"""

import gc
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.speed import jax_alexnet, measure, memory, roofline
from benchmarks.speed.measure import Setting

PRECISIONS = ("bfloat16", "float32", "tensorfloat32")
# A timed call on a GPU is about so many images, some tens of milliseconds.
_IMAGES_A_CALL = 4096

Call = Callable[[], Any]


def settings(
    on_gpu: bool, short: bool, batches: Sequence[int], precisions: Sequence[str]
) -> list[Setting]:
    """Return the settings to measure, by default the published ones."""
    batches = batches or ((128, 1024) if on_gpu else (32 if short else 128,))
    precisions = precisions or (PRECISIONS if on_gpu else ("float32",))
    found = [
        Setting(batch, name, steps=max(1, _IMAGES_A_CALL // batch) if on_gpu else 1)
        for name in precisions
        for batch in batches
    ]
    return found[:1] if short else found


def forms(on_gpu: bool, short: bool) -> list[Any]:
    """Return the peer's forms; `short` leaves one of eager and one of torch.compile."""
    from benchmarks.speed.torch_alexnet import LRNS, Form

    if short:
        return [Form("library", "", True), Form("roots", "default", True)]
    if on_gpu:
        # Every form is compiled for every setting, and minutes are few.
        return [
            Form("library", "", True),
            Form("library", "default", True),
            Form("roots", "default", True),
            Form("roots", "default", False),
            Form("roots", "reduce-overhead", True),
        ]
    return [
        Form(lrn, mode, channels_last)
        for lrn in LRNS
        for mode in ("", "default")
        for channels_last in (False, True)
    ]


def select(
    builders: dict[str, Callable[[], Call]],
) -> tuple[str, Call | None, dict[str, list[float] | str]]:
    """Build the candidates one after the other and keep the fastest.

    One that fails is left out with its error: not every form runs everywhere.

    Returns:
      The fastest one's name ("" if there is none) and call, and of each candidate
      the seconds of its calls or its error.
    """
    tried: dict[str, list[float] | str] = {}
    best_name, best, least = "", None, float("inf")
    for name, build in builders.items():
        print(f"trying {name} ...", file=sys.stderr, flush=True)
        try:
            call = build()
            seconds = measure.alternate({name: call}, rounds=2, warmup=2)[name]
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            tried[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
            continue
        tried[name] = seconds
        if min(seconds) < least:
            best_name, best, least = name, call, min(seconds)
        del call
        gc.collect()  # a network that lost frees its memory before the next is made
    return best_name, best, tried


def compare(
    ours: Call, peers: dict[str, Callable[[], Call]], setting: Setting, rounds: int
) -> tuple[dict[str, Any], Call | None]:
    """Pick the peer's best form and alternate it with ours; return the record and its call."""
    name, peer, tried = select(peers)
    candidates = {"ours": ours} | ({"torch": peer} if peer else {})
    seconds = measure.alternate(candidates, rounds=rounds)
    record: dict[str, Any] = {
        "batch": setting.batch,
        "precision": setting.precision,
        "steps_a_call": setting.steps,
        "selection_seconds": tried,
        "peer": name,
        "seconds": seconds,
        "images_per_second": {who: setting.images_per_second(s) for who, s in seconds.items()},
    }
    if peer:
        record["ratio"] = measure.ratio(seconds, "ours", "torch")
    return record, peer


def add_limits(
    record: dict[str, Any], costs: Sequence[roofline.Cost], flop_rate: float, bandwidth: float
) -> None:
    """Add what the machine's limits allow, and each side's share of it."""
    at_best = roofline.seconds(costs, flop_rate, bandwidth)
    record |= {
        "flops": roofline.flops(costs),
        "gemm_flops_per_second": flop_rate,
        "copy_bytes_per_second": bandwidth,
        "gemm_images_per_second": record["batch"] * flop_rate / roofline.flops(costs),
        "roofline_images_per_second": record["batch"] / at_best,
    }
    for limit in ("gemm", "roofline"):
        record[f"{limit}_share"] = {
            who: statistics.median(rates) / record[f"{limit}_images_per_second"]
            for who, rates in record["images_per_second"].items()
        }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return every setting's rates and shares, then its limits, forms and memory."""
    header = ["setting", "", "images/s (least to most)", "GEMM rate", "roofline", "ours / torch"]
    rows, notes = [], []
    for record in records:
        setting = f"{record['precision']}, batch {record['batch']:,}"
        for who, rates in record["images_per_second"].items():
            name = who if who == "ours" else record["peer"]
            shares = [f"{record[f'{limit}_share'][who]:.0%}" for limit in ("gemm", "roofline")]
            rows.append([setting, name, measure.spread(rates, ",.1f"), *shares, ""])
        if found := record.get("ratio"):
            spread = f"({found['min']:.2f} to {found['max']:.2f})"
            rows[-2][-1] = f"**{found['median']:.2f}** {spread}"
        notes.append(
            f"{setting}: GEMM {record['gemm_flops_per_second'] / 1e9:,.0f} GFLOP/s and "
            f"copying {record['copy_bytes_per_second'] / 1e9:,.1f} GB/s allow "
            f"{record['gemm_images_per_second']:,.1f} images/s by operations alone, "
            f"{record['roofline_images_per_second']:,.1f} by the roofline of every layer."
        )
        if tried := record["selection_seconds"]:
            images = record["batch"] * record["steps_a_call"]
            cells = [
                [name, s if isinstance(s, str) else f"{images / min(s):,.1f}"]
                for name, s in tried.items()
            ]
            forms_header = [f"candidates, {setting}", "best images/s"]
            notes.append(measure.markdown_table(forms_header, cells))
        if sizes := record.get("memory"):
            cells = [[name, f"{size / 1e9:.2f}"] for name, size in sizes.items()]
            memory_header = [f"peak memory of a training step, {setting}", "GB"]
            notes.append(measure.markdown_table(memory_header, cells))
    return "\n\n".join([measure.markdown_table(header, rows), *notes])


def _bars(record: dict[str, Any], title: str) -> measure.Bars:
    images = record["batch"] * record["steps_a_call"]
    rates = {
        who if who == "ours" else f"best: {record['peer']}": values
        for who, values in record["images_per_second"].items()
    }
    for name, seconds in record["selection_seconds"].items():
        if not isinstance(seconds, str) and name != record["peer"]:
            rates[name] = [images / s for s in seconds]
    title = f"{title}, {record['precision']}, batch {record['batch']:,}"
    limit = record["roofline_images_per_second"]
    return measure.Bars(title, "images/s", rates, ceiling=limit, ceiling_name="roofline")


def write(out: Path, name: str, records: Sequence[dict[str, Any]]) -> None:
    """Write the records of "train_step" or "inference"."""
    title = "Training" if name == "train_step" else "Classifying"
    figure = measure.bar_charts([_bars(record, title) for record in records])
    measure.write_result(out, name, {"settings": records}, table=table(records), figure=figure)


def run(name: str, doc: str | None) -> None:
    """Run the benchmark `name`, "train_step" or "inference"."""
    parser = measure.command_line(doc)
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="images")
    about = "on a GPU: all"
    parser.add_argument("--precision", nargs="+", default=[], choices=PRECISIONS, help=about)
    chosen, training = parser.parse_args(), name == "train_step"
    on_gpu = jax.default_backend() != "cpu"
    peers: list[Any] = []
    if importlib.util.find_spec("torch"):
        peers = forms(on_gpu, chosen.short)
    records: list[dict[str, Any]] = []
    bandwidth = measure.copy_bandwidth()
    for setting in settings(on_gpu, chosen.short, chosen.batch, chosen.precision):
        ours = jax_alexnet.Trainer(setting) if training else jax_alexnet.classifier(setting)
        builders = {form.name: _builder(training, setting, form, on_gpu) for form in peers}
        record, peer = compare(ours, builders, setting, rounds=2 if chosen.short else 7)
        model = jax_alexnet.network(setting)
        costs = (roofline.training if training else roofline.inference)(model, setting.batch)
        add_limits(record, costs, measure.gemm_rate(setting.precision), bandwidth)
        if isinstance(ours, jax_alexnet.Trainer):
            form = next((f for f in peers if f.name == record["peer"]), None)
            record["memory"] = memory.of_training(setting, ours, form, peer)
        records.append(record)
        if on_gpu:
            # Compiling is most of the time: the next setting tries the two fastest forms.
            tried = {n: s for n, s in record["selection_seconds"].items() if not isinstance(s, str)}
            names = sorted(tried, key=lambda name: min(tried[name]))[:2]
            peers = [form for form in peers if form.name in names]
        # After every setting: what is measured stays if the time runs out.
        write(chosen.out, name, records)


def _builder(training: bool, setting: Setting, form: Any, on_gpu: bool) -> Callable[[], Call]:
    from benchmarks.speed import torch_alexnet

    make = torch_alexnet.trainer if training else torch_alexnet.classifier
    return lambda: make(setting, form, "cuda" if on_gpu else "cpu")
