"""Who may run code: the user who types its name; a manifest only with --trust."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dynprobe.io.code import names_code, resolve_callable
from dynprobe.io.data import load_data
from dynprobe.io.errors import InputError, UntrustedCode
from dynprobe.io.manifest import find_manifest
from dynprobe.io.models import build_model
from dynprobe.io.spec import Spec

MODULE = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("it_ran").touch()
def make(width=3): return nn.Linear(2, width)
value = 3
"""


@pytest.fixture
def code(tmp_path) -> Path:
    path = tmp_path / "user_net.py"
    path.write_text(MODULE, encoding="utf-8")
    return path


def ran(code: Path) -> bool:
    return code.with_name("it_ran").exists()


def test_a_file_named_on_the_command_line_runs(code):
    assert resolve_callable(Spec(f"{code}:make"), trust=False)(width=5).out_features == 5
    assert ran(code)


def test_a_module_in_the_current_folder_named_on_the_command_line_runs(code, monkeypatch):
    monkeypatch.chdir(code.parent)
    before = list(sys.path)
    assert resolve_callable(Spec("user_net:make"), trust=False)().out_features == 3
    assert sys.path == before
    sys.modules.pop("user_net")


def test_code_named_by_a_manifest_is_refused_and_the_message_says_what_would_run(code):
    (code.parent / "dynprobe.toml").write_text(
        '[model]\nfactory = "user_net.py:make"\nargs = { width = 4 }\n', encoding="utf-8"
    )
    spec = find_manifest(code.parent).model
    with pytest.raises(UntrustedCode) as caught:
        build_model(spec)
    for part in ("dynprobe.toml", str(code), "make(width=4)", "Nothing was run"):
        assert part in str(caught.value)
    assert "--trust" in caught.value.tip
    assert not ran(code)
    assert build_model(spec, trust=True).out_features == 4


def test_data_code_named_by_a_manifest_is_refused(code):
    with pytest.raises(UntrustedCode, match="make"):
        load_data(Spec(f"{code}:make", {}, "dynprobe.toml"))
    assert not ran(code)


def test_typed_arguments_do_not_make_a_manifests_code_trusted(code):
    from dynprobe.io.spec import merge_spec

    spec = merge_spec(None, {"width": 4}, Spec(f"{code}:make", {}, "dynprobe.toml"), "--model")
    with pytest.raises(UntrustedCode):
        build_model(spec)


def test_an_export_program_named_by_a_manifest_is_refused_because_it_can_hold_pickles(tmp_path):
    with pytest.raises(UntrustedCode, match=r"arch\.pt2"):
        build_model(Spec(str(tmp_path / "arch.pt2"), {}, "dynprobe.toml"))


def test_one_file_is_run_once_for_all_names_in_it(code):
    first = resolve_callable(Spec(f"{code}:make"), trust=False)
    code.with_name("it_ran").unlink()
    assert resolve_callable(Spec(f"{code}:make"), trust=False) is first
    assert not ran(code)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("{file}:mkae", "Did you mean 'make'?"),
        ("{file}:value", "is a int, not a callable"),
        ("nowhere.py:make", "nowhere.py: no such file"),
        ("no_such_module_here:make", "cannot be imported"),
        ("{file}", "names no callable"),
    ],
)
def test_what_cannot_be_resolved_is_named(code, name, expected):
    with pytest.raises(InputError) as caught:
        resolve_callable(Spec(name.format(file=code)), trust=False)
    assert expected in f"{caught.value} {caught.value.tip}"


def test_a_module_that_fails_when_imported_says_why_and_is_not_half_imported(tmp_path):
    path = tmp_path / "broken_net.py"
    path.write_text("def make(): pass\n1 / 0\n", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(InputError, match="fails when imported: ZeroDivisionError"):
            resolve_callable(Spec(f"{path}:make"), trust=False)


def test_names_of_code_are_told_from_files():
    assert names_code("pkg.mod:fn")
    assert names_code("dir/net.py:Net")
    assert not names_code("data.npz")
    assert not names_code("dir/data.npz:x")
