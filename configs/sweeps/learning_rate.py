"""Choose a learning rate for your own images.

    python launch/sweep.py configs/sweeps/learning_rate.py --out=runs/learning_rate \
        --set data.source=folder:PATH num_epochs=10.0

Each row trains the narrow network of configs/quickstart.py at one learning rate. Without
--set it trains on the embedded images, which takes some minutes per run on two CPU cores.
If the loss of a run is no longer finite, its rate is reported as diverged and the others go
on.

The paper takes 0.01 at full width with batches of 128 (section 5).
"""

from alexnet_jax.sweeps import Row, Sweep
from configs.sweeps import ablations

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def get_sweep():
    return Sweep(
        about="Which learning rate ends with the lowest error?",
        config="configs/quickstart.py",
        overrides=ablations.FROM_QUICKSTART,
        rows=tuple(Row(f"{rate:g}", {"optim.learning_rate": rate}) for rate in RATES),
        baseline="0.001",
        measured_on="the images of configs/quickstart.py, centre view",
    )
