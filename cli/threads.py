"""How many CPU threads help: more of them slow a small network down."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

log = logging.getLogger("dynprobe")

if TYPE_CHECKING:
    from dynprobe.cli.work import Plan

WORTH = 1.2  # a second thread that gains less than this is better left to somebody else
TRIAL = 0.15  # seconds for each number of threads


def set_threads(asked: int | None, plan: Plan) -> None:
    """Set the number of threads: as asked, or what is faster in a short trial of the forward pass.

    Args:
        asked: Number of threads, or None to find out.
        plan: Has the model and the data to try it on.
    """
    import torch

    if asked is not None:
        torch.set_num_threads(max(1, asked))
        return
    setup, declaration = plan.prepared[0].run.setup, plan.declaration
    many = torch.get_num_threads()
    if many == 1 or setup.device.type != "cpu" or not declaration.wants("batches"):
        return
    try:
        model = setup.model().eval()
        inputs, _ = next(iter(setup.batches))
        torch.set_num_threads(1)
        single = _seconds(model, inputs)
        torch.set_num_threads(many)
        if single < WORTH * _seconds(model, inputs):
            torch.set_num_threads(1)
    except Exception as error:  # the measurement meets it again, and says at which checkpoint
        torch.set_num_threads(many)
        log.debug("no trial of threads: %s", error)


def _seconds(model: Any, inputs: Any) -> float:
    """The fastest of a few forward passes."""
    import torch

    from dynprobe.analyzers.numerics.evaluate import call

    best, start = float("inf"), time.perf_counter()
    with torch.inference_mode():
        call(model, inputs)
        while time.perf_counter() - start < TRIAL or best == float("inf"):
            before = time.perf_counter()
            call(model, inputs)
            best = min(best, time.perf_counter() - before)
    return best
