"""Models inside wrappers: what ``torch.compile`` and the data-parallel classes hold."""

from __future__ import annotations

from torch import nn

from spfmt.errors import format_error

__all__ = ["changeable", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DDP and ``torch.compile``, so that names are the same everywhere."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def changeable(model: nn.Module) -> nn.Module:
    """Return the model whose layers can be replaced, from inside ``torch.compile``.

    Raises
    ------
    FormatError
        For a model in DDP, which remembers the parameters that it was made with.
    """
    if isinstance(getattr(model, "_orig_mod", model), nn.parallel.DistributedDataParallel):
        raise format_error(
            "a model inside DistributedDataParallel, which goes on with its old parameters",
            "the model itself",
            "replace its layers first, then wrap it",
        )
    return unwrapped(model)
