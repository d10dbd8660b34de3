"""Transformers models from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad

from dynprobe.io.errors import InputError, WrongModel
from dynprobe.io.models import build_model, fit_state
from dynprobe.io.spec import Spec

GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 16}
GPT2 |= {"architectures": ["GPT2LMHeadModel"], "dtype": "bfloat16"}
BERT = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 11,
}
BERT |= {"intermediate_size": 8, "architectures": ["BertForSequenceClassification"], "num_labels": 3}


def folder(tmp_path: Path, config: dict) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def _transformers():
    pytest.importorskip("transformers")


def test_the_named_architecture_is_built_in_float32_and_returns_logits(tmp_path):
    model = build_model(Spec(f"hf:{folder(tmp_path, GPT2)}"))
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert model.dtype == torch.float32
    logits = model(input_ids=torch.arange(6).reshape(2, 3))
    assert logits.shape == (2, 3, 11)


def test_config_may_be_given_as_an_argument_and_overridden(tmp_path):
    config = folder(tmp_path, BERT) / "config.json"
    model = build_model(Spec("hf", {"config": str(config), "num_labels": 5}))
    assert model(input_ids=torch.zeros(2, 4, dtype=torch.long)).shape == (2, 5)


def test_the_tied_head_may_be_missing_and_a_base_model_fits(tmp_path):
    model = build_model(Spec(f"hf:{folder(tmp_path, GPT2)}"))
    whole = {k: torch.randn_like(v) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    fitted, notes = fit_state(model, whole, where="x")
    assert fitted["lm_head.weight"] is whole["transformer.wte.weight"]
    assert notes == ["'lm_head.weight' is tied to 'transformer.wte.weight'"]
    base = {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}
    fitted, notes = fit_state(model, base, where="x")
    assert set(fitted) == set(model.state_dict())
    assert notes[0] == "added the prefix 'transformer.'"


def test_attention_can_be_differentiated_twice(tmp_path):
    model = build_model(Spec(f"hf:{folder(tmp_path, GPT2)}"))
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    tokens = torch.arange(6).reshape(2, 3)

    def loss(p):
        return functional_call(model, p, (), {"input_ids": tokens}).square().mean()

    second = grad(lambda p: sum(g.square().sum() for g in grad(loss)(p).values()))(parameters)
    assert all(torch.isfinite(g).all() for g in second.values())
    assert float(second["transformer.h.0.attn.c_attn.weight"].abs().max()) > 0


def test_code_of_the_repository_is_not_run(tmp_path):
    (tmp_path / "own.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    config = {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    with pytest.raises(WrongModel, match="fails"):
        build_model(Spec(f"hf:{folder(tmp_path, config)}"))


@pytest.mark.parametrize("name", ["Trainer", "NoSuchModel", "pipeline"])
def test_an_architecture_that_is_no_model_is_refused(tmp_path, name):
    with pytest.raises(WrongModel, match=f"no model {name!r}"):
        build_model(Spec(f"hf:{folder(tmp_path, GPT2 | {'architectures': [name]})}"))


@pytest.mark.parametrize(("text", "expected"), [("{", "not valid JSON"), ("{}", "no 'model_type'")])
def test_a_config_that_is_none_is_refused(tmp_path, text, expected):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=expected):
        build_model(Spec(f"hf:{tmp_path}"))


def test_a_missing_config_is_refused(tmp_path):
    with pytest.raises(WrongModel, match=r"config\.json: cannot be read"):
        build_model(Spec(f"hf:{tmp_path}"))
