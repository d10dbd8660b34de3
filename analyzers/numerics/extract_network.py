"""Make a layered network that can be analysed from a model, by following its forward pass for one input."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from scipy.special import expit, log_expit, log_softmax, softmax
from torch import Tensor, nn

from dynprobe.analyzers.numerics.activation_rules import ACTIVATION_RULES
from dynprobe.analyzers.numerics.affine_form import Affine
from dynprobe.analyzers.numerics.evaluate import call
from dynprobe.analyzers.numerics.layered_network import Floats, Layer, LayeredNetwork, Matrix, as_matrix
from dynprobe.analyzers.numerics.linear_rules import LINEAR_RULES
from dynprobe.analyzers.numerics.params import frozen_eval, private_copy, set_eval
from dynprobe.analyzers.numerics.traced_call import Dropped, Refused, Undecidable
from dynprobe.analyzers.numerics.traced_forward import AsFloat64, Refusal, Tracer

# Largest difference from the model's own forward pass in float64, relative to its largest output.
_TOLERANCE = 1e-9
_N_RANDOM, _N_CORNERS = 16, 16
# How far beyond the range of the data half of the corners lie, as a part of it.
_BEYOND = 0.1
_BATCH = 256


class UnsupportedNetwork(ValueError):
    """The model cannot be written as affine maps and activations of single neurons; the text says why."""


@dataclass(frozen=True)
class Extracted:
    """A model as a layered network.

    Args:
        network: Of the flattened input.
        dropped: What the model does to the outputs of `network` in the end, and which does not change which
            class it decides for; a single output after a sigmoid is decided at zero before it.
    """

    network: LayeredNetwork
    dropped: Dropped = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The module that each layer was made of."""
        return tuple(layer.name for layer in self.network.layers)

    def __call__(self, points: Floats) -> Floats:
        """What the model gives, (n_points, n_outputs), with what was dropped."""
        outputs = self.network(points)
        if self.dropped == "softmax":
            return np.asarray(softmax(outputs, axis=1))
        if self.dropped == "log_softmax":
            return np.asarray(log_softmax(outputs, axis=1))
        if self.dropped == "sigmoid":
            return np.asarray(expit(outputs))
        return np.asarray(log_expit(outputs)) if self.dropped == "log_sigmoid" else outputs


def extract(model: nn.Module, example: Tensor, *, check: Tensor | None = None) -> Extracted:
    """Write a model as affine maps and activations of single neurons, in float64.

    The forward pass is followed at the level of aten operations, in eval mode, so that it does not matter how
    the model is written. Affine operations (linear and convolution layers, batch norm, average pooling,
    residual sums, rearrangements) are folded to one matrix per pair of layers; ReLU-like activations, clamps,
    absolute values, maxima and max pooling are written with neurons of two slopes, exactly; tanh and the
    sigmoid stay. A last softmax, log-softmax or (log-)sigmoid is dropped. Everything else is refused.

    The result is then compared with the forward pass of a float64 copy of the model.

    Args:
        model: Not changed; on any device and of any floating-point dtype.
        example: One input, (1, …), of a floating-point dtype. Which one does not matter.
        check: Inputs of the data, (n, …), to compare on; random ones within their range (without them, the
            surroundings of the example), at its corners and a little beyond are always compared.

    Raises:
        UnsupportedNetwork: It cannot be written so, or does not compute what its operations say.
        ValueError: The example is not a single input.
    """
    _require_numbers(example)
    if not len(example.shape) or example.shape[0] != 1:
        raise ValueError(f"the example must be one input, (1, …), not of shape {tuple(example.shape)}")
    # what is infinite or NaN is found by the comparison
    with torch.random.fork_rng(devices=[]), torch.no_grad(), np.errstate(all="ignore"):
        twin = _float64_copy(model)
        extracted = _followed(twin, _float64(example))
        require_agreement(extracted, twin, _check_inputs(_float64(example), check))
    return extracted


