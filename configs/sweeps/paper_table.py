"""The parts of the network and of its training that the paper removes, one per row.

    python launch/sweep.py configs/sweeps/paper_table.py --out=runs/paper_table --slurm \
        --set data.dir=DATA
    python launch/sweep.py configs/sweeps/paper_table.py --out=runs/paper_table \
        --set data.source=folder:PATH data.eval_split=val num_epochs=30.0

This is seven runs of configs/paper.py, each of 90 epochs as in the paper. All of ImageNet
needs several GPUs (--slurm). A part of it trains in less time and says less.

The paper reports these losses, in points of top-1 error:

- no response normalisation: 1.4 (section 3.3)
- no overlap: 0.4 (section 3.4)
- one GPU with half the kernels: 1.7 (section 3.2)
- no colour noise: "over 1" (section 4.1)

For training without crops and mirror images, and for training without dropout, it speaks of
"substantial overfitting" and gives no number.
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
