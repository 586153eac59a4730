"""With and without overlapping pooling (the paper, section 3.4).

    python launch/sweep.py configs/sweeps/overlap.py --out=runs/overlap --seeds=0,1,2

The paper: windows of 3 pixels with a stride of 2, against windows of 2, reduce the top-1
error by 0.4 points and the top-5 error by 0.3. The original's logs: 41.06% against 40.66%
on ILSVRC-2012 (experiments 147 and 145; 147, variant `no_overlap`, also pads conv2 and
conv5 less, which "no overlap" here does not).

Runs anywhere, some minutes per run on two CPU cores, on the embedded images; see
configs/sweeps/lrn.py for what that does and does not say.
"""

from alexnet_jax.sweeps import Sweep
from configs.sweeps import ablations


def get_sweep():
    return Sweep(
        about="Does overlapping pooling make the network better?",
        config="configs/quickstart.py",
        overrides=ablations.FROM_QUICKSTART,
        rows=ablations.rows("no overlap"),
        baseline=ablations.BASELINE,
        measured_on="the images of configs/quickstart.py, centre view",
        seeds=(0, 1, 2),
    )
