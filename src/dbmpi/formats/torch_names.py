"""Names of a network's parameters in a ``state_dict`` of PyTorch."""

from __future__ import annotations

from dbmpi.errors import UserError
from dbmpi.index.layout import Tensor
from dbmpi.network.dense import DenseLayer
from dbmpi.network.description import Network
from dbmpi.network.field import ConvolutionLayer

_SUFFIXES = {"weights": "weight", "bias": "bias"}


def torch_names(network: Network) -> dict[str, Tensor]:
    """Return the parameters by the names that they have in PyTorch, e.g. ``dense1.weight``.

    Weights of a dense layer are those of ``torch.nn.Linear``, (units, inputs), and of a convolution those of
    ``torch.nn.Conv2d``, (maps, channels, rows, columns); so nothing is moved.

    Parameters
    ----------
    network
        Of layers that PyTorch has.

    Raises
    ------
    UserError
        If it has parameters that no module of PyTorch has.
    """
    names: dict[str, Tensor] = {}
    for layer in network.layers:
        for short, tensor in layer.tensors.items():
            # (A class of the user's own that inherits from one of these may compute something else.)
            if type(layer) not in (DenseLayer, ConvolutionLayer) or short not in _SUFFIXES:
                raise UserError(
                    f"{tensor.name}: PyTorch has no module with such a parameter; leave --names torch, in Python "
                    "names='torch', out to write all arrays under dbmpi's own names"
                )
            names[f"{layer.name}.{_SUFFIXES[short]}"] = tensor
    return names
