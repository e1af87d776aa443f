"""Why the other architectures of timm cannot be collapsed: one reason for each family."""

from __future__ import annotations

from torch import nn

_REASONS = {
    "it is convolutional: a convolution reads every place of its feature map": (
        "byobnet convmixer convnext cspnet cspnext densenet dla dpn efficientnet fasternet ghostnet hgnet hrnet "
        "inception_next inception_resnet_v2 inception_v3 inception_v4 lcnetv2 mambaout mobilenetv3 mobilenetv5 nasnet "
        "nfnet pnasnet rdnet regnet repghost repvit resnest resnet resnetv2 rexnet selecsls senet sknet starnet "
        "tresnet vgg vovnet xception xception_aligned"
    ),
    "its stages mix attention with convolutions and downsampling of the whole feature map": (
        "coat cpubone csatv2 edgenext efficientformer efficientformer_v2 efficientvim efficientvit_mit "
        "efficientvit_msra fastvit focalnet iformer levit lowformer metaformer nextvit shvit swiftformer visformer"
    ),
    "it attends within windows of the whole grid, and merges neighbouring tokens between its stages": (
        "davit gcvit hiera hieradet_sam2 maxxvit nest swin_transformer swin_transformer_v2 swin_transformer_v2_cr "
        "tiny_vit twins"
    ),
    "it is a pyramid: between its stages, neighbouring tokens of the whole grid are pooled": "mvitv2 pit pvt_v2",
    "its mixing layers need all tokens: their weights are laid out for the whole grid": "mlp_mixer",
    "it reads the whole grid row by row and column by column": "sequencer",
    "its relative position bias is laid out for the whole grid": "vision_transformer_relpos",
    "its attention has windows and relative positions of the whole grid, and its neck is convolutional": (
        "vision_transformer_sam"
    ),
    "its local patch interaction is a convolution over the whole grid": "xcit",
    "its gated attention weighs by position over the whole grid": "convit",
    "its outlook attention reads the neighbourhood of every place of the grid": "volo",
    "its patch tokens are made anew in each block from pixel tokens of all patches": "tnt",
    "its two branches cut the image into patches of different sizes": "crossvit",
}

_MODULES = {f"timm.models.{module}": reason for reason, modules in _REASONS.items() for module in modules.split()}

_WRAPPERS = ("FeatureGetterNet", "FeatureListNet", "FeatureDictNet", "FeatureHookNet", "FeatureGraphNet")
_WRAPPERS += ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule", "ScriptModule")


def unsupported_reason(model: nn.Module) -> str:
    """Why a model that no adapter fits cannot be collapsed."""
    for cls in type(model).__mro__:
        if cls.__name__ in _WRAPPERS:
            return "it wraps a model: collapse that model, then wrap it"
        if cls.__module__ in _MODULES:
            return _MODULES[cls.__module__]
    return "its forward pass has no known place where patch tokens can be dropped"
