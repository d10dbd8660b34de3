"""CKA between the layers of two networks, with a jackknife over the samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynprobe.analyzers.numerics.hsic import Kernels, products, without_one

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """What two networks share.

    Attributes:
        value: CKA, (n_layers_a, n_layers_b).
        stderr: Its jackknife standard error over samples; NaN where leaving one out leaves nothing.
        effect: Sum over the samples of each block of their part in it, (n_layers_a, n_layers_b, n_blocks):
            the squares over samples, or about so over blocks, sum to stderr².
        total: T, in the units of the kernels.
    """

    value: Floats
    stderr: Floats
    effect: Floats
    total: Floats


def compare(a: Kernels, b: Kernels, blocks: Tensor, sample: Tensor | None = None) -> Comparison:
    """CKA = T_ab/√(T_aa T_bb) of every layer of a with every layer of b; its sign is kept.

    The error is the jackknife's: each row is left out in turn and the rest centred anew. It counts twice what
    pairs of samples add to the variance (Efron and Stein), so it is an upper estimate: about √2 times
    too large where that part prevails, as for unrelated or very wide layers. Rows of one sample (positions,
    tokens) are not independent: their parts are summed to one per sample first.

    Args:
        a: Layers of one network.
        b: Of the other, on the same rows.
        blocks: Block of every sample, (n_samples,).
        sample: Sample of every row, (n_rows,); None where row i is sample i.

    References:
        Kornblith, Norouzi, Lee and Hinton, "Similarity of Neural Network Representations Revisited", ICML
        2019, eq. 4. Song, Smola, Gretton, Bedo and Borgwardt, "Feature Selection via Dependence
        Maximization", JMLR 13 (2012), eq. 5. Efron and Stein, "The jackknife estimate of variance", Annals
        of Statistics 9 (1981).
    """
    n, n_blocks = a.n_rows, int(blocks.max()) + 1
    blocks = blocks.to(a.row.device)
    own_a, own_b = _own(a), _own(b)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("value", "stderr", "effect", "total")}
    for index, (total, row) in enumerate(products(a, b)):
        diagonal = a.diagonal[:, [index]] * b.diagonal
        deleted = without_one(total, row.double(), diagonal, n, unbiased=a.unbiased)
        deleted = deleted / (own_a[:, [index]] * own_b).sqrt()
        effect = (deleted.mean(0) - deleted) * np.sqrt((n - 1) / n)
        if sample is not None:
            n_samples = len(blocks)
            clustered = effect.new_zeros(n_samples, effect.shape[1]).index_add_(
                0, sample.to(effect.device), effect
            )
            effect = clustered * np.sqrt(n_samples / (n_samples - 1))
        parts["value"].append(total / (a.total[index] * b.total).sqrt())
        parts["stderr"].append(effect.square().sum(0).sqrt())
        parts["effect"].append(effect.new_zeros(n_blocks, effect.shape[1]).index_add_(0, blocks, effect).T)
        parts["total"].append(total)
    return Comparison(**{name: torch.stack(part).cpu().numpy() for name, part in parts.items()})


def _own(kernels: Kernels) -> Tensor:
    """T of each layer with itself without each row; NaN where that is nothing but rounding."""
    n = kernels.n_rows
    deleted = without_one(kernels.total, kernels.row, kernels.diagonal**2, n, unbiased=kernels.unbiased)
    noise = 100 * torch.finfo(kernels.dtype).eps * kernels.total
    # three samples, U-centred, are zero whatever they were
    return deleted.where((deleted > noise) & (n > (4 if kernels.unbiased else 2)), torch.nan)
