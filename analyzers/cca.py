"""Canonical correlations between layers of two networks: mean ρ, SVCCA, PWCCA and Procrustes similarity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from dynprobe.analyzers import Measurement, OptionError, Range, Setting, Var, analyzer
from dynprobe.analyzers._cca import Network, Pair, reduce_network
from dynprobe.analyzers._sampling import check_seed, subset_note
from dynprobe.analyzers._similarity import SUMMARY_RETURNS, summary
from dynprobe.analyzers._similarity_figure import similarity_figure
from dynprobe.analyzers.core.activations import Activations, as_activations, check_comparable
from dynprobe.analyzers.core.result import Result
from dynprobe.analyzers.numerics.canonical import Components

GIGABYTE = 1e9
LAYERS = ("layer_a", "layer_b")

MAIN = {
    "mean_rho": "Mean canonical correlation",
    "mean_rho_squared": "Mean squared canonical correlation",
    "svcca": "SVCCA: mean canonical correlation of the leading principal components",
    "pwcca": "PWCCA, mean of both sides",
    "procrustes": "Procrustes similarity",
}
ERROR = "Standard error over stimuli (first-order jackknife over blocks)"
LABELS = {"mean_rho": "mean ρ", "mean_rho_squared": "mean ρ²", "svcca": "SVCCA", "pwcca": "PWCCA"}


def _layers(what: str, error: str = "", units: str = "") -> Var:
    return Var(LAYERS, units, what, error)


def _side(what: str, side: str) -> Var:
    return Var((f"layer_{side}",), "", f"{what}, {'first' if side == 'a' else 'second'} network")


def _returns() -> dict[str, Var]:
    found = {}
    for name, what in MAIN.items():
        found[name] = _layers(f"{what}; 1 for equal representations", f"{name}_stderr")
        found[f"{name}_stderr"] = _layers(ERROR)
        exact = " (closed form)" if name == "mean_rho_squared" else ", mean over permutations"
        found[f"{name}_chance"] = _layers(f"The same of unrelated rows{exact}")
    for side in "ab":
        whose = "first" if side == "a" else "second"
        found[f"pwcca_{side}"] = _layers(f"PWCCA weighted by the {whose} network", f"pwcca_{side}_stderr")
        found[f"pwcca_{side}_stderr"] = _layers(ERROR)
        found[f"layer_{side}"] = _side("Layer", side)
        found[f"n_features_{side}"] = _side("Features", side)
        found[f"rank_{side}"] = _side("Numerical rank", side)
        found[f"k_{side}"] = _side("Principal components kept by SVCCA", side)
        found[f"treatment_{side}"] = _side("What became of maps and sequences", side)
    return found | {
        "procrustes_distance": _layers(
            "Angle of the Procrustes similarity", "procrustes_distance_stderr", "rad"
        ),
        "procrustes_distance_stderr": _layers("Standard error over stimuli", "", "rad"),
        "rho": Var((*LAYERS, "component"), "", "Canonical correlation, largest first"),
        "component": Var(("component",), "", "Canonical component"),
        "forced": _layers("Correlations that are 1 whatever the data"),
        "same_layer": Var(
            (), "", "Layers whose best match has the same name, as a fraction", "same_layer_stderr"
        ),
        "same_layer_stderr": Var((), "", "Its standard error over stimuli"),
        "layer": Var(("layer",), "", "Layer of both networks", "", optional=True),
        "block_effect": Var(
            ("layer", "block"), "", "Effect of a block of stimuli on the statistic", "", True
        ),
        "n_samples": Var((), "", "Samples"),
        "input_hash": Var((), "", "Hash of the inputs and their order"),
    }


def _statistic(result: Result) -> str:
    return str((result.attributes.get("options") or {}).get("statistic", "pwcca"))


def _summary(result: Result) -> Mapping[str, Any]:
    return summary(_statistic(result))(result)


def _draw(result: Result, figure: Any, style: str = "") -> None:
    statistic = _statistic(result)
    original = (result.attributes.get("options") or {}).get("pwcca") == "original"
    code = " (published code)" if original and statistic == "pwcca" else ""
    similarity_figure(statistic, LABELS[statistic] + code)(result, figure, style)


def _under(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"matrix": str(options.get("statistic", "pwcca"))}


def _cost(options: Mapping[str, Any], n_checkpoints: int) -> dict[str, int]:
    del options, n_checkpoints
    return {"forwards": 1}


@analyzer(
    returns=_returns(),
    figure=_draw,
    table=("pwcca", "pwcca_chance", "svcca", "svcca_chance", "mean_rho", "same_layer"),
    matrix="pwcca",
    under=_under,
    cost=_cost,
    summary=_summary,
    summary_returns=SUMMARY_RETURNS,
    summary_of="call",
)
def cca(
    activations_a: Any,
    activations_b: Any,
    *,
    threshold: Annotated[float, Range(min=0, max=1)] = 0.99,
    sv: Literal["variance", "sigma"] = "variance",
    components: Annotated[int | None, Range(min=1)] = None,
    pwcca: Literal["paper", "original"] = "paper",
    statistic: Literal["mean_rho", "mean_rho_squared", "svcca", "pwcca"] = "pwcca",
    jackknife_blocks: Annotated[int, Range(min=0)] = 10,
    chance_permutations: Annotated[int, Range(min=0)] = 20,
    force: bool = False,
    layers: str = "auto",
    maps: Literal["average", "flatten", "positions"] = "average",
    sequences: Literal["last", "mean", "first", "flatten", "per-step", "token"] = "mean",
    memory: Annotated[float, Range(min=0), Setting()] = 4.0,
    permutations: Annotated[int, Range(min=1), Setting()] = 10_000,
    bootstrap: Annotated[int, Range(min=2), Setting()] = 2000,
    level: Annotated[float, Range(min=0, max=1), Setting()] = 0.9,
    seed: int = 0,
) -> Measurement:
    """Canonical correlations between layers of two networks: mean ρ, SVCCA, PWCCA and Procrustes similarity.

    ρ are the cosines of the principal angles between the spaces that two layers' centred features span over
    the samples: singular values of U_a'U_b, U orthonormal on the numerical rank. Mean ρ counts every
    direction alike; SVCCA only the leading principal components; PWCCA weighs directions by how much of a
    layer they account for; Procrustes compares up to rotation and scale. All are 1 for equal
    representations, and none is 0 for unrelated ones: each has its chance level.

    Where the ranks of two layers reach n - 1 together, correlations approach 1 whatever the data: refused.

    Cost: one forward pass and one decomposition per layer at each checkpoint, however many pairs it stands
    in; per pair of layers one product and three decompositions of rank × rank matrices, about twice that with
    errors, and up to three for each permutation.

    Args:
        activations_a: Of the first network: an array (n_samples, n_features), a dict of them, or
            (model, batches).
        activations_b: Of the second, on the same samples.
        threshold: Part of the squared singular values (or of these) that SVCCA's components reach.
        sv: What the threshold is a part of: variance (squared singular values) or sigma (singular values).
        components: Number of SVCCA's components, in place of threshold and sv; all of a layer with fewer.
        pwcca: As the paper defines it, or as the code published with it computes it (original), which
            depends on the order, shift and signs of neurons; for comparison with old numbers only.
        statistic: Which one the summary, the figure and same_layer are of.
        jackknife_blocks: Blocks of samples whose influence gives standard errors; 0 for no errors.
        chance_permutations: Permutations of the samples for chance levels; 0 for none. Layers of m > 16
            dimensions take 16/m of them, and at least 3, for the same precision.
        force: Also where correlations approach or are 1 whatever the data.
        layers: Names or globs separated by commas; auto; all.
        maps: Convolutional maps: average over positions, flatten, or positions as samples.
        sequences: Sequences: last, mean or first position, flatten, per-step, or token as samples.
        memory: Gigabytes for what is remembered of checkpoints; beyond, it goes to temporary files.
        permutations: Relabelings of networks for tests between groups (all, if there are no more).
        bootstrap: Draws of networks and stimuli for errors of groups and convergence.
        level: Similarity to the last checkpoint that counts as converged (`--against final`).
        seed: Of blocks, permutations and draws.

    Returns:
        Matrices layer × layer of every statistic with standard errors and chance levels, ranks and kept
        components, and every canonical correlation.

    Raises:
        OptionError: If the inputs differ, or nothing is left of the chosen statistic because of the ranks.

    References:
        Raghu, Gilmer, Yosinski and Sohl-Dickstein, "SVCCA", NeurIPS 2017.
        Morcos, Raghu and Bengio, "Insights on representational similarity in neural networks with canonical
        correlation", NeurIPS 2018, §2.1.
        Williams, Kunz, Kornblith and Linderman, "Generalized shape metrics on neural representations",
        NeurIPS 2021, §2.
    """
    del permutations, bootstrap, level  # of the summary, which reads them from the result
    check_seed(seed)
    if jackknife_blocks == 1:
        raise OptionError(
            "1 block of samples has no spread.", "Give --jackknife-blocks 2 or more, or 0 for no errors."
        )
    if threshold == 0 and components is None:
        raise OptionError("threshold 0 keeps no component.", "Give a part of the variance above 0, as 0.99.")
    if components is not None and (threshold, sv) != (0.99, "variance"):
        raise OptionError(
            "--components sets the number that --threshold and --sv would find.",
            "Give --components alone, or --threshold and --sv.",
        )
    a, b = as_activations(activations_a), as_activations(activations_b)
    notes = [*subset_note(a), *check_comparable(a, b)]
    before = a.forwards + (b.forwards if b is not a else 0)
    recorded = {"layers": layers, "maps": maps, "sequences": sequences}
    kept = Components(threshold, sv, components)
    original = pwcca == "original"

    def network(activations: Activations) -> Network:
        def reduce() -> Network:
            return reduce_network(
                activations,
                recorded,
                kept,
                blocks=jackknife_blocks,
                seed=seed,
                force=force,
                keep_values=original,
            )

        name = ("cca", *recorded.values(), kept, jackknife_blocks, seed, force, original)
        return activations.remembered(name, reduce, limit=memory * GIGABYTE)

    first = network(a)
    second = first if a.key == b.key else network(b)
    pair = Pair(first, second, (a.label, b.label), force=force)
    pair.check(statistic)
    found = pair.compared(chance_permutations, seed)
    if original:
        pair.use_original(found)
    values = pair.arrays(found, statistic, seed)
    values |= {"n_samples": a.n_samples, "input_hash": a.input_hash or b.input_hash}
    return Measurement(
        values,
        spent={"forwards": a.forwards + (b.forwards if b is not a else 0) - before},
        notes=[*notes, *pair.notes],
    )
