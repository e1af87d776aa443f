"""The reference of collapsed models: the plain model, in whose attention the dropped patches are masked out."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from timm_collapse import CollapseOrder


class Masked(TorchFunctionMode):
    """Attention that does not see the dropped patches, in any model: the reference that dropping must equal.

    Scores of dropped keys are -inf and their values are 0 (talking heads add a bias after the softmax).
    """

    def __init__(self, kept, num_patches):
        super().__init__()
        self.num_patches = num_patches
        self.dropped = torch.ones(len(kept), num_patches, dtype=torch.bool).scatter(1, kept, False)

    def of(self, length):
        """(B, 1, length), True = dropped; None where the axis does not hold the patches."""
        if not 0 <= length - self.num_patches <= 16:
            return None
        return F.pad(self.dropped, (length - self.num_patches, 0)).unsqueeze(1)

    def bias(self, length):
        dropped = self.of(length)
        return 0 if dropped is None else torch.zeros(dropped.shape).masked_fill(dropped, float("-inf")).unsqueeze(1)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            mask = self.bias(args[1].shape[-2])
            given = kwargs.get("attn_mask")
            kwargs["attn_mask"] = mask if given is None else given + mask
        elif func in (torch.Tensor.softmax, torch.softmax, F.softmax):
            args = (args[0] + self.bias(args[0].shape[-1]), *args[1:])
        elif (
            func in (torch.Tensor.__matmul__, torch.Tensor.matmul) and args[0].shape[-1] == args[0].shape[-2]
        ):  # attention @ values
            dropped = self.of(args[1].shape[-2]) if args[1].ndim == 4 else None
            if dropped is not None:
                args = (args[0], args[1].masked_fill(dropped.unsqueeze(-1), 0.0))
        return func(*args, **kwargs)


class NoOrder(CollapseOrder):
    """Fails where an order is computed."""

    def __init__(self):
        super().__init__("bayer")

    def forward(self, *args, **kwargs):
        raise AssertionError("an order was computed")


@torch.no_grad()
def randomize(model):
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and ("gamma" in name or "norm" in name or name.endswith("ls1.gamma")):
            parameter.uniform_(0.5, 1.0)
        else:
            parameter.normal_(std=0.06)
