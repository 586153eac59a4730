"""Train a trained network on other classes: your own images, one folder per class.

    python -m alexnet_jax.main --config=configs/finetune.py:SOURCE \
        --workdir=runs/mine --config.data.source=folder:PATH

SOURCE is the workdir of a run or a file of weights (docs/weights.md); network and image
sizes are its own. All layers start from its weights but the classifier, which starts anew
and learns ten times as fast as the others (as in Caffe's fine-tuning of its reference
network on Flickr's styles). To keep the first convolutions as they are:

    --config.schedule.layer_factors='(("conv1",0,0),("conv2",0,0),("fc8",0,10))'

Once it has begun, the run is a source itself: `configs/finetune.py:runs/mine` resumes and
evaluates it without SOURCE.
"""

from alexnet_jax.training import load
from alexnet_jax.training.config import get_config as defaults
from alexnet_jax.training.config import make_model


def get_config(source=""):
    config = defaults()
    source = source or "SOURCE"  # which a run then asks for
    if source != "SOURCE":
        config = load.with_network_of(config, source)
    config.finetune.source = source
    config.model.num_classes = 0
    config.data.source = "folder:PATH"
    config.data.batch_size = 64
    config.optim.learning_rate = 1e-3
    config.num_epochs = 20.0
    config.schedule.name = "cosine"
    classifier = make_model(config, None).network.layers[-1].name
    config.schedule.layer_factors = ((classifier, 0.0, 10.0),)
    config.log_every_steps = 20
    return config
