"""Bytes that each parallel mode sends on 2 to 1,024 devices, and the time they take.

    python -m benchmarks.speed.parallel_modes --out=benchmarks/results/parallel_modes

compiles the full-width paper network's training step for virtual devices of the CPU
(some minutes; it computes nothing). It writes bytes and memory into DIR/modes.json, and tables
of these bytes and of their time at stated bandwidths into DIR/modes.md. With `--tables_only`
it compiles nothing and reads DIR/modes.json.

The times in the tables are arithmetic, not measurements: bytes over the bandwidth of
the slowest link that a group of devices has to use, exchanges not hidden behind
computing, no latency.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexnet_jax.system.machine import versions

COMMAND = "python -m benchmarks.speed.parallel_modes --out=DIR"
# Images of one device per step: 256 in all on 2 devices, 131,072 on 1,024.
IMAGES = 128
SIZES = [2**n for n in range(1, 11)]
FLOPS_AN_IMAGE = 6 * 724_406_816  # forward once, backward twice; 2 for each MAC


@dataclass(frozen=True)
class Machine:
    """A cluster on paper.

    Attributes:
      node: devices that are connected at `inside` bytes a second each way; to other
        nodes a device has `across`.
      images_per_second: that one device trains by itself.
    """

    name: str
    node: int
    inside: float
    across: float
    images_per_second: float


# NVIDIA's data sheets: NVLink of an H100, 900 GB/s both ways together; InfiniBand NDR,
# 400 Gb/s a GPU. 100 TFLOP/s is a tenth of its dense bfloat16 peak, and not measured.
H100 = Machine("H100, nodes of 8", 8, 450e9, 50e9, 100e12 / FLOPS_AN_IMAGE)
# The same cards where nodes have one and talk over 25 Gb/s Ethernet.
ETHERNET = Machine("H100, 25 Gb/s Ethernet", 1, 450e9, 25e9 / 8, 100e12 / FLOPS_AN_IMAGE)
# arXiv:1404.5997's machine: PCI Express 2.0 x16 has 8 GB/s each way, of which cards got
# some 6; one K20 took 98.05 hours for 90 epochs of 1.28 million images.
K20 = Machine("K20, PCI Express 2.0", 8, 6e9, 6e9, 90 * 1_281_167 / 98.05 / 3600)
# Its table: hours for 90 epochs at 128 images a device, and the speed-up.
ONE_WEIRD_TRICK = {2: (50.24, 1.95), 4: (26.20, 3.74), 8: (15.68, 6.25)}


def shapes(devices: int) -> list[tuple[str, int, int]]:
    """Return the meshes to compare: (mode, data, column)."""
    found = [("data", devices, 1), ("columns", devices // 2, 2), ("hybrid", 1, devices)]
    if devices > 8:
        found.append(("hybrid", devices // 8, 8))
    return found


def measure() -> list[dict[str, Any]]:
    """Compile every mode on every number of devices."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(SIZES))
    from alexnet_jax.training import describe, experiment
    from configs import common

    rows = []
    for devices in SIZES:
        for mode, data, column in shapes(devices):
            config = common.get_config()
            config.parallel.mode = mode
            config.data.batch_size = IMAGES * devices
            network = experiment.make_model(config, None)
            found = describe.summarize_mode(config, network, mode, data, column)
            row = {
                "devices": devices,
                "mode": mode,
                "data": data,
                "column": column,
                "memory_bytes": found.memory_bytes,
            }
            for phase in describe.PHASES:
                row[f"{phase}_counts"] = dict(found.counts(phase))
                row[f"{phase}_bytes"] = found.sent_bytes(phase)
            rows.append(row)
            print(f"{mode} on {data} x {column}: {row}", file=sys.stderr, flush=True)
    return rows


def seconds(row: dict[str, Any], machine: Machine) -> float:
    """Return the time of a step's exchanges: features within a row, gradients over all."""

    def bandwidth(devices: int) -> float:
        return machine.inside if devices <= machine.node else machine.across

    features = row["forward_bytes"] + row["backward_bytes"]
    return features / bandwidth(row["column"]) + row["gradients_bytes"] / bandwidth(row["devices"])