def require_agreement(extracted: Extracted, model: nn.Module, inputs: Tensor) -> None:
    """Compare what is analysed with what a model computes, both in float64.

    Args:
        extracted: The analysed layers.
        model: With float64 parameters, in eval mode, on the CPU.
        inputs: float64, (n, …).

    Raises:
        UnsupportedNetwork: They differ by more than rounding.
    """
    # Alone as well: what depends on the whole batch, such as its mean, must not be taken for a constant.
    for compared, batch_size in ((inputs, _BATCH), (inputs[-_N_RANDOM:], 1)):
        _require_same(extracted, model, compared, batch_size)


def _require_same(extracted: Extracted, model: nn.Module, inputs: Tensor, batch_size: int) -> None:
    n = len(inputs)
    try:
        with AsFloat64():  # type: ignore[no-untyped-call]
            expected = _outputs(model, inputs, batch_size)
    except Exception as error:
        raise UnsupportedNetwork(
            f"the model can be run on one input but not on {n} together: {_first_line(error)}"
        ) from error
    found = extracted(inputs.reshape(n, -1).numpy())
    if expected.shape != found.shape:
        raise UnsupportedNetwork(
            f"the model gives {found.shape[1]} numbers for one input but {expected.size} for {n} together"
        )
    difference = np.abs(found - expected).max(1)
    if not np.isfinite(difference).all():
        raise UnsupportedNetwork("the model gives NaN or infinite outputs")
    worst = int(difference.argmax())
    if difference[worst] > _TOLERANCE * np.abs(expected).max():
        raise UnsupportedNetwork(
            f"the analysed layers differ from what the network computes (by {difference[worst]:.2g} at input "
            f"{worst} of {n} compared): does its forward depend on the data, or on chance?"
        )


