"""Where a checkpoint stands: names, facts in files, and one axis for all."""

from __future__ import annotations

import argparse

import numpy
import pytest
import torch

from dynprobe.io.header import Count
from dynprobe.io.readers import open_file
from dynprobe.io.step_axis import Claims, agree
from dynprobe.io.step_names import counts_in_name, is_alias

CONVENTIONS = {
    "step_0010.pt": {"step": 10},
    "epoch=2-step=8.ckpt": {"epoch": 2, "step": 8},
    "epoch=0-step=4-v1.ckpt": {"epoch": 0, "step": 4},
    "epoch=3-val_loss=0.25.ckpt": {"epoch": 3},
    "checkpoint-500": {"number": 500},
    "checkpoint12.pt": {"number": 12},
    "checkpoint_3_10000.pt": {"number": 10000},
    "global_step1000": {"step": 1000},
    "step143000": {"step": 143000},
    "iter_0001000": {"step": 1000},
    "model.iter1000000": {"step": 1000000},
    "ep012-ba4096-rank0.pt": {"epoch": 12, "step": 4096},
    "epoch_1_step_200.pt": {"epoch": 1, "step": 200},
    "model_300.t7": {"number": 300},
    "100.pt": {"number": 100},
    "G_100000.pth": {"number": 100000},
    "40_net_G.pth": {"number": 40},
    "model050000.pt": {"number": 50000},
    "ema_0.9999_050000.pt": {"number": 50000},
    "ckpt-1.2M.pt": {"number": 1200000},
    "step-10k.pt": {"step": 10000},
    "step1e4.pt": {"step": 10000},
    "500steps.pt": {"step": 500},
    "model_10epochs.pt": {"epoch": 10},
    "net_epoch_20.pth": {"epoch": 20},
    "ckpt_step_0001.pt": {"step": 1},
    "t=0.5.pt": {"number": 0.5},
    "weights.05-0.12.pt": {"number": 5},
    "bestF_epoch21_e30_f75_s350_m32.pth.tar": {"epoch": 21},
    "resnet50_epoch90_top1_76.1.pth": {"epoch": 90},
    "step_5.pt/model.safetensors": {"step": 5},
    "run_2/step_5.pt": {"step": 5},
    # What is no step:
    "model-00001-of-00006.safetensors": {},
    "resnet18-f37072fd.pth": {},
    "resnet18-5c106cde.pth": {},
    "mobilenet_v2-b0353104.pth": {},
    "mp_rank_00_model_states.pt": {},
    "20240131_123456_model.pt": {},
    "model_seed3.pt": {},
    "pytorch_model.bin": {},
    "last.ckpt": {},
    # Beside a step:
    "seed3_step200.pt": {"step": 200},
    "model_step10_seed3.pt": {"step": 10},
    "stage2_step100.pt": {"step": 100},
    "2024-01-31_step100.pt": {"step": 100},
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_name_convention(name):
    assert {count.unit: count.value for count in counts_in_name(name)} == CONVENTIONS[name]


@pytest.mark.parametrize(
    "name", ["last.ckpt", "model_best.pth.tar", "checkpoint_last.pt", "final.pt", "model.pt"]
)
def test_alias_names(name):
    assert is_alias(name)
    assert not is_alias("step_10.pt")


def counts(tmp_path, tree):
    torch.save({"model": {"w": torch.ones(3)}, **tree}, tmp_path / "c.pt")
    return [tuple(count) for count in open_file(tmp_path / "c.pt").header.counts]


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"global_step": 5, "epoch": 1}, [(5, "step", "in-file global_step"), (1, "epoch", "in-file epoch")]),
        ({"step": 3, "global_step": 5}, [(5, "step", "in-file global_step"), (3, "step", "in-file step")]),
        ({"iteration": torch.tensor(7)}, [(7, "step", "in-file iteration")]),
        ({"step": numpy.int64(7)}, [(7, "step", "in-file step")]),
        ({"step": numpy.array(7.0)}, [(7, "step", "in-file step")]),
        ({"epoch": 1.5}, [(1.5, "epoch", "in-file epoch")]),
        ({"meta": {"iter": 40, "epoch": 4}}, [(40, "step", "in-file iter"), (4, "epoch", "in-file epoch")]),
        ({"trainer": argparse.Namespace(step=9)}, [(9, "step", "in-file step")]),
        ({"step": -1, "epoch": True, "iteration": "many"}, []),
        ({"args": argparse.Namespace(epoch=90), "config": {"step": 4}}, []),
        ({"step": torch.arange(3)}, []),
        ({"step": float("nan")}, []),
    ],
)
def test_counts_in_a_file(tmp_path, tree, expected):
    assert counts(tmp_path, tree) == expected


