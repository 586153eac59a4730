"""Run a sweep: python launch/sweep.py configs/sweeps/lrn.py --out=DIR (see --help)."""

import sys
from pathlib import Path

# Makes configs/ importable, and alexnet_jax if it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alexnet_jax.sweeps.run import main
from alexnet_jax.system import signals

if __name__ == "__main__":
    signals.run(main)
