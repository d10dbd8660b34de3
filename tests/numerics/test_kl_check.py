"""KL divergences against torch's own, and against the Fisher information for small changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from dynprobe.analyzers.numerics.kl_check import divergence, kl_check
from dynprobe.analyzers.numerics.losses import get_loss

N, C = 21, 4


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def kl(before, after, dim):
    p, q = before.log_softmax(dim), after.log_softmax(dim)
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(dim)


@pytest.mark.parametrize("name", ["cross_entropy", "causal_lm", "bce_with_logits", "mse"])
def test_the_divergence_is_that_of_the_loss_s_distribution_averaged_over_positions(name):
    loss = get_loss(name)
    before, after = torch.randn(3, 5, C), torch.randn(3, 5, C)
    truth = {
        "cross_entropy": lambda: kl(before, after, 1).mean(1),
        "causal_lm": lambda: kl(before[:, :-1], after[:, :-1], 2).mean(1),
        "mse": lambda: (before - after).square().flatten(1).mean(1),
        "bce_with_logits": lambda: kl(
            torch.stack([before, 0 * before]), torch.stack([after, 0 * after]), 0
        ).flatten(1).mean(1),
    }  # fmt: skip
    targets = {"cross_entropy": torch.zeros(3, C), "causal_lm": torch.zeros(3, 5)}.get(name, before).long()
    torch.testing.assert_close(divergence(loss, before, after, targets), truth[name]())


def test_small_divergences_keep_their_digits():
    loss, before = get_loss("cross_entropy"), torch.randn(3, C)
    change = 1e-9 * torch.randn(3, C)
    p = before.softmax(1)
    variance = (p * change.square()).sum(1) - (p * change).sum(1).square()
    found = divergence(loss, before, before + change, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(found, variance / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["cross_entropy", "bce_with_logits", "mse"])
def test_the_fisher_information_predicts_the_divergence_of_a_small_change(name):
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, C)).eval()
    targets = torch.randint(C, (N,)) if name == "cross_entropy" else torch.rand(N, C)
    inputs = torch.randn(N, 5)
    batches = list(zip(inputs.split(8), targets.split(8), strict=True))
    found = kl_check(model, batches, get_loss(name), size=1e-5)
    assert math.isclose(found.ratio, 1, rel_tol=1e-3)
    assert found.divergence.n_samples == N
    assert not math.isclose(kl_check(model, batches, get_loss(name), size=0.9).ratio, 1, rel_tol=1e-3)


@pytest.mark.parametrize("name", ["bce_with_logits", "mse"])
def test_models_with_one_number_per_sample_have_a_divergence(name):
    flat, column = (nn.Sequential(nn.Linear(5, 1), *more).eval() for more in ([nn.Flatten(0)], []))
    column.load_state_dict(flat.state_dict())
    inputs, targets = torch.randn(N, 5), torch.rand(N)
    found = kl_check(flat, [(inputs, targets)], get_loss(name), size=1e-5)
    assert math.isclose(found.ratio, 1, rel_tol=1e-3)
    truth = kl_check(column, [(inputs, targets[:, None])], get_loss(name), size=1e-5)
    assert math.isclose(found.divergence.value, truth.divergence.value, rel_tol=1e-6)


@pytest.mark.parametrize("padding", [0, -1])
def test_rows_of_an_embedding_for_padding_do_not_move(padding):
    """Their gradient is zero by convention: a divergence that they cause would not be predicted."""
    embed = nn.Embedding(7, 4, padding_idx=padding)
    nn.init.normal_(embed.weight)
    model = nn.Sequential(embed, nn.Tanh(), nn.Flatten(), nn.Linear(32, C)).eval()
    inputs = torch.randint(7, (N, 8))
    inputs[:, 3:] = padding % 7
    found = kl_check(model, [(inputs, torch.randint(C, (N,)))], get_loss("cross_entropy"), size=1e-5)
    assert math.isclose(found.ratio, 1, rel_tol=1e-3)
