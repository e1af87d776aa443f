"""Classes made from a plain model's: a mixin in front of it, under which an existing model goes on in place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from ..order import Order


class Remade:
    """Mixin of a model, or a part of one, whose class was made by `collapsed_class`: it can be copied and pickled."""

    def __reduce_ex__(self, protocol):
        return restore, (type(self).__bases__,), self.__dict__


@cache
def collapsed_class(adapter: type, base: type) -> type:
    """The subclass of a model's class that its collapsed form has; made once, so that classes compare equal."""
    return type(f"Collapsed{base.__name__}", (adapter, base), {"__module__": adapter.__module__})


def become(module: nn.Module, cls: type) -> None:
    """Make a module one of another class, in place.

    accelerate's hooks call the forward method that the module had when they were set: from now on the new one.
    """
    module.__class__ = cls
    if "_old_forward" in vars(module):
        module._old_forward = cls.forward.__get__(module)


def overrides(module: nn.Module, name: str) -> bool:
    """Whether a module has a method of its own in place of its class's; hooks of accelerate call that, and are none."""
    return name in vars(module) and not (name == "forward" and "_old_forward" in vars(module))


def on_hand(module: nn.Module, read: Callable[[], Any]) -> Any:
    """What a function reads of a module's own parameters, outside of its forward method.

    accelerate may keep them elsewhere until that runs.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not any(p.is_meta for p in module.parameters(recurse=False)):
        return read()
    hook.pre_forward(module)
    try:
        return read()
    finally:
        hook.post_forward(module, None)


def restore(bases: tuple[type, type]) -> nn.Module:
    """For copy and pickle: an empty instance; its state is set afterwards."""
    cls = collapsed_class(*bases)
    return cls.__new__(cls)


def take_name(cls: type) -> None:
    """Give a collapsed class the name of the plain one.

    transformers looks classes up by name: the architecture in config.json, the outputs that can be recorded, the heads
    that a pipeline takes, the modules that are not split between devices.
    """
    plain = cls.__bases__[1]
    cls.__name__, cls.__qualname__, cls.__module__ = plain.__name__, plain.__qualname__, plain.__module__


def set_forward(cls: type, collapsed: Callable) -> None:
    """Give a collapsed class a forward method with the plain one's signature and `order`.

    transformers' Trainer reads from it which columns of a data set there is use for, and `generate` which arguments.

    Args:
        cls: Its `argument_names` become the names of the plain method's arguments, in their order.
        collapsed: (self, *args, order, **kwargs): what is called.
    """
    plain = cls.__bases__[1].forward
    signature = inspect.signature(plain)
    parameters = list(signature.parameters.values())
    order = inspect.Parameter("order", inspect.Parameter.KEYWORD_ONLY, default=None)
    rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]

    @functools.wraps(collapsed)
    def forward(self, *args, order: Order | list[Order] | None = None, **kwargs):
        return collapsed(self, *args, order=order, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*named, order, *rest])
    cls.argument_names = [p.name for p in named[1:]]
    cls.forward = forward