def efficiency(row: dict[str, Any], machine: Machine) -> float:
    """Return computing's share of a step."""
    compute = IMAGES / machine.images_per_second
    return compute / (compute + seconds(row, machine))


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def table_of_bytes(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        features = (row["forward_bytes"] + row["backward_bytes"]) / 1e6
        mesh = [f"{row['devices']:,}", row["mode"], f"{row['data']} x {row['column']}"]
        sizes = [f"{features:,.1f}", f"{row['gradients_bytes'] / 1e6:,.1f}"]
        cells.append([*mesh, *sizes, f"{row['memory_bytes'] / 1e6:,.0f}"])
    header = ["devices", "mode", "data x column", "features MB", "gradients MB", "memory MB"]
    return _table(header, cells)


def table_of_winners(rows: list[dict[str, Any]], machine: Machine) -> str:
    """Return computing's share of a step, a column per mode; the best in bold."""
    kinds = ["data", "columns", "hybrid 1 x n", "hybrid n/8 x 8"]
    cells = []
    for devices in SIZES:
        found = {}
        for row in (row for row in rows if row["devices"] == devices):
            kind = row["mode"]
            if kind == "hybrid":
                kind += " 1 x n" if row["data"] == 1 else " n/8 x 8"
            found[kind] = row
        best = max(efficiency(row, machine) for row in found.values())
        line = [f"{devices:,}"]
        for kind in kinds:
            text = ""
            if kind in found:
                share, took = efficiency(found[kind], machine), seconds(found[kind], machine)
                text = f"{share:.0%} ({took * 1e3:.1f} ms)"
                if took >= 1:
                    text = f"{share:.0%} ({took:.1f} s)"
                if share == best:
                    text = f"**{text}**"
            line.append(text)
        cells.append(line)
    return _table(["devices", *kinds], cells)


def table_beside_one_weird_trick(rows: list[dict[str, Any]]) -> str:
    cells = []
    for devices, (hours, published) in ONE_WEIRD_TRICK.items():
        own = {row["mode"]: efficiency(row, K20) for row in rows if row["devices"] == devices}
        speed_ups = [f"{devices * own[mode]:.2f}" for mode in ("data", "columns", "hybrid")]
        cells.append([str(devices), *speed_ups, str(hours), str(published)])
    return _table(["K20s", "data", "columns", "hybrid", "published: hours", "speed-up"], cells)


def page(found: dict[str, Any]) -> str:
    """Return modes.md, the tables of modes.json."""
    rows = found["rows"]
    software = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    share = "share of a step spent computing (communication time)"
    tables = {
        "MB sent per device and step, and memory per device": table_of_bytes(rows),
        f"Nodes of 8 H100s: {share}": table_of_winners(rows, H100),
        f"One H100 per machine, 25 Gb/s Ethernet: {share}": table_of_winners(rows, ETHERNET),
        'Speed-up on K20s, beside "One weird trick"': table_beside_one_weird_trick(rows),
    }
    return (
        f"# parallel_modes ({found['date']})\n\n    {COMMAND}\n\n"
        f"{found['machine']}; {software}; {found['images_a_device']} images per device\n\n"
        "The bytes and the memory are read from compiled programs. The times are calculated, not\n"
        "measured ([assumptions](../../../docs/parallelism.md#from-2-to-1024-devices-by-calculation)).\n"
        "The best mode is in bold.\n"
        + "".join(f"\n## {title}\n\n{table}\n" for title, table in tables.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tables_only", action="store_true", help="compile nothing")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "modes.json"
    if not options.tables_only:
        rows = measure()
        found = {
            "date": time.strftime("%Y-%m-%d"),
            "command": COMMAND,
            "machine": f"{platform.machine()}, virtual CPU devices",
            "versions": versions(),
            "images_a_device": IMAGES,
            "rows": rows,
        }
        file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