def deviation(network: LayeredNetwork | Extracted, model: nn.Module, inputs: Tensor) -> float:
    """Largest difference between a model, in its own dtype and on its own device, and what is analysed.

    With an `Extracted` whose last softmax or sigmoid was dropped, probabilities are compared; a network is
    compared as it is.

    Args:
        network: In float64.
        model: Not changed.
        inputs: (n, …), of any dtype and on any device; that they are rounded to the model's dtype counts too.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    moved = inputs if parameter is None else inputs.to(parameter.device, parameter.dtype)
    with frozen_eval(model), torch.no_grad():
        expected = _outputs(model, moved)
    found = network(inputs.detach().cpu().double().reshape(len(inputs), -1).numpy())
    return float(np.abs(found - expected).max())


def _followed(model: nn.Module, example: Tensor) -> Extracted:
    tracer = Tracer({**LINEAR_RULES, **ACTIVATION_RULES}, example)
    try:
        with AsFloat64():  # type: ignore[no-untyped-call]
            call(model, example.clone())
    except Exception as error:
        raise UnsupportedNetwork(f"the model cannot be run in float64: {_first_line(error)}") from error
    try:
        with tracer.naming(model), tracer:
            outputs = call(model, example)
    except Undecidable as error:
        raise UnsupportedNetwork(str(error)) from error
    try:
        outcome = tracer.outcome(outputs)
    except Refused as error:
        raise UnsupportedNetwork(f"the outputs: {error}") from error
    if isinstance(outcome, Refusal) and outcome.outputs is None:
        raise UnsupportedNetwork(outcome.message)
    if outputs.ndim > 2 or (outputs.ndim and outputs.shape[0] != 1):
        raise UnsupportedNetwork(
            f"the model gives outputs of shape {tuple(outputs.shape)} for one input; "
            "only (1, n_outputs) can be analysed"
        )
    if isinstance(outcome, Affine):
        return _finished(example.numel(), tracer.layers, outcome)
    assert outcome.outputs is not None
    return replace(_finished(example.numel(), tracer.layers, outcome.outputs), dropped=outcome.dropped)


def _finished(n_inputs: int, layers: Sequence[Layer], outputs: Affine) -> Extracted:
    if (last := _last_sigmoid(layers, outputs)) is not None:
        final = replace(layers[last - 1], activation=None)
        return Extracted(_connected(n_inputs, layers, final), "sigmoid")
    parts = outputs.parts or {0: np.zeros((len(outputs), n_inputs))}
    final = Layer(tuple(parts.items()), outputs.constant, None, "outputs")
    return Extracted(_connected(n_inputs, layers, final))


def _last_sigmoid(layers: Sequence[Layer], outputs: Affine) -> int | None:
    """The layer that the outputs are, if its activation is the sigmoid."""
    if len(outputs.parts) != 1 or outputs.constant.any():
        return None
    ((j, matrix),) = outputs.parts.items()
    activation = layers[j - 1].activation if j else None
    if activation is None or activation.kind != "sigmoid":
        return None
    n = layers[j - 1].n_neurons
    is_identity = matrix.shape == (n, n) and not abs(matrix - sparse.eye(n)).max()
    return j if is_identity else None


def _connected(n_inputs: int, layers: Sequence[Layer], final: Layer) -> LayeredNetwork:
    """Only the layers that the last one depends on, with zero matrices left out."""
    cleaned = [_cleaned(layer) for layer in (*layers, final)]
    needed = {len(cleaned)}
    for i in range(len(cleaned), 0, -1):
        if i in needed:
            needed |= {j for j, _ in cleaned[i - 1].sources if j}
    number = {0: 0} | {i: k + 1 for k, i in enumerate(sorted(needed))}
    return LayeredNetwork(
        n_inputs,
        tuple(
            replace(layer, sources=tuple((number[j], matrix) for j, matrix in layer.sources))
            for i, layer in enumerate(cleaned, 1)
            if i in needed
        ),
    )


def _cleaned(layer: Layer) -> Layer:
    used = [(j, matrix) for j, matrix in layer.sources if _without_zeros(matrix)]
    kept = used or layer.sources[:1]
    return replace(layer, sources=tuple((j, as_matrix(matrix)) for j, matrix in kept))


def _without_zeros(matrix: Matrix) -> int:
    """Number of entries that are not zero; those of sparse ones that are stored are removed."""
    if not sparse.issparse(matrix):
        return int(np.count_nonzero(matrix))
    matrix.eliminate_zeros()
    return int(matrix.nnz)


def _float64_copy(model: nn.Module) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, when it copies an exported program
            twin = private_copy(model)
        set_eval(twin)
        return twin.to("cpu").double()
    except (RuntimeError, TypeError) as error:
        raise UnsupportedNetwork(f"the model cannot be copied: {_first_line(error)}") from error


def _float64(inputs: Tensor) -> Tensor:
    return inputs.detach().cpu().double().clone(memory_format=torch.contiguous_format)


def _require_numbers(example: object) -> None:
    if not isinstance(example, Tensor):
        raise UnsupportedNetwork("the model takes several inputs; only one tensor of numbers can be analysed")
    if not example.is_floating_point():
        raise UnsupportedNetwork(
            f"the inputs are of type {example.dtype}, such as tokens or categories; only real numbers can be "
            "analysed"
        )


def _check_inputs(example: Tensor, check: Tensor | None) -> Tensor:
    """Given inputs, and random ones at corners of their range, a little beyond, and within it."""
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(_N_RANDOM, *example.shape[1:], generator=generator, dtype=torch.float64)
    if check is None or len(check) < 2:
        given = example if check is None else torch.cat([example, _float64(check)])
        size = example.abs().max().clamp(min=1.0)
        low, high = example - size, example + size
    else:
        given = _float64(check)
        low, high = given.amin(0, keepdim=True), given.amax(0, keepdim=True)
    shape = (_N_CORNERS, *example.shape[1:])
    corners = torch.rand(shape, generator=generator, dtype=torch.float64).round()
    corners[::2] = corners[::2] * (1 + 2 * _BEYOND) - _BEYOND
    return torch.cat([given, *(low + (high - low) * share for share in (corners, random))])


def _outputs(model: nn.Module, inputs: Tensor, batch_size: int = _BATCH) -> Floats:
    """What a model gives, (n, n_outputs), in float64 on the CPU; inputs it writes over are copies."""
    parts = []
    for part in torch.split(inputs, batch_size):
        found = call(model, part.clone()).detach().cpu().double()
        # Outputs of a single input may have lost their first dimension, as by a last `squeeze`.
        n = found.shape[0] if found.ndim and len(part) > 1 else 1
        parts.append(found.reshape(n, -1))
    return torch.cat(parts).numpy()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
