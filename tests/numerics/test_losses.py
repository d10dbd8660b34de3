"""Losses per sample against PyTorch's own reductions and against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from dynprobe.analyzers.numerics.losses import Loss, as_loss, get_loss


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("classes", [2, 10, 15, 16, 100])
def test_cross_entropy_of_each_sample_equals_pytorch_for_few_and_many_classes(classes: int) -> None:
    outputs, targets = drawn(37, classes), torch.arange(37) % classes
    expected = functional.cross_entropy(outputs.double(), targets, reduction="none")
    torch.testing.assert_close(
        get_loss("cross_entropy").per_sample(outputs, targets).double(), expected, atol=2e-6, rtol=1e-6
    )


def test_a_loss_called_is_the_mean_over_samples_and_gradients_flow() -> None:
    outputs = drawn(8, 3).requires_grad_()
    targets = torch.arange(8) % 3
    (ours,) = torch.autograd.grad(get_loss("cross_entropy")(outputs, targets), outputs)
    (theirs,) = torch.autograd.grad(functional.cross_entropy(outputs, targets), outputs)
    torch.testing.assert_close(ours, theirs)


def test_class_probabilities_are_accepted_as_targets() -> None:
    outputs, targets = drawn(6, 4), drawn(6, 4, seed=1).softmax(1)
    by_hand = -(targets * outputs.log_softmax(1)).sum(1)
    torch.testing.assert_close(get_loss("cross_entropy").per_sample(outputs, targets), by_hand)


def test_positions_are_averaged_within_a_sample_so_that_samples_weigh_the_same() -> None:
    outputs, targets = drawn(2, 5, 3), torch.tensor([[0, 1, 2], [4, -100, -100]])
    values = get_loss("cross_entropy").per_sample(outputs, targets)
    log_p = outputs.log_softmax(1)
    first = -(log_p[0, 0, 0] + log_p[0, 1, 1] + log_p[0, 2, 2]) / 3
    torch.testing.assert_close(values, torch.stack([first, -log_p[1, 4, 0]]))


def test_a_sample_with_no_counted_position_is_nan_never_zero() -> None:
    values = get_loss("cross_entropy").per_sample(drawn(1, 5, 3), torch.full((1, 3), -100))
    assert values.isnan().all()


@pytest.mark.parametrize("classes", [3, 40])
def test_a_sample_whose_only_target_is_ignored_has_neither_loss_nor_accuracy(classes: int) -> None:
    loss, outputs, targets = get_loss("cross_entropy"), drawn(5, classes), torch.tensor([0, -100, 2, 1, -100])
    outputs.requires_grad_()
    values, right = loss.per_sample(outputs, targets), loss.accuracy(outputs, targets)
    counted = targets != -100
    expected = functional.cross_entropy(outputs, targets, reduction="none")
    torch.testing.assert_close(values[counted], expected[counted])
    torch.testing.assert_close(right[counted], (outputs.argmax(1) == targets)[counted].float())
    assert values.isnan().tolist() == right.isnan().tolist() == (~counted).tolist()
    (gradient,) = torch.autograd.grad(values[counted].sum(), outputs)
    assert gradient.isfinite().all()


def test_causal_language_model_predicts_the_next_token() -> None:
    outputs, tokens = drawn(2, 6, 11), torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    by_hand = torch.stack(
        [functional.cross_entropy(o[:-1], t[1:]) for o, t in zip(outputs, tokens, strict=True)]
    )
    torch.testing.assert_close(get_loss("causal_lm").per_sample(outputs, tokens), by_hand)
    right = (outputs[:, :-1].argmax(2) == tokens[:, 1:]).float().mean(1)
    torch.testing.assert_close(get_loss("causal_lm").accuracy(outputs, tokens), right)


def test_mse_takes_the_outputs_shape_or_class_indices() -> None:
    mse, outputs = get_loss("mse"), drawn(4, 3)
    one_hot = functional.one_hot(torch.tensor([0, 2, 1, 1]), 3).float()
    expected = (outputs - one_hot).square().mean(1)
    torch.testing.assert_close(mse.per_sample(outputs, one_hot), expected)
    torch.testing.assert_close(mse.per_sample(outputs, torch.tensor([0, 2, 1, 1])), expected)
    torch.testing.assert_close(
        mse.per_sample(drawn(4, 1), drawn(4, seed=2)), (drawn(4) - drawn(4, seed=2)) ** 2
    )


def test_mse_never_broadcasts_targets_against_outputs() -> None:
    with pytest.raises(ValueError, match=r"outputs are \(4, 3\), but targets are \(3,\)"):
        get_loss("mse").per_sample(drawn(4, 3), drawn(3))


def test_bce_with_logits_equals_pytorch_and_counts_signs_as_accuracy() -> None:
    bce, outputs, targets = get_loss("bce_with_logits"), drawn(9, 1), (torch.arange(9) % 2)
    expected = functional.binary_cross_entropy_with_logits(outputs[:, 0], targets.float(), reduction="none")
    torch.testing.assert_close(bce.per_sample(outputs, targets), expected)
    torch.testing.assert_close(bce.accuracy(outputs, targets), ((outputs[:, 0] > 0) == (targets > 0)).float())


def test_half_precision_outputs_give_a_float32_loss() -> None:
    values = get_loss("cross_entropy").per_sample(drawn(4, 3).bfloat16(), torch.arange(4) % 3)
    assert values.dtype == torch.float32


def test_accuracy_without_class_targets_says_so() -> None:
    with pytest.raises(ValueError, match="accuracy needs class targets"):
        get_loss("mse").accuracy(drawn(4, 1), drawn(4, 1))
    with pytest.raises(ValueError, match="accuracy needs one output per class"):
        get_loss("cross_entropy").accuracy(drawn(4), torch.arange(4))


def test_an_unknown_loss_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"'hinge'; there are cross_entropy, mse"):
        get_loss("hinge")


def label_smoothed(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, targets, label_smoothing=0.1)


@pytest.mark.parametrize(
    "callable_", [functional.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")]
)
def test_a_pytorch_criterion_becomes_a_loss_per_sample_and_is_not_changed(callable_: object) -> None:
    outputs, targets = drawn(7, 20), torch.arange(7)
    loss = as_loss(callable_)  # type: ignore[arg-type]
    expected = functional.cross_entropy(outputs, targets, reduction="none")
    torch.testing.assert_close(loss.per_sample(outputs, targets), expected)
    assert getattr(callable_, "reduction", "sum") in ("mean", "sum")


def test_a_callable_without_reduction_is_evaluated_sample_by_sample() -> None:
    outputs, targets = drawn(7, 4), torch.arange(7) % 4
    loss = as_loss(label_smoothed)
    assert loss.name == "label_smoothed"
    torch.testing.assert_close(loss(outputs, targets), label_smoothed(outputs, targets))
    assert loss.per_sample(outputs, targets).shape == (7,)


def test_a_loss_passes_through_as_loss() -> None:
    loss = get_loss("mse")
    assert isinstance(loss, Loss)
    assert as_loss(loss) is loss
