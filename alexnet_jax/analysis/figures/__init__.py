"""Figures of data sets, training runs and networks, drawn with matplotlib."""

from alexnet_jax.analysis.figures.curves import training_curves
from alexnet_jax.analysis.figures.feature_maps import feature_maps
from alexnet_jax.analysis.figures.filters import (
    filter_statistics,
    filter_statistics_by_column,
    first_layer_filters,
)
from alexnet_jax.analysis.figures.images import best_labels, contact_sheet, nearest_images

__all__ = [
    "best_labels",
    "contact_sheet",
    "feature_maps",
    "filter_statistics",
    "filter_statistics_by_column",
    "first_layer_filters",
    "nearest_images",
    "training_curves",
]
