"""Train Caffe's reference model, bvlc_reference_caffenet.

    python -m alexnet_jax.main --config=configs/caffenet.py --workdir=runs/caffenet

The recipe is that of configs/caffe.py with another network. Pooling comes before response
normalisation, and biases are 1 where bvlc_alexnet has 0.1. The two `train_val.prototxt` of
github.com/BVLC/caffe differ in nothing else.

Expected on the 50,000 validation images of ILSVRC-2012: top-1 error 42.6% and top-5 error
19.6% on the centre view. Its readme reports accuracies of 57.4% and 80.4%. This recipe has
not been run here on all of ImageNet.
"""

from configs import caffe


def get_config():
    config = caffe.get_config()
    config.model.variant = "caffenet"
    return config
