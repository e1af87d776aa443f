"""Measuring orders and models."""

from .accuracy import accuracy_curves, image_batches, with_orderer
from .cost import Cost, costs_over_keep, images_per_second, median_seconds
from .curve import KEEPS, AccuracyCurve
from .distances import Prdc, classifier_score, frechet_distance, kid, prdc
from .feature_statistics import FeatureStatistics
from .fidelity import InceptionReport, evaluate_inception, extract_inception_features
from .generation import Features, GenerationReport, evaluate_generation, extract_features
from .launches import LaunchCounter, count_kernels, count_launches
from .macs import MacCounter, count_macs
from .uncertainty import UncertaintyCurve, greedy_oracle, uncertainty_curve

__all__ = [
    "KEEPS",
    "AccuracyCurve",
    "Cost",
    "FeatureStatistics",
    "Features",
    "GenerationReport",
    "InceptionReport",
    "LaunchCounter",
    "MacCounter",
    "Prdc",
    "UncertaintyCurve",
    "accuracy_curves",
    "classifier_score",
    "costs_over_keep",
    "count_kernels",
    "count_launches",
    "count_macs",
    "evaluate_generation",
    "evaluate_inception",
    "extract_features",
    "extract_inception_features",
    "frechet_distance",
    "greedy_oracle",
    "image_batches",
    "images_per_second",
    "kid",
    "median_seconds",
    "prdc",
    "uncertainty_curve",
    "with_orderer",
]
