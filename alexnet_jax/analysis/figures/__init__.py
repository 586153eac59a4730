"""Figures of data sets, training runs and networks, drawn with matplotlib."""

from alexnet_jax.analysis.figures.curves import training_curves
from alexnet_jax.analysis.figures.feature_maps import feature_maps
from alexnet_jax.analysis.figures.filters import (
    filter_statistics,
    filter_statistics_by_column,
    first_layer_filters,
)
from alexnet_jax.analysis.figures.pictures import best_labels, contact_sheet, nearest_pictures

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
