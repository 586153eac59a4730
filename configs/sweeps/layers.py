"""The network without each convolutional layer in turn (the paper, sections 1 and 7).

    python launch/sweep.py configs/sweeps/layers.py --out=runs/layers --slurm \
        --set data.dir=DATA

This is five runs of configs/paper.py, each of 90 epochs as in the paper. conv1 always
stays, because it sets the grid.

The paper, section 7: "removing any of the middle layers results in a loss of about 2% for
the top-1 performance of the network".
"""

from alexnet_jax.sweeps import FinalError, Sweep
from configs.sweeps import ablations


def get_sweep():
    return Sweep(
        about="How much worse is the network without one of its layers?",
        config="configs/paper.py",
        rows=ablations.rows(*(f"without conv{i}" for i in (2, 3, 4, 5))),
        baseline=ablations.BASELINE,
        metric=FinalError("eval/views_top1_error"),
        measured_on="the ImageNet data of configs/paper.py, ten views",
    )
