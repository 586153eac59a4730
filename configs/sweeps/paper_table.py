"""The parts of network and training that the paper removes, one row each.

    python launch/sweep.py configs/sweeps/paper_table.py --out=runs/paper_table --slurm \
        --set data.dir=DATA
    python launch/sweep.py configs/sweeps/paper_table.py --out=runs/paper_table \
        --set data.source=folder:PATH data.eval_split=val num_epochs=30.0

Seven runs of configs/paper.py, each of 90 epochs as in the paper. All of ImageNet needs
several GPUs (--slurm); a part of it trains in less time and says less.

The paper, in points of top-1 error: no response normalisation 1.4 (section 3.3), no
overlap 0.4 (3.4), one GPU with half the kernels 1.7 (3.2), no colour noise "over 1" (4.1).
Without crops and mirror images, and without dropout, it speaks of "substantial
overfitting" and gives no number.
"""

from alexnet_jax.sweeps import FinalError, Sweep
from configs.sweeps import ablations


def get_sweep():
    return Sweep(
        about="What does each part of the network and of its training contribute?",
        config="configs/paper.py",
        rows=ablations.rows(
            "no LRN",
            "no overlap",
            "one GPU",
            "no colour lighting",
            "no crops, no mirror images",
            "no dropout",
        ),
        baseline=ablations.BASELINE,
        metric=FinalError("eval/views_top1_error"),
        measured_on="the ImageNet data of configs/paper.py, ten views",
    )
