"""CIFAR-10 with cuda-convnet2's "11%" network, from a folder of images.

    python -m alexnet_jax.main --config=configs/cifar10_11.py --workdir=runs/cifar10_11 \
        --config.data.source=folder:PATH

PATH/train/<class>/* and PATH/test/<class>/*, 32 x 32 pixels. Two convolutions with local
response normalisation, two locally connected layers, random 24 x 24 crops and mirror
images; the test averages nine views. Constants: `layers-cifar10-11pct.cfg` and
`layer-params-cifar10-11pct.cfg`: learning rate 0.001, of the biases 0.002 to the end;
divided by ten after 500 and after 510 epochs, 520 in all. (There 350 of them are of
four fifths of the images, the rest to validate on; here all are of all.)
`--config=configs/cifar10_11.py:26` is the same in 26 epochs: the learning rate drops at
the same shares of the run.

Expected after 520 epochs, not run here: 11% test error over nine views.

What its response normalisation gives (the paper, section 3.3: 13% without, 11% with it):

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
