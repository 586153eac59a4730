"""Train cuda-convnet2's "11%" network on CIFAR-10, from a folder of images.

    python -m alexnet_jax.main --config=configs/cifar10_11.py --workdir=runs/cifar10_11 \
        --config.data.source=folder:PATH

PATH holds train/<class>/* and test/<class>/*, images of 32 x 32 pixels. The network has two
convolutions with local response normalisation and two locally connected layers. It trains
on random 24 x 24 crops and their mirror images. The test averages nine views.

The constants are from `layers-cifar10-11pct.cfg` and `layer-params-cifar10-11pct.cfg`. The
learning rate of the weights is 0.001. It is divided by ten after 500 and after 510 of 520
epochs. The learning rate of the biases is 0.002 to the end. cuda-convnet2 trains the first
350 epochs on four fifths of the training images and validates on the rest. Here every
epoch uses all training images.

`--config=configs/cifar10_11.py:26` trains for 26 epochs. The learning rate then drops at
the same fractions of the run.

Expected after 520 epochs: 11% test error over nine views. This has not been run here.

To measure the effect of response normalisation (the paper, section 3.3: 13% without it, 11%
with it), run

    python launch/sweep.py configs/sweeps/cifar10_lrn.py --out=DIR \
        --set data.source=folder:PATH
"""

from configs import cifar10

DROPS, EPOCHS = (500, 510), 520


def get_config(num_epochs=str(EPOCHS)):
    config = cifar10.get_config(num_epochs)
    config.model.variant = "cifar_11"
    config.data.crop_size = 24
    config.augment.crop = True
    config.augment.flip = True
    config.optim.constant_bias_lr = True
    config.schedule.drop_epochs = tuple(config.num_epochs * epoch / EPOCHS for epoch in DROPS)
    config.eval_views = 9
    return config
