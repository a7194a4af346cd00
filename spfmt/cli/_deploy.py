"""A trained network to files: sparse weights as safetensors, the network as ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from spfmt.cli._network import HIDDEN, PIXELS
from spfmt.convert import convert
from spfmt.errors import SpfmtError
from spfmt.formats import SparseTensor, load
from spfmt.onnx import export
from spfmt.torch import SparseModule

__all__ = ["Deployed", "Mismatch", "deploy"]

INPUT, OUTPUT = "pixels", "logits"


class Mismatch(SpfmtError):
    """Two ways to compute the same thing gave different answers."""


@dataclass(frozen=True)
class Deployed:
    """A network and its files.

    Attributes
    ----------
    model : nn.Sequential
        As it was exported: its sparse weights come from the saved files.
    onnx : Path
    weights : tuple of Path
        One safetensors file per sparse layer; none of the dense network.
    tensors : tuple of SparseTensor
        What is in them.
    """

    model: nn.Sequential
    onnx: Path
    weights: tuple[Path, ...]
    tensors: tuple[SparseTensor, ...]

    @property
    def density(self) -> float:
        """Stored weights over all weights of the sparse layers; 1 without any."""
        if not self.tensors:
            return 1.0
        sizes = [tensor.matrix_shape[0] * tensor.matrix_shape[1] for tensor in self.tensors]
        return sum(tensor.nnz for tensor in self.tensors) / sum(sizes)


def deploy(
    model: nn.Sequential, name: str, folder: Path, layers: Sequence[str] = HIDDEN
) -> Deployed:
    """Take every sparse weight through conversion and a file, then export the network.

    Parameters
    ----------
    model : nn.Sequential
        Trained; its sparse layers take structure and values from the files.
    name : str
        Stem of the files.
    folder : Path
    layers : sequence of str
        Those that may be sparse.

    Raises
    ------
    Mismatch
        Where a weight is not the same after its way.
    """
    paths, tensors = [], []
    for layer_name in layers:
        layer = model.get_submodule(layer_name)
        if isinstance(layer, SparseModule):
            path = folder / f"{name}.{layer_name}.safetensors"
            tensor = _through_file(_through_csr(layer), path)
            layer.set_structure(tensor, take_values=True)
            paths.append(path)
            tensors.append(tensor)
    target = folder / f"{name}.onnx"
    example = torch.zeros(2, PIXELS)
    export(model, (example,), target, input_names=[INPUT], output_names=[OUTPUT])
    return Deployed(model, target, tuple(paths), tuple(tensors))


def _through_csr(layer: SparseModule) -> SparseTensor:
    """Return the layer's weight after the way to CSR and back to its format."""
    tensor = layer.tensor()
    back: SparseTensor = convert(convert(tensor, "csr"), layer.format, **layer.format_params)
    if back.nnz != tensor.nnz or not np.array_equal(back.to_dense(), tensor.to_dense()):
        raise Mismatch(
            f"got {back!r} after converting {tensor!r} to CSR and back; expected the same weight; "
            "please report this"
        )
    return tensor


def _through_file(tensor: SparseTensor, path: Path) -> SparseTensor:
    tensor.save(path, metadata={"made_by": "spfmt demo"})
    loaded = load(path)
    if loaded != tensor:
        raise Mismatch(f"got {loaded!r} from {path}; expected {tensor!r}; please report this")
    return loaded
