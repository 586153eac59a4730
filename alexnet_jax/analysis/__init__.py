"""Figures of a data set and of a trained network. matplotlib stays in here."""

from alexnet_jax.analysis.best_labels import best_labels
from alexnet_jax.analysis.contact_sheet import contact_sheet
from alexnet_jax.analysis.curves import training_curves
from alexnet_jax.analysis.feature_maps import feature_maps
from alexnet_jax.analysis.filters import (
    filter_statistics,
    filter_statistics_by_column,
    first_layer_filters,
)
from alexnet_jax.analysis.neighbours import nearest_pictures

__all__ = [
    "best_labels",
    "contact_sheet",
    "feature_maps",
    "filter_statistics",
    "filter_statistics_by_column",
    "first_layer_filters",
    "nearest_pictures",
    "training_curves",
]
