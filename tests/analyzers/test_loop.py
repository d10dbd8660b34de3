"""The loop: grains, isolation of bad checkpoints, resuming, `previous`, partial results."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from dynprobe.analyzers import Measurement, OptionError, Var, analyzer
from dynprobe.analyzers.core.contract import DeclarationError, declaration_of
from dynprobe.analyzers.core.loop import (
    Job,
    MemoryStore,
    checkpoint_units,
    group_unit,
    measure,
    pair_unit,
    piece_key,
    run_unit,
)
from dynprobe.analyzers.core.result import stack
from dynprobe.analyzers.core.workspace import Run, Setup

NORM = {"norm": Var((), "1", "Norm")}


@dataclass
class Loaded:
    state: dict
    hash: str
    notes: list = field(default_factory=list)


@dataclass
class FakeCheckpoint:
    step: int
    value: float
    run: str = "run"
    broken: bool = False
    reads: list = field(default_factory=list)

    @property
    def path(self):
        return Path(f"step_{self.step}.pt")

    def load(self):
        self.reads.append(self.step)
        if self.broken:
            raise OSError(f"{self.path}: truncated")
        return Loaded({"weight": torch.full((1, 1), self.value)}, f"{self.value}")


def make_run(values, name="run", broken=()):
    checkpoints = [FakeCheckpoint(i, v, name, broken=i in broken) for i, v in enumerate(values)]
    setup = Setup(
        make_model=lambda: torch.nn.Linear(1, 1, bias=False),
        fit=lambda model, state, where: (state, []),
        make_batches=list,
        make_test_batches=lambda: None,
        make_loss=lambda: None,
        open_other=lambda path: checkpoints[0],
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    return Run(name, checkpoints, setup)


@analyzer(returns=NORM)
def norm(state):
    """Norm."""
    return {"norm": float(state["weight"].norm())}


def job(function, **options):
    return Job(declaration_of(function), options)


def values_of(pieces):
    return [float(p.arrays["norm"].values) if "norm" in p.arrays else p.reason for p, _ in pieces]


def test_every_checkpoint_is_measured_in_order():
    run = make_run([3.0, 1.0, 2.0])
    assert values_of(measure(job(norm), checkpoint_units(run, run.checkpoints), MemoryStore())) == [3, 1, 2]


def test_one_broken_checkpoint_among_ten_is_named_and_the_other_nine_are_measured():
    run = make_run([float(i) for i in range(10)], broken=[4])
    pieces = [p for p, _ in measure(job(norm), checkpoint_units(run, run.checkpoints), MemoryStore())]
    assert [p.status for p in pieces].count("ok") == 9
    assert pieces[4].status == "failed"
    assert "step_4.pt: truncated" in pieces[4].reason
    result = stack("norm", "checkpoint", pieces, {})
    assert torch.isnan(torch.tensor(result["norm"])).tolist() == [i == 4 for i in range(10)]


def test_nan_weights_fail_with_the_tensor_named():
    run = make_run([1.0, float("nan")])
    pieces = [p for p, _ in measure(job(norm), checkpoint_units(run, run.checkpoints), MemoryStore())]
    assert pieces[1].status == "failed"
    assert "'weight' holds 1 values that are NaN or infinite" in pieces[1].reason


def test_an_analyzer_that_breaks_its_declaration_stops_the_call():
    @analyzer(returns=NORM)
    def wrong(state):
        """Norm."""
        return {"nrom": 1.0}

    run = make_run([1.0])
    with pytest.raises(DeclarationError, match="nrom"):
        list(measure(job(wrong), checkpoint_units(run, run.checkpoints), MemoryStore()))


def test_a_second_call_takes_finished_pieces_and_a_changed_checkpoint_is_measured_again():
    run, store = make_run([1.0, 2.0]), MemoryStore()
    list(measure(job(norm), checkpoint_units(run, run.checkpoints), store))
    run.checkpoints[1].value = 5.0
    again = list(measure(job(norm), checkpoint_units(run, run.checkpoints), store))
    assert [stored for _, stored in again] == [True, False]
    assert values_of(again) == [1, 5]


def test_failed_pieces_are_tried_again():
    run, store = make_run([1.0, 2.0], broken=[1]), MemoryStore()
    list(measure(job(norm), checkpoint_units(run, run.checkpoints), store))
    run.checkpoints[1].broken = False
    assert values_of(measure(job(norm), checkpoint_units(run, run.checkpoints), store)) == [1, 2]


def test_the_key_follows_options_and_data_but_not_the_file_name():
    run = make_run([1.0])
    (unit,) = checkpoint_units(run, run.checkpoints)
    key = piece_key(job(norm), unit)
    run.checkpoints[0].step = 7
    assert piece_key(job(norm), checkpoint_units(run, run.checkpoints)[0]) == key
    assert piece_key(job(norm, order=1), unit) != key
    run.setup.facts = lambda needs: {"data": "other"}
    assert piece_key(job(norm), unit) != key


def test_what_an_analyzer_reads_elsewhere_in_the_run_is_part_of_its_key():
    @analyzer(returns=NORM, reads=lambda options: ["last"])
    def against_last(state, run):
        """Norm."""
        return {"norm": float((state["weight"] - run.state("last")["weight"]).norm())}

    run = make_run([1.0, 4.0])
    unit = checkpoint_units(run, run.checkpoints)[0]
    key = piece_key(job(against_last), unit)
    run.checkpoints[1].value = 6.0
    assert piece_key(job(against_last), unit) != key
    assert values_of(measure(job(against_last), [unit], MemoryStore())) == [5]


def test_the_last_checkpoints_of_the_other_runs_of_the_call_are_part_of_the_key_where_they_are_read():
    @analyzer(returns=NORM, reads=lambda options: ["others"])
    def against_others(state, run):
        """Norm."""
        return {"norm": sum(float(other.state("last")["weight"].norm()) for other in run.others)}

    run, other = make_run([1.0, 4.0]), make_run([5.0, 2.0], "other")
    run.others = [run, other]
    unit = checkpoint_units(run, run.checkpoints)[0]
    assert values_of(measure(job(against_others), [unit], MemoryStore())) == [6]
    key = piece_key(job(against_others), unit)
    other.checkpoints[0].value = 7.0
    assert piece_key(job(against_others), unit) == key
    other.checkpoints[1].value = 3.0
    changed = piece_key(job(against_others), unit)
    other.name = "another"
    assert len({key, changed, piece_key(job(against_others), unit)}) == 3


def test_a_broken_run_beside_it_is_part_of_the_key_too():
    run, other = make_run([1.0]), make_run([5.0, 2.0], "other", broken=[1])
    run.others = [run, other]
    assert run.content_hashes("others") == ["run 1.0", "other broken: step_1.pt: truncated 5.0"]


def test_pairs_get_both_sides_and_a_model_of_their_own():
    @analyzer(returns=NORM)
    def distance(model_a, model_b):
        """Distance."""
        return {"norm": model_a.weight.item() - model_b.weight.item()}

    a, b = make_run([3.0], "a"), make_run([1.0], "b")
    units = [pair_unit(a, a.checkpoints[0], b, b.checkpoints[0])]
    ((piece, _),) = measure(job(distance), units, MemoryStore())
    assert float(piece.arrays["norm"].values) == 2.0
    assert (piece.index["run_a"], piece.index["run_b"]) == ("a", "b")


def test_a_whole_run_is_walked_with_one_checkpoint_in_memory_and_a_broken_one_is_left_out():
    held = []

    @analyzer(returns={"norm": Var(("checkpoint",), "1", "Norm")})
    def path(checkpoints):
        """Path."""
        values = []
        for workspace in checkpoints:
            values.append(float(workspace.state["weight"].norm()))
            held.append(sum(w._loaded is not None for w in checkpoints))
        return {"norm": values}

    run = make_run([1.0, 2.0, 3.0, 4.0], broken=[2])
    (piece,) = [p for p, _ in measure(job(path), [run_unit(run, run.checkpoints)], MemoryStore())]
    assert piece.status == "incomplete"
    assert "step_2.pt" in piece.reason
    assert piece.arrays["norm"].values.tolist() == [1, 2, 4]
    assert piece.arrays["step"].values.tolist() == [0, 1, 3]
    assert max(held) == 1


def test_a_group_gets_all_its_runs():
    @analyzer(returns={"norm": Var((), "1", "Mean norm")})
    def mean_norm(runs):
        """Mean."""
        last = [float(r.state("last")["weight"].norm()) for r in runs]
        return {"norm": sum(last) / len(last)}

    chosen = [(r, r.checkpoints) for r in (make_run([1.0, 2.0], "a"), make_run([1.0, 4.0], "b"))]
    unit = group_unit(chosen)
    assert values_of(measure(job(mean_norm), [unit], MemoryStore())) == [3]


def test_previous_is_the_last_measurement_of_the_same_run():
    seen = []

    @analyzer(returns=NORM)
    def chained(state, previous):
        """Norm."""
        seen.append(None if previous is None else float(previous["norm"]))
        return Measurement({"norm": float(state["weight"])})

    a, b = make_run([1.0, 2.0], "a"), make_run([3.0], "b")
    units = checkpoint_units(a, a.checkpoints) + checkpoint_units(b, b.checkpoints)
    list(measure(job(chained), units, MemoryStore()))
    assert seen == [None, 1, None]


def test_parts_of_a_piece_survive_an_interruption():
    class Stop(BaseException):
        pass

    class Store(MemoryStore):
        parts: ClassVar[dict] = {}

        def partial(self, key):
            outer = self

            class P:
                def get(self, name):
                    return outer.parts.get((key, name))

                def put(self, name, arrays):
                    outer.parts[key, name] = arrays

            return P()

    computed = []

    @analyzer(returns=NORM)
    def rows(state, partial):
        """Norm."""
        for row in range(3):
            if partial.get(f"row {row}") is None:
                if len(computed) == 2 and row == 2 and not stopped:
                    stopped.append(1)
                    raise Stop
                computed.append(row)
                partial.put(f"row {row}", {})
        return {"norm": 0.0}

    stopped, run, store = [], make_run([1.0]), Store()
    with pytest.raises(Stop):
        list(measure(job(rows), checkpoint_units(run, run.checkpoints), store))
    list(measure(job(rows), checkpoint_units(run, run.checkpoints), store))
    assert computed == [0, 1, 2]


def test_the_model_is_refilled_and_back_in_eval_mode_for_every_checkpoint():
    @analyzer(returns=NORM)
    def careless(model):
        """Norm."""
        assert not model.training
        value = model.weight.item()
        model.train()
        model.weight.data.zero_()
        return {"norm": value}

    run = make_run([1.0, 2.0])
    assert values_of(measure(job(careless), checkpoint_units(run, run.checkpoints), MemoryStore())) == [1, 2]


def test_options_that_cannot_be_followed_stop_the_call_at_the_first_piece():
    @analyzer(returns=NORM)
    def picky(state):
        """Norm."""
        raise OptionError("resolution 4 is even.", "Try 5.")

    run = make_run([1.0, 2.0])
    with pytest.raises(OptionError, match="even"):
        list(measure(job(picky), checkpoint_units(run, run.checkpoints), MemoryStore()))


def test_a_group_sees_only_the_checkpoints_that_were_chosen():
    @analyzer(returns={"norm": Var((), "1", "Number of checkpoints")})
    def count(runs):
        """Count."""
        return {"norm": float(sum(len(r) for r in runs))}

    run = make_run([1.0, 2.0, 3.0])
    assert values_of(measure(job(count), [group_unit([(run, run.checkpoints[-1:])])], MemoryStore())) == [1]


def test_an_incomplete_run_is_measured_again_when_the_broken_checkpoint_is_gone():
    @analyzer(returns={"norm": Var(("checkpoint",), "1", "Norm")})
    def path(checkpoints):
        """Path."""
        return {"norm": [float(w.state["weight"].norm()) for w in checkpoints]}

    run, store = make_run([1.0, 2.0, 3.0], broken=[1]), MemoryStore()
    ((first, _),) = measure(job(path), [run_unit(run, run.checkpoints)], store)
    sound = [c for c in run.checkpoints if not c.broken]
    ((second, stored),) = measure(job(path), [run_unit(run, sound)], store)
    assert (first.status, second.status, stored) == ("incomplete", "ok", False)


def test_equal_weights_at_two_steps_are_two_measurements_where_the_step_matters():
    @analyzer(returns=NORM)
    def twice(step, state):
        """Twice the step."""
        return {"norm": 2.0 * step}

    run = make_run([1.0, 1.0])
    assert values_of(measure(job(twice), checkpoint_units(run, run.checkpoints), MemoryStore())) == [0, 2]


def test_what_was_measured_before_is_part_of_the_key_of_what_builds_on_it():
    @analyzer(returns=NORM)
    def change(state, previous):
        """Change."""
        return {"norm": state["weight"].item() - (0.0 if previous is None else float(previous["norm"]))}

    run, store = make_run([1.0, 3.0, 10.0]), MemoryStore()
    assert values_of(measure(job(change), checkpoint_units(run, run.checkpoints), store)) == [1, 2, 8]
    again = measure(job(change), checkpoint_units(run, [run.checkpoints[0], run.checkpoints[2]]), store)
    assert values_of(again) == [1, 9]


def test_a_broken_checkpoint_elsewhere_in_the_run_does_not_stop_those_that_read_it():
    @analyzer(returns=NORM, reads=lambda options: ["all"])
    def relative(state, run):
        """Norm."""
        return {"norm": state["weight"].item()}

    run = make_run([1.0, 2.0], broken=[1])
    assert values_of(measure(job(relative), checkpoint_units(run, run.checkpoints[:1]), MemoryStore())) == [1]


def test_fresh_forgets_the_parts_of_a_piece():
    cleared = []

    class Store(MemoryStore):
        def partial(self, key):
            partial = super().partial(key)
            partial.clear = lambda: cleared.append(key)
            return partial

    run = make_run([1.0])
    fresh = job(norm)
    fresh.fresh = True
    list(measure(fresh, checkpoint_units(run, run.checkpoints), Store()))
    assert len(cleared) == 1


def test_pieces_that_could_not_be_stacked_stop_the_call_when_they_are_met():
    @analyzer(returns={"norm": Var(("x",), "1", "Norm", alternatives=((),))})
    def fickle(step):
        """Norm."""
        return {"norm": [1.0, 2.0] if step else 1.0}

    run = make_run([1.0, 2.0])
    with pytest.raises(DeclarationError, match=r"has dimensions \('x',\) here and \(\) before"):
        list(measure(job(fickle), checkpoint_units(run, run.checkpoints), MemoryStore()))


@pytest.mark.parametrize("returned", [None, 3.0])
def test_returning_no_dictionary_is_said(returned):
    @analyzer(returns=NORM)
    def wrong(state):
        """Norm."""
        return returned

    run = make_run([1.0])
    with pytest.raises(DeclarationError, match="not a dictionary"):
        list(measure(job(wrong), checkpoint_units(run, run.checkpoints), MemoryStore()))


def test_a_float8_checkpoint_is_measured():
    run = make_run([1.0])
    run.checkpoints[0].load = lambda: Loaded({"weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "8")

    @analyzer(returns=NORM)
    def count(state):
        """Count."""
        return {"norm": float(state["weight"].numel())}

    assert values_of(measure(job(count), checkpoint_units(run, run.checkpoints), MemoryStore())) == [4]


def test_complex_parameters_keep_their_imaginary_part():
    class Phase(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.turn = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64) * 1j)
            self.weight = torch.nn.Parameter(torch.ones(2))

    run = make_run([1.0])
    run.setup.make_model, run.setup.dtype = Phase, torch.float64
    model = run.setup.model()
    assert model.turn.imag.tolist() == [1, 1]
    assert model.weight.dtype == torch.float64
