"""Caffe's reference model, bvlc_reference_caffenet.

    python -m alexnet_jax.main --config=configs/caffenet.py --workdir=runs/caffenet

As configs/caffe.py in everything but the network: pooling before response
normalisation, and biases of 1 where bvlc_alexnet has 0.1 (the difference of the two
`train_val.prototxt` of github.com/BVLC/caffe).

Expected on the 50,000 validation images of ILSVRC-2012, not run here: top-1 error
42.6% and top-5 19.6% on the centre view (its readme: 57.4% and 80.4% right).
"""

from configs import caffe


def get_config():
    config = caffe.get_config()
    config.model.variant = "caffenet"
    return config
