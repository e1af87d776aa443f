"""Orders of patches: tensors in, tensors out. Imports nothing else of the package."""

from .augment import jitter_order, mix_random
from .bank import ClassOrderBank
from .baselines import BASELINES, UNCERTAINTIES, baseline_scores
from .budget import check_keep, check_keeps, parse_keep, resolve_keep
from .errors import CollapseError, check_grid, check_images
from .factors import (
    condition,
    dependencies,
    expected_errors,
    neighbour_kernel,
    parallel_picks,
    single_errors,
)
from .generation import GENERATION_ORDERS, GenerationOrder, tokens_per_step
from .hierarchy import HierarchicalGraph, hierarchical_pagerank
from .order import Order
from .pagerank import pagerank
from .ranking import RANKINGS, rank_graph
from .spread import bayer_ranks, halton_ranks
from .statistics import ImageDependence, image_dependence, spearman
from .weights import patch_weights

__all__ = [
    "BASELINES",
    "GENERATION_ORDERS",
    "RANKINGS",
    "UNCERTAINTIES",
    "ClassOrderBank",
    "CollapseError",
    "GenerationOrder",
    "HierarchicalGraph",
    "ImageDependence",
    "Order",
    "baseline_scores",
    "bayer_ranks",
    "check_grid",
    "check_images",
    "check_keep",
    "check_keeps",
    "condition",
    "dependencies",
    "expected_errors",
    "halton_ranks",
    "hierarchical_pagerank",
    "image_dependence",
    "jitter_order",
    "mix_random",
    "pagerank",
    "neighbour_kernel",
    "parallel_picks",
    "parse_keep",
    "patch_weights",
    "rank_graph",
    "resolve_keep",
    "single_errors",
    "spearman",
    "tokens_per_step",
]
