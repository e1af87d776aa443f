"""What every collapsed model has: a budget, and an orderer that is no part of it."""

from __future__ import annotations

import torch
from timm.models._input import update_model_args

from ..models.orderer import CollapseOrder
from ..order import CollapseError, check_keep
from .classes import Remade


class HoldsOrderer(Remade):
    """Mixin of a model with an orderer beside it.

    Attributes:
        orderer: `CollapseOrder`; a model of its own. It is no submodule: `parameters`, `named_modules` and `state_dict`
            do not see it, so nothing trains, adapts, averages, empties or saves it along. It goes to the model's device
            and precision. To change it, `collapse` again.
        keep: Token budget, a ratio in (0, 1] or a count of at least 2; may be changed at any time. 1 is the plain
            model, bit for bit, and computes no order.
    """

    orderer: CollapseOrder

    @property
    def keep(self) -> float | int:
        # it is text, which torch.compile takes for a constant: a float that has changed once becomes a symbol there,
        # and no number of tokens can depend on that
        return int(self._keep) if self._keep.isdecimal() else float(self._keep)

    @keep.setter
    def keep(self, keep: float | int) -> None:
        self._keep = repr(check_keep(keep))
        self.record(keep=self.keep)

    def record(self, **settings) -> None:
        """Also write settings where timm's save_for_hf takes them from, in a model that it builds again collapsed."""
        if "orderer" in getattr(self, "_model_args", {}):
            update_model_args(self, **settings)

    def hold(self, orderer: CollapseOrder) -> None:
        """Take an orderer, to the device of the model."""
        self._modules.pop("orderer", None)  # where one was assigned, torch has made it a part of the model
        object.__setattr__(self, "orderer", orderer)
        self._move_orderer(next((p.device for p in self.parameters()), torch.device("meta")))

    def orderer_on(self, device: torch.device) -> CollapseOrder:
        """The orderer, moved to the device of the images if it is elsewhere."""
        if not torch.compiler.is_compiling():
            self._move_orderer(device)
        return self.orderer

    def _move_orderer(self, device: torch.device) -> None:
        own = next((p.device for p in self.orderer.parameters()), device)
        if own != device and device.type != "meta":
            self.orderer.to(device)

    def _apply(self, fn, recurse=True):
        self.orderer._apply(fn)
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self):
        raise CollapseError(
            "a collapsed model cannot run in DataParallel, which would leave its orderer on one device; use "
            "DistributedDataParallel"
        )
