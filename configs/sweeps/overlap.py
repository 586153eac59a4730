"""With and without overlapping pooling (the paper, section 3.4).

    python launch/sweep.py configs/sweeps/overlap.py --out=runs/overlap --seeds=0,1,2

The paper compares windows of 3 pixels with windows of 2, both with a stride of 2. Windows
of 3 reduce the top-1 error by 0.4 points and the top-5 error by 0.3. The original's logs
have 41.06% without overlap (experiment 147) and 40.66% with it (145) on ILSVRC-2012.
Experiment 147, variant `no_overlap`, also pads conv2 and conv5 less. The row "no overlap"
here does not.

This sweep runs anywhere on the embedded images and takes some minutes per run on two CPU
cores. configs/sweeps/lrn.py says what such results show.
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
