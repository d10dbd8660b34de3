"""Norm of the weights."""

from typing import Annotated

from dynprobe.analyzers import Lines, Range, Var, analyzer


@analyzer(
    returns={"norm": Var((), "", "Norm of all weights")},
    figure=Lines(y="norm"),
)
def weight_norm(state, *, order: Annotated[int, Range(min=1)] = 2):
    """Norm of all weights taken as one vector.

    Args:
        order: Which norm: 1, 2, …
    """
    total = sum(float(w.double().norm(order)) ** order for w in state.values() if w.is_floating_point())
    return {"norm": total ** (1 / order)}
