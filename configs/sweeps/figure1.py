"""How much sooner ReLU learns than saturating units (the paper, figure 1).

    python launch/sweep.py configs/sweeps/figure1.py --out=runs/figure1 \
        --set data.source=folder:PATH

CIFAR-10 in a folder, as for configs/cifar10.py. Eight runs for the search of the learning
rates, ended at 25% training error, when another candidate was there sooner, or after 60
epochs (sigmoids 20), and a run for each kind of unit and further seed: hours on two CPU
cores, half a minute to a minute an epoch.

The paper: a four-layer network with ReLU reaches 25% training error six times sooner than
one with tanh, each with its own learning rate, without regularisation. It does not publish
that network: this is a stand-in, cuda-convnet's "18%" network (configs/cifar10.py, three
convolutions and a classifier) with the units exchanged, without weight decay and
augmentation. Sigmoids are not in the figure; with the table's start, N(0, 0.01), they
hardly learn.
"""

from alexnet_jax.sweeps import EpochsTo, Paper, Row, Sweep

TARGET = 0.25


def get_sweep():
    return Sweep(
        about="How many epochs until a training error of 25%, by the kind of unit?",
        config="configs/cifar10.py",
        overrides={
            "num_epochs": 60.0,
            "stop_at_train_error": TARGET,
            "schedule.name": "constant",
            "optim.weight_decay": 0.0,
            "optim.layer_weight_decay": False,
            "log_every_steps": 98,  # a quarter of an epoch
            "eval_every_epochs": 0.0,
        },
        rows=(
            # The likeliest first: the others end when they have lost to it.
            Row("relu", search={"optim.learning_rate": (3e-3, 1e-2, 1e-3)}),
            Row(
                "tanh",
                {"model.overrides.activation": "tanh"},
                search={"optim.learning_rate": (1e-2, 3e-3, 3e-2)},
                paper=Paper(
                    effect=6.0,
                    measured_on="CIFAR-10, an unpublished four-layer network",
                    source="the paper, section 3.1 and figure 1",
                ),
            ),
            Row(
                "sigmoid",
                {"model.overrides.activation": "sigmoid", "num_epochs": 20.0},
                search={"optim.learning_rate": (1e-1, 3e-2)},
            ),
        ),
        baseline="relu",
        metric=EpochsTo(TARGET),
        compare="ratio",
        measured_on="CIFAR-10's training split, a stand-in network",
    )
