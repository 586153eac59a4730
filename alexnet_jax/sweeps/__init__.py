"""Ablation sweeps: what is run (`plan`), how (`run`), and what came of it (`summary`)."""

from alexnet_jax.sweeps.plan import EpochsTo, FinalError, Paper, Row, Sweep

__all__ = ["EpochsTo", "FinalError", "Paper", "Row", "Sweep"]
