"""How much sooner ReLU learns than saturating units (the paper, figure 1).

    python launch/sweep.py configs/sweeps/figure1.py --out=runs/figure1 \
        --set data.source=folder:PATH

CIFAR-10 in a folder, as for configs/cifar10.py. Per seed eleven runs: each kind of unit with
three or four learning rates, of which the best counts. A run ends at 25% training error, or
after 20 epochs (ReLU, sigmoid) or 60 (tanh, and sigmoid once more at its best rate). Hours on
two CPU cores: an epoch takes half a minute to a minute. `configs/sweeps/figure1.py:sigmoid` is
one kind of unit alone, `:relu,tanh` two.

The paper: a four-layer network with ReLU reaches 25% training error six times sooner than
one with tanh, each with its own learning rate, without regularisation. It does not publish
that network: this is a stand-in, cuda-convnet's "18%" network (configs/cifar10.py, three
convolutions and a classifier) with the units exchanged, without weight decay and
augmentation. Sigmoids are not in the figure; with the table's start, N(0, 0.01), they
hardly learn.
"""

from alexnet_jax.sweeps import EpochsTo, Paper, Row, Sweep

TARGET = 0.25


def get_sweep(units="relu,tanh,sigmoid"):
    chosen = units.split(",")
    unknown = sorted(set(chosen) - {"relu", "tanh", "sigmoid"})
    if unknown:
        raise ValueError(f"units are relu, tanh, sigmoid; not {', '.join(unknown)}")
    return Sweep(
        about="How many epochs until a training error of 25%, by the kind of unit?",
        config="configs/cifar10.py",
        overrides={
            "num_epochs": 60.0,
            "stop_at_train_error": TARGET,
            "schedule.name": "constant",
            "schedule.drop_epochs": (),
            "optim.weight_decay": 0.0,
            "optim.layer_weight_decay": False,
            "log_every_steps": 98,  # a quarter of an epoch
            "eval_every_epochs": 0.0,
        },
        rows=tuple(row for row in _rows() if row.name.split()[0] in chosen),
        baseline="relu" if "relu" in chosen else chosen[0],
        metric=EpochsTo(TARGET),
        compare="ratio",
        measured_on="CIFAR-10's training split, a stand-in network",
    )


def _rows():
    tanh = Paper(
        effect=6.0,
        measured_on="CIFAR-10, an unpublished four-layer network",
        source="the paper, section 3.1 and figure 1",
    )
    sigmoids = {"model.overrides.activation": "sigmoid"}
    return (
        Row("relu", {"num_epochs": 20.0}, search={"optim.learning_rate": (1e-3, 3e-3, 1e-2)}),
        Row(
            "tanh",
            {"model.overrides.activation": "tanh"},
            search={"optim.learning_rate": (3e-3, 1e-2, 3e-2)},
            paper=tanh,
        ),
        Row("sigmoid for longer", {**sigmoids, "optim.learning_rate": 1e-1}),
        Row(
            "sigmoid",
            {**sigmoids, "num_epochs": 20.0},
            search={"optim.learning_rate": (3e-2, 1e-1, 3e-1, 1.0)},
        ),
    )
