"""The constants of local response normalisation, one at a time (the paper, section 3.3).

    python launch/sweep.py configs/sweeps/lrn_constants.py --out=runs/lrn_constants

The paper chose k = 2, n = 5, alpha = 1e-4 and beta = 0.75 on a validation set. It publishes
no error for other values. The original program multiplies the mean of the squares by alpha
instead of their sum, so its alpha counts a fifth of the paper's. Caffe has k = 1, and its
window crosses the columns.

This sweep runs anywhere on the embedded images and takes some minutes per run on two CPU
cores. configs/sweeps/lrn.py says what such results show. For other data add
`--set data.source=folder:PATH`.
"""

from alexnet_jax.sweeps import Row, Sweep
from configs.sweeps import ablations


def get_sweep():
    values = {
        "lrn_size": (3, 9),
        "lrn_k": (1.0, 4.0),
        "lrn_alpha": (2e-5, 5e-4),
        "lrn_beta": (0.5, 1.0),
        "lrn_alpha_mode": ("mean",),
        "lrn_per_column": (False,),
    }
    rows = [
        Row(f"{name}={value}", {f"model.overrides.{name}": value})
        for name, several in values.items()
        for value in several
    ]
    return Sweep(
        about="How much do the constants of response normalisation matter?",
        config="configs/quickstart.py",
        # In mode columns, on two devices, a window cannot cross the columns.
        overrides=ablations.FROM_QUICKSTART,
        rows=(Row("paper"), *rows),
        baseline="paper",
        measured_on="the images of configs/quickstart.py, centre view",
        seeds=(0, 1, 2),
    )
