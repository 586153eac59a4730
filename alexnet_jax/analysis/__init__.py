"""Figures of a data set and of a trained network. matplotlib stays in here."""

from alexnet_jax.analysis.best_labels import best_labels
from alexnet_jax.analysis.contact_sheet import contact_sheet
from alexnet_jax.analysis.curves import compare_losses, training_curves
from alexnet_jax.analysis.filters import first_layer_filters

__all__ = [
    "best_labels",
    "compare_losses",
    "contact_sheet",
    "first_layer_filters",
    "training_curves",
]
