"""What `cca` keeps of a network for all its pairs, and the arrays and sentences of one pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynprobe.analyzers import OptionError
from dynprobe.analyzers._cca_notes import NAMED, Sizes, announce, fewer_components
from dynprobe.analyzers._similarity import common_layers, effects_of_deletions, same_layer, stimulus_blocks
from dynprobe.analyzers.core.activations import Activations
from dynprobe.analyzers.numerics.activations import non_finite
from dynprobe.analyzers.numerics.canonical import Components, Space, space
from dynprobe.analyzers.numerics.canonical_original import original_pwcca
from dynprobe.analyzers.numerics.canonical_pairs import (
    STATISTICS,
    Comparison,
    comparable,
    compare,
    exchangeable,
    work,
)

Floats = NDArray[np.float64]

CROWDED = 5
"""Samples per dimension below which a note says that there are few."""


@dataclass(frozen=True)
class Network:
    """The layers of one network, each reduced once; `values` only where the original PWCCA asks for them."""

    names: list[str]
    treatment: list[str]
    n_features: list[int]
    spaces: list[Space | None]
    values: list[Tensor]
    notes: list[str]

    @property
    def rank(self) -> NDArray[np.int64]:
        """Numerical rank by layer, 0 for a constant layer."""
        return np.array([s.rank if s is not None else 0 for s in self.spaces])

    @property
    def components(self) -> NDArray[np.int64]:
        """Components that SVCCA keeps, by layer."""
        return np.array([s.components if s is not None else 0 for s in self.spaces])


def reduce_network(
    activations: Activations,
    recorded: Mapping[str, str],
    components: Components,
    *,
    blocks: int,
    seed: int,
    force: bool,
    keep_values: bool,
) -> Network:
    """Records a network and reduces every layer to its numerical rank.

    Args:
        activations: Of one checkpoint.
        recorded: `layers`, `maps`, `sequences` as typed.
        components: What SVCCA keeps.
        blocks: Of stimuli for the jackknife, 0 for none.
        seed: Of the blocks.
        force: Keep what refused correlations need as well.
        keep_values: Also keep the activations themselves.
    """
    found = activations.features(**recorded)
    block = torch.as_tensor(stimulus_blocks(activations.n_samples, seed, max(blocks, 1)))
    spaces: list[Space | None] = []
    notes = []
    for name, layer in found.items():
        if bad := non_finite(layer.values):
            spaces.append(None)
            notes.append(f"{activations.label}: {name} holds {bad}, so NaN")
            continue
        eps = layer.eps or torch.finfo(layer.values.dtype).eps
        spaces.append(space(layer.values, layer.sample, block, components, eps=eps, force=force))
        if spaces[-1] is None:
            notes.append(f"{activations.label}: {name} is constant over the samples, so NaN")
    if components.count is not None:
        ranks = [s.rank if s is not None else 0 for s in spaces]
        notes += fewer_components(activations.label, list(found), ranks, components.count)
    return Network(
        list(found),
        [layer.treatment for layer in found.values()],
        [layer.values.shape[1] for layer in found.values()],
        spaces,
        [layer.values for layer in found.values()] if keep_values else [],
        notes,
    )


class Pair:
    """Two networks layer by layer.

    Args:
        a: The first network.
        b: The second.
        labels: What messages call them.
        force: Whether correlations count that are 1 whatever the data.
    """

    def __init__(self, a: Network, b: Network, labels: tuple[str, str], *, force: bool) -> None:
        self.a, self.b, self.labels, self._force = a, b, labels, force
        self.shape = (len(a.names), len(b.names))
        self.notes = [*a.notes, *(note for note in b.notes if note not in a.notes)]
        self.alive = np.zeros(self.shape, dtype=bool)
        self.n_rows = np.zeros(self.shape, dtype=int)
        self.smallest = np.zeros(self.shape, dtype=int)
        self.forced = np.full(self.shape, np.nan)
        for i, j, one, two in self._pairs():
            self.alive[i, j] = comparable(one, two) and self._same_grid(i, j)
            if self.alive[i, j]:
                self.n_rows[i, j] = one.n_rows
                self.smallest[i, j] = one.n_rows - (max(one.rows) if len(one.rows) > 1 else 0)
                self.forced[i, j] = max(0, one.rank + two.rank - (one.n_rows - 1))
            else:
                self._cannot_compare(i, j)
        self._check_few()

    def _pairs(self) -> Iterator[tuple[int, int, Space, Space]]:
        for i, one in enumerate(self.a.spaces):
            for j, two in enumerate(self.b.spaces):
                if one is not None and two is not None:
                    yield i, j, one, two

    def _same_grid(self, i: int, j: int) -> bool:
        """Whether positions are those of one grid: 2 × 8 are not 4 × 4."""
        treatments = self.a.treatment[i], self.b.treatment[j]
        return treatments[0] == treatments[1] or not all("positions" in t for t in treatments)

    def _sizes(self, statistic: str) -> Sizes:
        names, components = (self.a.names, self.b.names), statistic == "svcca"
        kept = (self.a.components, self.b.components)
        sizes = kept if components else (self.a.rank, self.b.rank)
        return Sizes(names, sizes, self.n_rows, components=components)

    def _cannot_compare(self, i: int, j: int) -> None:
        note = (
            "layers with other rows cannot be compared, so NaN: "
            f"{self.a.names[i]} ({self.a.treatment[i]}) with {self.b.names[j]} ({self.b.treatment[j]})"
        )
        if not any(known.startswith(note[:30]) for known in self.notes):
            self.notes.append(f"{note}, for example")

    def full(self, statistic: str, left_out: bool = False) -> NDArray[np.bool_]:
        """Where the subspaces fill all that so many rows can span; with a block left out on request."""
        kind = "components" if statistic == "svcca" else "rank"
        sizes = getattr(self.a, kind)[:, None] + getattr(self.b, kind)[None]
        n = self.smallest if left_out else self.n_rows
        filled: NDArray[np.bool_] = self.alive & (sizes >= n - 1)
        return filled & (statistic != "procrustes")

    def check(self, statistic: str) -> None:
        """Notes what is refused.

        Raises:
            OptionError: If nothing is left of the statistic that was asked for.
        """
        n_pairs = int(self.alive.sum())
        for name in ("mean_rho", "svcca"):
            full = self.full(name)
            if full.any() and not self._force:
                self.notes.append(self._sizes(name).refusal(full, n_pairs))
        full = self.full(statistic)
        if not self._force and n_pairs and (full == self.alive).all():
            others = "" if statistic == "svcca" or self.full("svcca").all() else "; or --statistic svcca"
            raise OptionError(
                f"{self.labels[0]} with {self.labels[1]}: {self._sizes(statistic).refusal(full, n_pairs)}.",
                "Give more samples (--samples, or 5 to 10 per dimension if there are so many); average maps "
                f"(--maps average); fewer components (--threshold, --components) with svcca{others}; or "
                "--force.",
            )

    def _check_few(self) -> None:
        rank = np.maximum(self.a.rank[:, None], self.b.rank[None])
        few = self.alive & (CROWDED * rank > self.n_rows)
        few &= self._force | ~self.full("mean_rho")
        if few.any():
            self.notes.append(self._sizes("mean_rho").few(few))
        if self._force and (self.forced > 0).any():
            self.notes.append(self._sizes("mean_rho").forced(self.forced))

    def compared(self, permutations: int, seed: int) -> Comparison:
        """All statistics, NaN where they are refused or, with a block left out, would be."""
        announce(work(self.a.spaces, self.b.spaces, permutations, self._force))
        found = compare(self.a.spaces, self.b.spaces, permutations=permutations, seed=seed, force=self._force)
        found.rho[~self.alive] = np.nan
        for name in STATISTICS:
            missing = ~self.alive | (self.full(name) & (not self._force))
            for arrays in (found.value, found.deleted, found.chance):
                if name in arrays:
                    arrays[name][missing] = np.nan
            if name in found.deleted:
                found.deleted[name][self.full(name, left_out=True)] = np.nan
        if not permutations:
            self.notes.append("no chance levels but of mean ρ² without permutations (--chance-permutations)")
        elif fixed := [self.a.names[i] for i, j, one, _two in self._pairs() if self._stays(i, j, one)]:
            self.notes.append(
                f"no chance levels for {len(fixed)} pairs of layers, as of {fixed[0]}: too many samples have "
                "a number of rows of their own, and cannot change places with another"
            )
        self._closed_form(found)
        self._note_errors(found)
        return found

    def _stays(self, i: int, j: int, one: Space) -> bool:
        return bool(self.alive[i, j]) and not exchangeable(one)

    def _closed_form(self, found: Comparison) -> None:
        """The mean of mean ρ² over all permutations of rows, r_a r_b/((n − 1) min(r_a, r_b))."""
        chance = found.chance.setdefault("mean_rho_squared", np.full(self.shape, np.nan))
        for i, j, one, two in self._pairs():
            if self.alive[i, j] and not one.lengths and np.isfinite(found.value["mean_rho_squared"][i, j]):
                chance[i, j] = max(one.rank, two.rank) / (one.n_rows - 1)

    def _note_errors(self, found: Comparison) -> None:
        if not found.deleted:
            self.notes.append("no standard errors without blocks to leave out (--jackknife-blocks)")
            return
        for name in ("mean_rho", "svcca"):
            lost = np.isfinite(found.value[name]) & self.full(name, left_out=True)
            if lost.any():
                self.notes.append(self._sizes(name).no_error(lost, self.smallest))

    def use_original(self, found: Comparison) -> None:
        """Puts the published code's number in the place of the paper's PWCCA, without error or chance."""
        for name in ("pwcca_a", "pwcca_b", "pwcca"):
            for arrays in (found.value, found.deleted, found.chance):
                if name in arrays:
                    arrays[name][:] = np.nan
        broken = 0
        for i, j, _one, _two in self._pairs():
            if not np.isfinite(found.value["mean_rho"][i, j]):
                continue
            x, y = (v.double().cpu().numpy() for v in (self.a.values[i], self.b.values[j]))
            number, first = original_pwcca(x, y)
            broken += not np.isfinite(number)
            found.value["pwcca_a" if first else "pwcca_b"][i, j] = found.value["pwcca"][i, j] = number
        self.notes.append(
            "PWCCA as the published code computes it: it depends on the order, the shift and the signs of "
            "neurons; it has neither an error nor a chance level here"
        )
        dependent = [
            f"{name} (rank {rank} of {features})"
            for network in (self.a, self.b)
            for name, rank, features in zip(network.names, network.rank, network.n_features, strict=True)
            if rank < features
        ]
        if dependent:
            listed = ", ".join(list(dict.fromkeys(dependent))[:NAMED])
            self.notes.append(
                "the published code's PWCCA is arbitrary, as rounding decides it, where neurons are dead or "
                f"depend on others, as in {listed}"
            )
        if broken:
            self.notes.append(
                f"the published code's PWCCA fails for {broken} pairs of layers whose neurons are linearly "
                "dependent, so NaN"
            )

    def arrays(self, found: Comparison, statistic: str, seed: int) -> dict[str, Any]:
        """Every variable of the pair by its declared name."""
        values: dict[str, Any] = {**_labels("a", self.a), **_labels("b", self.b), "forced": self.forced}
        values |= {"component": np.arange(1, found.rho.shape[-1] + 1), "rho": found.rho}
        nothing = np.full(self.shape, np.nan)
        for name in STATISTICS:
            values[name] = found.value[name]
            values[f"{name}_stderr"] = _stderr(found.deleted[name]) if found.deleted else nothing
            if name not in ("pwcca_a", "pwcca_b"):
                values[f"{name}_chance"] = found.chance.get(name, nothing)
        values["procrustes_distance"] = _angle(found.value["procrustes"])
        deleted = found.deleted.get("procrustes")
        values["procrustes_distance_stderr"] = _stderr(_angle(deleted)) if deleted is not None else nothing
        effect = np.full((*self.shape, 1), np.nan)
        if found.deleted:
            effect = effects_of_deletions(found.deleted[statistic])
            values |= self._effects(effect)
        share, error = same_layer(found.value[statistic], effect, self.a.names, self.b.names, seed)
        if self.full(statistic).any() and not self._force:
            # the best of what is left would be taken for the best of all
            share, error = np.nan, np.nan
            self.notes.append(f"no same_layer: {statistic} is refused for some pairs of layers")
        return values | {"same_layer": share, "same_layer_stderr": error}

    def _effects(self, effect: Floats) -> dict[str, Any]:
        names = common_layers(self.a.names, self.b.names)
        if not names:
            return {}
        rows = [effect[self.a.names.index(name), self.b.names.index(name)] for name in names]
        return {"layer": np.array(names, dtype=object), "block_effect": np.array(rows, dtype=np.float32)}


def _labels(side: str, network: Network) -> dict[str, Any]:
    return {
        f"layer_{side}": np.array(network.names, dtype=object),
        f"treatment_{side}": np.array(network.treatment, dtype=object),
        f"n_features_{side}": np.array(network.n_features),
        f"rank_{side}": network.rank,
        f"k_{side}": network.components,
    }


def _stderr(deleted: Floats) -> Floats:
    """Standard error from the statistic with each block left out."""
    error: Floats = np.sqrt((effects_of_deletions(deleted) ** 2).sum(-1))
    return error


def _angle(similarity: Floats) -> Floats:
    """Radians; rounding may leave a similarity of 1 a little above it."""
    angle: Floats = np.arccos(np.clip(similarity, -1.0, 1.0))
    return angle
