"""Train the paper's network on the paper's data (Krizhevsky et al. 2012).

    python -m alexnet_jax.main --config=configs/paper.py --workdir=runs/paper

This trains on a prepared `imagenet2012_256`. For a folder of images, add

    --config.data.source=folder:PATH --config.data.eval_split=val

Two or more devices split the network into its two columns, as in 2012. One device computes
the whole network, with the same numbers.

Expected on ILSVRC-2012 after about 90 epochs: top-1 error 40.7% and top-5 error 18.2% over
ten views, the paper's protocol. The final evaluation also reports the centre view. There
the expected errors are about 42.5% and 19.7%. Nobody published these two. They are
interpolated between the original's experiment 170 and Caffe. docs/imagenet.md, "What to
expect", lists the sources. This recipe has not been run here on all of ImageNet.
"""

from alexnet_jax.training.config import get_config as defaults


def get_config():
    config = defaults()
    config.data.source = "imagenet2012_256"
    config.data.eval_split = "validation"
    # Biases of 1, as in section 5. Caffe took 0.1 because 1 "gave flat loss". On 1,000
    # images at full width, the loss leaves ln(1000) for good after 180 steps with these
    # initial weights, and after 370 with Caffe's (one seed; benchmarks/results).
    config.model.init = "paper"
    config.parallel.mode = "columns"
    config.eval_views = 10
    config.checkpoint.every_steps = 5000
    return config
