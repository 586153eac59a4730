"""The defaults; `alexnet_jax/training/config.py` explains every field.

    python -m alexnet_jax.main --config=configs/common.py --workdir=DIR

A config file starts from these defaults and changes what it needs. It may be in any folder.
"""

from alexnet_jax.training.config import get_config

__all__ = ["get_config"]
