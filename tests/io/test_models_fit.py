"""From a name to a module; every misfit of a checkpoint is found, listed and guessed at before compute."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from dynprobe.io.errors import InputError, UntrustedCode, WrongModel
from dynprobe.io.models import build_model, fit_state
from dynprobe.io.spec import Spec


def cnn(**args) -> nn.Module:
    return build_model(Spec("builtin:cnn", {"width": 2, **args}))


def fits(model: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    fitted, notes = fit_state(model, state, where="runs/a/step_400.pt")
    assert list(fitted) == list(model.state_dict())
    model.load_state_dict(fitted, strict=True)
    return notes


def refusal(model: nn.Module, state: dict[str, torch.Tensor]) -> WrongModel:
    with pytest.raises(WrongModel) as caught:
        fit_state(model, state, where="runs/a/step_400.pt")
    return caught.value


class TestBuild:
    def test_a_model_is_built_in_eval_mode_with_the_same_values_each_time_and_global_rng_untouched(self):
        before = torch.get_rng_state()
        first, second = cnn(), cnn()
        assert torch.equal(torch.get_rng_state(), before)
        assert not first.training
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))

    @pytest.mark.parametrize(
        ("name", "args", "expected"),
        [
            ("builtin:cn", {}, "Did you mean 'cnn'?"),
            ("builtin:cnn", {"widht": 3}, "builtin:cnn has no argument 'widht'. Did you mean 'width'?"),
            ("builtin:cnn", {"width": "wide"}, "builtin:cnn with arguments (width='wide') fails"),
            ("builtin:mlp", {"activation": "rleu"}, "relu, tanh"),
            ("builtin:resnet20", {"depth": 8}, "has no argument 'depth'"),
            ("resnet", {}, "'resnet' names no model. Give one of: builtin:NAME"),
            ("collections:OrderedDict", {}, "returned a OrderedDict, not a torch.nn.Module"),
            ("hf", {}, "--model hf:FOLDER"),
        ],
    )
    def test_what_cannot_be_built_is_named(self, name, args, expected):
        with pytest.raises(WrongModel) as caught:
            build_model(Spec(name, args))
        assert expected in f"{caught.value} {caught.value.tip}"

    def test_an_own_callable_is_called_with_the_arguments(self):
        model = build_model(Spec("torch.nn:Linear", {"in_features": 3, "out_features": 2}))
        assert model.weight.shape == (2, 3)


class TestLibraries:
    """torchvision and timm are stood in for: neither is a dependency."""

    @pytest.mark.parametrize("name", ["torchvision", "timm"])
    def test_a_missing_library_says_how_to_install_it(self, name, monkeypatch):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.models", None)
        with pytest.raises(InputError) as caught:
            build_model(Spec(f"{name}:resnet18"))
        assert f"pip install {name}" in caught.value.tip

    @pytest.fixture
    def timm(self, monkeypatch):
        library = types.ModuleType("timm")
        library.is_model = lambda name: name == "tiny"
        library.list_models = lambda: ["tiny"]
        library.create_model = lambda name, width=3, pretrained=False: nn.Linear(2, width)
        monkeypatch.setitem(sys.modules, "timm", library)

    @pytest.fixture
    def torchvision(self, monkeypatch):
        models = types.ModuleType("torchvision.models")
        models.list_models = lambda: ["tiny"]
        models.get_model_builder = lambda name: lambda *, weights=None, width=3: nn.Linear(2, width)
        library = types.ModuleType("torchvision")
        library.models = models
        monkeypatch.setitem(sys.modules, "torchvision", library)
        monkeypatch.setitem(sys.modules, "torchvision.models", models)

    @pytest.mark.usefixtures("timm", "torchvision")
    @pytest.mark.parametrize("library", ["timm", "torchvision"])
    def test_a_librarys_model_is_built_by_name(self, library):
        assert build_model(Spec(f"{library}:tiny", {"width": 5}, "dynprobe.toml")).out_features == 5
        with pytest.raises(WrongModel, match=f"There is no {library}:tny") as caught:
            build_model(Spec(f"{library}:tny"))
        assert "'tiny'" in caught.value.tip

    @pytest.mark.usefixtures("timm")
    def test_a_manifest_may_not_make_a_library_load_files(self):
        with pytest.raises(UntrustedCode, match="pretrained=True"):
            build_model(Spec("timm:tiny", {"pretrained": True}, "dynprobe.toml"))


class TestFit:
    def test_an_exact_match_needs_no_notes_and_keeps_values_and_dtype(self):
        model = cnn()
        state = {name: tensor.clone() for name, tensor in reversed(list(model.state_dict().items()))}
        state["fc.weight"] = state["fc.weight"].half()
        assert fits(model, state) == []
        fitted, _ = fit_state(model, state, where="x")
        assert fitted["fc.weight"] is state["fc.weight"]

    @pytest.mark.parametrize(
        "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "net.", "model.", "a.b.c.d."]
    )
    def test_a_common_prefix_is_stripped_and_said(self, prefix):
        notes = fits(cnn(), {prefix + name: tensor for name, tensor in cnn().state_dict().items()})
        assert notes == [f"stripped the prefix {prefix!r}"]

    def test_a_prefix_that_the_model_has_is_added(self):
        model = nn.Sequential()
        model.add_module("net", cnn())
        assert fits(model, dict(cnn().state_dict())) == ["added the prefix 'net.'"]

    def test_swa_counters_and_other_entries_outside_the_prefix_are_ignored_and_said(self):
        state = {f"module.{name}": tensor for name, tensor in cnn().state_dict().items()}
        notes = fits(cnn(), {"n_averaged": torch.tensor(3), **state, "metric.total": torch.zeros(2)})
        assert notes[1] == "ignored 2 entries outside it: n_averaged, metric.total"

    def test_of_a_model_and_its_average_the_model_is_taken(self):
        state = cnn().state_dict()
        both = {f"ema_model.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
        both |= {f"model.{name}": tensor for name, tensor in state.items()}
        fitted, notes = fit_state(cnn(), both, where="x")
        assert fitted["fc.weight"] is both["model.fc.weight"]
        assert "ignored" in notes[1]

    def test_two_copies_that_nothing_tells_apart_are_refused(self):
        state = cnn().state_dict()
        both = {f"{part}.{name}": tensor for part in ("left", "right") for name, tensor in state.items()}
        assert "more than once, under left., right." in str(refusal(cnn(), both))

    def test_batchnorm_counters_that_old_checkpoints_lack_are_zero(self):
        state = {k: v for k, v in cnn().state_dict().items() if not k.endswith("num_batches_tracked")}
        assert fits(cnn(), state) == ["3 BatchNorm counters (num_batches_tracked) are missing and set to 0"]

    def test_a_tied_weight_stored_once_serves_both_names(self):
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        assert fits(model, {"embed.weight": torch.ones(5, 3)}) == ["'head.weight' is tied to 'embed.weight'"]
        differing = {"embed.weight": torch.ones(5, 3), "head.weight": torch.zeros(5, 3)}
        assert "one tensor in the model, but differ in the checkpoint" in str(refusal(model, differing))

    def test_a_wrong_number_of_classes_is_guessed(self):
        error = refusal(cnn(classes=100), dict(cnn().state_dict()))
        assert "runs/a/step_400.pt" in str(error)
        assert "'fc.weight' is (10, 8), the model expects (100, 8)." in str(error)
        assert error.tip == "Was it trained with 10 classes? Try --model-arg classes=10."

    def test_a_wrong_width_is_guessed(self):
        assert refusal(cnn(width=4), dict(cnn().state_dict())).tip == "Try --model-arg width=2."
        plain = dict(cnn(batch_norm=False).state_dict())
        assert refusal(cnn(), plain).tip == "Try --model-arg batch_norm=false."

    def test_another_builtin_is_guessed(self):
        state = build_model(Spec("builtin:lstm", {"width": 4})).state_dict()
        assert (
            "--model builtin:lstm --model-arg inputs=28 --model-arg width=4"
            in refusal(cnn(), dict(state)).tip
        )

    def test_the_argument_of_an_own_factory_is_guessed_by_its_name(self, tmp_path):
        path = tmp_path / "own_net.py"
        path.write_text("from torch import nn\ndef make(num_classes=7): return nn.Linear(3, num_classes)\n")
        error = refusal(build_model(Spec(f"{path}:make")), dict(nn.Linear(3, 10).state_dict()))
        assert error.tip == "Was it trained with 10 classes? Try --model-arg num_classes=10."

    def test_all_misfits_are_listed_with_the_nearest_names(self):
        state = dict(cnn().state_dict())
        state["conv1.wieght"] = state.pop("conv1.weight")
        state["fc.bias"] = torch.zeros(3)
        del state["bn2.bias"]
        state["extra"] = torch.zeros(1)
        text = str(refusal(cnn(), state))
        assert "'conv1.weight' is missing; the nearest left in the checkpoint is 'conv1.wieght'." in text
        assert "'fc.bias' is (3,), the model expects (10,)." in text
        assert "'bn2.bias' is missing" in text
        assert "'extra' is not in the model." in text

    def test_a_long_list_of_misfits_is_cut_and_counted(self):
        state = build_model(Spec("builtin:resnet20", {"width": 2})).state_dict()
        wide = build_model(Spec("builtin:resnet20", {"width": 4}))
        text = str(refusal(wide, dict(state)))
        assert len(text.splitlines()) == 22
        assert "more." in text

    def test_nothing_in_common_is_said_in_one_line(self):
        text = str(refusal(cnn(), {"foo": torch.zeros(2)}))
        assert "none of the model's" in text
        assert "the checkpoint has foo" in text

    def test_quantised_weights_do_not_pass_for_weights(self):
        state = dict(cnn().state_dict())
        state["fc.weight"] = state["fc.weight"].to(torch.int8)
        assert "'fc.weight' is int8, the model expects float32." in str(refusal(cnn(), state))


class Exportable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc, self.drop = (
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.Linear(3, 4),
            nn.Dropout(),
        )

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of exported programs, and the model they were made of."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model, x = Exportable().eval(), torch.randn(3, 1, 6, 6)
    batch = ({0: torch.export.Dim("batch")},)
    for name, module, shapes in [
        ("arch", model, batch),
        ("fixed", model, None),
        ("train", Exportable(), batch),
    ]:
        torch.export.save(torch.export.export(module, (x,), dynamic_shapes=shapes), folder / f"{name}.pt2")
    return folder, model


class TestExported:
    def test_any_checkpoint_and_batch_size_pass_through_it(self, exported):
        folder, _ = exported
        built = build_model(Spec(str(folder / "arch.pt2")))
        other = Exportable().eval()
        built.load_state_dict(fit_state(built, other.state_dict(), where="x")[0])
        for n in (1, 2, 7):
            x = torch.randn(n, 1, 6, 6)
            torch.testing.assert_close(built(x), other(x))
        assert built.train().eval().training is False

    def test_its_hessian_product_and_per_sample_gradients_are_those_of_the_model(self, exported):
        folder, model = exported
        built = build_model(Spec(str(folder / "arch.pt2")))
        x, y = torch.randn(5, 1, 6, 6), torch.arange(5) % 4

        def curvature(module):
            p = {k: v.detach() for k, v in module.named_parameters()}

            def slope(q):
                return nn.functional.cross_entropy(functional_call(module, q, (x,)), y)

            return grad(lambda q: sum(g.square().sum() for g in grad(slope)(q).values()))(p)

        def each(module):
            p = {k: v.detach() for k, v in module.named_parameters()}

            def loss(q, a, b):
                return nn.functional.cross_entropy(functional_call(module, q, (a[None],)), b[None])

            return vmap(grad(loss), (None, 0, 0))(p, x, y)

        for compute in (curvature, each):
            torch.testing.assert_close(compute(built), compute(model))

    def test_a_copy_is_another_module_with_the_same_names_and_values(self, exported):
        built = build_model(Spec(str(exported[0] / "arch.pt2")))
        twin = copy.deepcopy(copy.deepcopy(built)).eval()
        assert list(twin.state_dict()) == list(built.state_dict())
        x = torch.randn(4, 1, 6, 6)
        assert torch.equal(twin(x), built(x))
        nn.init.zeros_(twin.get_parameter("fc.weight"))
        assert not torch.equal(twin(x), built(x))

    @pytest.mark.parametrize(
        ("name", "expected"),
        [("fixed.pt2", "fixed batch size"), ("train.pt2", "training mode"), ("none.pt2", "no such file")],
    )
    def test_a_program_that_would_mislead_is_refused(self, exported, name, expected):
        with pytest.raises(WrongModel, match=expected):
            build_model(Spec(str(exported[0] / name)))

    def test_a_file_that_is_no_program_is_refused(self, tmp_path):
        (tmp_path / "arch.pt2").write_bytes(b"PK nonsense")
        with pytest.raises(WrongModel, match=r"not a torch\.export program"):
            build_model(Spec(str(tmp_path / "arch.pt2")))
