"""Window and stride of the pooling layers (the paper, section 3.4).

    python launch/sweep.py configs/sweeps/pooling.py --out=runs/pooling

The paper compares windows of 3 pixels with windows of 2, both with a stride of 2. Windows
of 3 reduce the top-1 error by 0.4 points and the top-5 error by 0.3. It publishes no other
pair. A stride of 3 shrinks the maps faster, so fc6 has fewer inputs: 2 x 2 x 256 instead of
6 x 6 x 256.

This sweep runs anywhere on the embedded images and takes some minutes per run on two CPU
cores. configs/sweeps/lrn.py says what such results show.
"""

from alexnet_jax.sweeps import Paper, Row, Sweep
from configs.sweeps import ablations

WITHOUT_OVERLAP = Paper(None, 0.4, ablations.VALIDATION, "section 3.4")


def get_sweep():
    rows = [
        Row(
            f"{window}/{stride}",
            {"model.overrides.pool_window": window, "model.overrides.pool_stride": stride},
            WITHOUT_OVERLAP if (window, stride) == (2, 2) else None,
        )
        for window, stride in ((3, 2), (2, 2), (3, 3), (4, 2))
    ]
    return Sweep(
        about="Which window and stride of the pooling layers are best?",
        config="configs/quickstart.py",
        overrides=ablations.FROM_QUICKSTART,
        rows=rows,
        baseline="3/2",
        measured_on="the images of configs/quickstart.py, centre view",
        seeds=(0, 1, 2),
    )
