"""Pictures: every function returns a matplotlib Figure, and `save` writes one."""

from .accuracy import plot_accuracy, plot_budgets
from .curves import plot_training, plot_uncertainty
from .generation import Film, plot_bank, plot_film, plot_samples
from .orders import plot_class_heatmap, plot_dependency, plot_kept, plot_order
from .style import save

__all__ = [
    "Film",
    "plot_accuracy",
    "plot_bank",
    "plot_budgets",
    "plot_class_heatmap",
    "plot_dependency",
    "plot_film",
    "plot_kept",
    "plot_order",
    "plot_samples",
    "plot_training",
    "plot_uncertainty",
    "save",
]
