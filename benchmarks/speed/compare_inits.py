"""The starts `paper` and `caffe` at full width: which one leaves ln(classes)?

    python benchmarks/speed/compare_inits.py --out=DIR [--steps=1000] \
        -- --config.data.source=folder:PATH --config.data.eval_split=train

trains `configs/paper.py` once with each start, one after the other (a run that is
there goes on or is skipped), and draws DIR/losses.png. What stands after `--` goes to
both. Measured in benchmarks/results; about 1,000 x 128 / 30 seconds a start on two CPU
cores.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from alexnet_jax.analysis.figures import training_curves
from alexnet_jax.training.writers import METRICS_FILE, read_metrics

INITS = ("paper", "caffe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of both runs")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("more", nargs="*", help="flags of alexnet_jax.main")
    options = parser.parse_args()
    records = {}
    for init in INITS:
        workdir = options.out / init
        command = [sys.executable, "-m", "alexnet_jax.main"]
        command += ["--config=configs/paper.py", f"--workdir={workdir}"]
        command += [
            f"--config.model.init={init}",
            f"--config.max_steps={options.steps}",
        ]
        # An epoch of 1,000 pictures has eight steps: room for more epochs than 90,
        # evaluations now and then, and no drop of the learning rate.
        command += ["--config.num_epochs=100000", "--config.schedule.name=constant"]
        command += ["--config.eval_every_epochs=25", "--config.log_every_steps=10"]
        command += options.more
        subprocess.run(command, check=True)
        found = read_metrics(workdir / METRICS_FILE)
        records[init] = [record for record in found if "train/loss" in record]
    figure = training_curves(
        records, quantities=["loss"], over="step", num_classes=1000
    )
    figure.savefig(options.out / "losses.png", dpi=150)
    print(f"wrote {options.out / 'losses.png'}")


if __name__ == "__main__":
    main()
