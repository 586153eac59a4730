"""CIFAR-10 with cuda-convnet's "13%" network, from a folder of images.

    python -m alexnet_jax.main --config=configs/cifar10_13.py --workdir=runs/cifar10_13 \
        --config.data.source=folder:PATH

As configs/cifar10_11.py, but for the network (`layers-conv-local-13pct.cfg`: no
normalisation, and a narrower third layer), for the length (the learning rate is divided by
ten after 140 and after 150 epochs, 160 in all; there the first 100 are of four fifths of
the images), and for the test, which averages ten views: the centre, the four corners,
and the five mirrored. `:16` makes it 16 epochs.

Expected after 160 epochs, not run here: 13% test error over ten views.
"""

from configs import cifar10_11

DROPS, EPOCHS = (140, 150), 160


def get_config(num_epochs=str(EPOCHS)):
    config = cifar10_11.get_config(num_epochs)
    config.model.variant = "cifar_13"
    config.schedule.drop_epochs = tuple(config.num_epochs * epoch / EPOCHS for epoch in DROPS)
    config.eval_views = 10
    return config
