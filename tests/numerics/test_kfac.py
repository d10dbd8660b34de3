"""Kronecker factors against dense Fisher matrices, and finite where undamped determinants are not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dynprobe.analyzers.numerics.kfac import kronecker_factors
from dynprobe.analyzers.numerics.losses import get_loss
from dynprobe.analyzers.numerics.output_factor import output_factor
from dynprobe.analyzers.numerics.per_sample import PerSamplePass

LOSS = get_loss("cross_entropy")


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def dense_fisher(model, x, y):
    passed = PerSamplePass(model, x)
    rows = []
    for column in output_factor(LOSS, passed.outputs, y).columns():
        for i in range(len(x)):
            pick = torch.zeros_like(column)
            pick[i] = column[i]
            rows.append(torch.cat([g.flatten() for g in passed.gradient(pick).values()]))
    return torch.stack(rows).T @ torch.stack(rows) / len(x)


def test_for_one_sample_the_factors_give_the_determinant_of_the_dense_fisher_matrix():
    model, x, y = nn.Linear(4, 3).eval(), torch.randn(1, 4), torch.tensor([1])
    found = kronecker_factors(model, [(x, y)], LOSS)
    layer = found.layers[""]
    dense = dense_fisher(model, x, y)
    damping = found.damping(1e-6)
    assert math.isclose(layer.largest, float(torch.linalg.eigvalsh(dense)[-1]), rel_tol=1e-12)
    truth = torch.logdet(dense + damping * torch.eye(15))
    assert math.isclose(layer.log_determinant(damping), float(truth), rel_tol=1e-9)
    assert layer.rank(damping) == int(torch.linalg.matrix_rank(dense)) == 2
    assert found.covered == 1
    assert found.exact


def test_factors_of_unequal_batches_are_averages_over_samples():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x, y = torch.randn(11, 4), torch.randint(3, (11,))
    whole = kronecker_factors(model, [(x, y)], LOSS)
    parts = kronecker_factors(model, list(zip(x.split(4), y.split(4), strict=True)), LOSS)
    hidden = torch.cat([torch.tanh(model[0](x)), torch.ones(11, 1)], 1)
    moment = torch.linalg.eigvalsh(hidden.T @ hidden / 11).detach()
    torch.testing.assert_close(whole.layers["2"].inputs, moment)
    p = model(x).detach().softmax(1)
    metric = (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)
    torch.testing.assert_close(
        whole.layers["2"].outputs, torch.linalg.eigvalsh(metric).clamp_min(0), rtol=1e-10, atol=1e-15
    )
    for name in ("0", "2"):
        torch.testing.assert_close(whole.layers[name].inputs, parts.layers[name].inputs)
        torch.testing.assert_close(whole.layers[name].outputs, parts.layers[name].outputs)


def test_a_convolution_sums_positions_in_one_factor_and_averages_them_in_the_other():
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).eval()
    x, y = torch.randn(6, 2, 3, 3), torch.randint(3, (6,))
    found = kronecker_factors(model, [(x, y)], LOSS).layers["0"]
    patches = nn.functional.unfold(x, 2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found.inputs, torch.linalg.eigvalsh(patches.T @ patches / 6).clamp_min(0))
    hidden = model[0](x).detach().requires_grad_()
    outputs = model[3](torch.relu(hidden).flatten(1))
    total = torch.zeros(3, 3)
    for column in output_factor(LOSS, outputs, y).columns():
        delta = torch.autograd.grad(outputs, hidden, column, retain_graph=True)[0]
        delta = delta.flatten(2).transpose(1, 2).flatten(0, 1)
        total += delta.T @ delta / (6 * 4)
    torch.testing.assert_close(found.outputs, torch.linalg.eigvalsh(total).clamp_min(0))


def test_positions_merged_into_samples_are_positions_all_the_same():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.merge = nn.Linear(4, 3), False

        def forward(self, x):
            if self.merge:
                return torch.tanh(self.layer(x.flatten(0, 1))).unflatten(0, x.shape[:2]).sum(1)
            return torch.tanh(self.layer(x)).sum(1)

    model, batches = Merged().eval(), [(torch.randn(6, 5, 4), torch.randint(3, (6,)))]
    apart = kronecker_factors(model, batches, LOSS).layers["layer"]
    model.merge = True
    merged = kronecker_factors(model, batches, LOSS).layers["layer"]
    torch.testing.assert_close(apart.inputs, merged.inputs)
    torch.testing.assert_close(apart.outputs, merged.outputs)


def test_random_signs_give_the_same_factors_on_average():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    batches = [(torch.randn(64, 4), torch.randint(3, (64,)))]
    exact = kronecker_factors(model, batches, LOSS)
    drawn = kronecker_factors(model, batches, LOSS, max_columns=1, draws=200)
    assert not drawn.exact
    for name, layer in exact.layers.items():
        assert math.isclose(layer.trace, drawn.layers[name].trace, rel_tol=0.05)


def test_determinants_of_a_network_that_fits_its_data_are_finite():
    """Undamped, these are minus infinity or NaN: the factors are of low rank, and tiny."""
    model = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[2].weight.mul_(50)
    x = torch.randn(5, 20)
    found = kronecker_factors(model, [(x, model(x).argmax(1))], LOSS)
    damping = found.damping(1e-6)
    for layer in found.layers.values():
        assert math.isfinite(layer.log_determinant(damping))
        assert math.isfinite(layer.pseudo_log_determinant(damping))
        assert 0 <= layer.rank(damping) <= len(layer.eigenvalues)
    assert found.layers["0"].rank(damping) < 21 * 8


def test_a_network_without_any_fisher_information_has_no_determinant_but_does_not_crash():
    model = nn.Linear(2, 3).eval()
    nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([1e5, 0.0, 0.0]))
    found = kronecker_factors(model, [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))], LOSS)
    assert found.damping(1e-6) == 0
    assert math.isnan(found.layers[""].log_determinant(0.0))
    assert math.isnan(found.layers[""].participation)
    assert found.layers[""].rank(0.0) == 0


def test_parameters_that_no_factor_covers_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.norm(self.twice(torch.relu(self.twice(x)))))

    found = kronecker_factors(Net().eval(), [(torch.randn(5, 4), torch.randint(3, (5,)))], LOSS)
    assert list(found.layers) == ["head"]
    assert found.left_out == ("twice.weight", "twice.bias", "norm.weight", "norm.bias")
    assert math.isclose(found.covered, 15 / 43)


def test_random_signs_do_not_depend_on_the_split_into_batches():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x, y = torch.randn(11, 4), torch.randint(3, (11,))
    splits = [[(x, y)], list(zip(x.split(4), y.split(4), strict=True))]
    one, other = (kronecker_factors(model, b, LOSS, max_columns=1, seed=2).layers["0"] for b in splits)
    torch.testing.assert_close(one.outputs, other.outputs)


def test_layers_that_see_only_some_samples_of_a_later_batch_have_no_factors():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            out = torch.zeros(len(x), 3)
            for expert, mine in ((self.one, x[:, 0] > 0), (self.two, x[:, 0] <= 0)):
                if mine.any():
                    out = out.index_put((mine.nonzero()[:, 0],), expert(x[mine]))
            return out

    x, y = torch.randn(10, 4), torch.randint(3, (10,))
    x[:5, 0] = 1.0
    x[5:7, 0] = -1.0
    batches = list(zip(x.split(5), y.split(5), strict=True))
    for order in (batches, batches[::-1]):
        assert kronecker_factors(Experts().eval(), order, LOSS).layers == {}
