"""Fine-tune a trained network on your own images, one folder per class.

    python -m alexnet_jax.main --config=configs/finetune.py:SOURCE \
        --workdir=runs/mine --config.data.source=folder:PATH

SOURCE is the workdir of a run or a file of weights (docs/weights.md). The network and the
image sizes are those of SOURCE. The classifier starts from scratch and learns ten times as
fast as the other layers, which start from the weights of SOURCE. Caffe does the same when
it fine-tunes its reference network on Flickr's styles. To freeze the first two
convolutions, add

    --config.schedule.layer_factors='(("conv1",0,0),("conv2",0,0),("fc8",0,10))'

Once the run has begun, its workdir can take the place of SOURCE: with
`configs/finetune.py:runs/mine` the run resumes, or evaluates, without SOURCE.
"""

from alexnet_jax.training import load
from alexnet_jax.training.config import get_config as defaults
from alexnet_jax.training.config import make_model


def get_config(source=""):
    config = defaults()
    source = source or "SOURCE"  # a placeholder, which the error of a run names
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
