"""A frozen ViT without a classifier gets one: a linear probe of its features."""

from __future__ import annotations

import argparse

import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn


def add_source(parser: argparse.ArgumentParser, images: int) -> None:
    """What is measured: the section's name, a ViT, and evenly spaced images of a split."""
    parser.add_argument("--name", required=True, help="section of docs/results.md and name of the JSON file")
    parser.add_argument("--model", required=True, help="timm name or local-dir:FOLDER, with pretrained weights")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--blocks", type=int, default=0, help="the first so many blocks only; 0: all")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int, default=images, help="evenly spaced images of the split; 0: all")


def first_blocks(name: str, img_size: int, blocks: int, **kwargs) -> nn.Module:
    """A pretrained timm ViT, or only its first so many blocks (0: all), in eval mode."""
    vit = timm.create_model(name, pretrained=True, img_size=img_size, **kwargs).eval()
    if blocks:
        vit.blocks = vit.blocks[:blocks]
    return vit


def linear_probe(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Logistic regression on standardised features, as one linear layer.

    Args:
        features: (n, D).
        labels: (n,) long in [0, classes).
        classes: Outputs; those without a label get a logit of -1e4.
    """
    scaler, regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500)).fit(features, labels)
    weight = torch.as_tensor(regression.coef_ / scaler.scale_)
    bias = torch.as_tensor(regression.intercept_) - weight @ torch.as_tensor(scaler.mean_)
    probe = nn.Linear(features.shape[1], classes).requires_grad_(False)
    probe.weight.zero_()
    probe.bias.fill_(-1e4)
    probe.weight[regression.classes_], probe.bias[regression.classes_] = weight.float(), bias.float()
    return probe.requires_grad_(True)