def claims(*lists, unreadable=()):
    return [Claims(f"c{i}", [Count(*c) for c in own], i not in unreadable) for i, own in enumerate(lists)]


def values(axis):
    return [None if place is None else place.value for place in axis.places]


def test_in_file_step_is_believed_before_the_optimizer_and_the_name():
    own = [(10, "step", "file name"), (30, "step", "optimizer state"), (20, "step", "in-file step")]
    assert values(agree(claims(own))) == [20]
    assert values(agree(claims(own[:2]))) == [30]
    assert values(agree(claims([*own, (1, "step", "command line")]))) == [1]


def test_epochs_are_never_mixed_with_steps():
    axis = agree(
        claims(
            [(100, "step", "in-file step"), (1, "epoch", "in-file epoch")],
            [(2, "epoch", "in-file epoch")],
            [(3, "epoch", "file name")],
        )
    )
    assert (axis.unit, values(axis)) == ("epoch", [1, 2, 3])
    assert "1 of 3 checkpoints know their step" in axis.notes[0]


def test_bare_number_is_an_epoch_where_the_files_say_so():
    # timm: checkpoint-N counts epochs; others save how many are done.
    for shift in (0, 1):
        axis = agree(
            claims(
                [(5, "number", "file name"), (5 - shift, "epoch", "in-file epoch")],
                [(6, "number", "file name"), (6 - shift, "epoch", "in-file epoch")],
            )
        )
        assert axis.unit == "epoch"
    # Hugging Face: it counts steps.
    axis = agree(
        claims(
            [(500, "number", "file name"), (1, "epoch", "in-file epoch")],
            [(1000, "number", "file name"), (2, "epoch", "in-file epoch")],
        )
    )
    assert (axis.unit, values(axis)) == ("step", [500, 1000])


def test_names_fill_gaps_only_where_they_do_not_contradict():
    agreeing = claims(
        [(0, "step", "file name")],
        [(10, "step", "file name"), (10, "step", "in-file step")],
        [(20, "step", "file name"), (20, "step", "in-file step")],
    )
    assert values(agree(agreeing)) == [0, 10, 20]
    # Names count something else; they know all, the optimizer does not.
    differing = claims(
        [(0, "number", "file name")],
        [(1, "number", "file name"), (500, "step", "optimizer state")],
        [(2, "number", "file name"), (1000, "step", "optimizer state")],
    )
    axis = agree(differing)
    assert values(axis) == [0, 1, 2]
    assert "ordered by file name" in axis.notes[0]


def test_bare_number_does_not_join_an_axis_it_cannot_be_compared_with():
    axis = agree(claims([(5000, "step", "in-file step")], [(10, "number", "file name")]))
    assert values(axis) == [5000, None]


def test_damaged_file_takes_its_place_by_name():
    axis = agree(
        claims(
            [(10, "step", "in-file step"), (10, "number", "file name")],
            [(20, "number", "file name")],
            unreadable={1},
        )
    )
    assert values(axis) == [10, 20]


def test_without_any_count_there_is_no_axis():
    axis = agree(claims([], [], [(3, "step", "in-file step")]))
    assert (axis.unit, values(axis)) == ("order", [None, None, None])
