"""Hostile files: nothing of them runs, and nothing of them makes us allocate without bound."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_makers import assert_same, save_distributed, small_state

from dynprobe.io.checkpoints import open_runs
from dynprobe.io.errors import UnreadableCheckpoint
from dynprobe.io.inert import InertUnpickler, Stub
from dynprobe.io.readers import open_file
from dynprobe.io.readers.torch_zip import read_archive
from dynprobe.io.state_search import find_state


class Payload:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def payloads(sentinel: Path) -> dict[str, Any]:
    touch = f"open({str(sentinel)!r}, 'w').close()"
    system = Payload(os.system, f"touch {sentinel}")
    return {
        "os.system": system,
        "eval": Payload(eval, touch),
        "exec": Payload(exec, touch),
        "nested getattr": Payload(eval, Payload(getattr, Payload(str, touch), "lower")),
        "chain": Payload(list, Payload(map, eval, [touch])),
        "as a key": {"inner": [system, {"deep": (system,)}]},
        "as a tensor's hook": Payload(torch._utils._rebuild_parameter, torch.ones(2), False, system),
        "as a tensor's rebuild": Payload(
            torch._tensor._rebuild_from_type_v2, os.system, str, (f"touch {sentinel}",), {}
        ),
    }


NAMES = list(payloads(Path("x")))


@pytest.mark.parametrize("new_zip", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_no_code_of_a_file_runs_and_its_weights_are_still_read(tmp_path, name, new_zip):
    sentinel = tmp_path / "ran"
    tree = {"state_dict": small_state(), "payload": payloads(sentinel)[name]}
    torch.save(tree, tmp_path / "c.pt", _use_new_zipfile_serialization=new_zip)
    opened = open_file(tmp_path / "c.pt")
    assert_same(opened.load(), small_state())
    (run,) = open_runs([str(tmp_path / "c.pt")])
    assert_same(run.checkpoints[0].load().state, small_state())
    assert not sentinel.exists()


def test_the_same_file_does_run_its_code_when_read_carelessly(tmp_path):
    # Without this the tests above could pass because the payload is broken.
    sentinel = tmp_path / "ran"
    torch.save({"payload": payloads(sentinel)["os.system"]}, tmp_path / "c.pt")
    torch.load(tmp_path / "c.pt", weights_only=False)
    assert sentinel.exists()


def test_code_in_distributed_metadata_does_not_run(tmp_path):
    sentinel = tmp_path / "ran"
    save_distributed(tmp_path / "dcp", {"model": small_state()})
    file = tmp_path / "dcp" / ".metadata"
    metadata = pickle.loads(file.read_bytes())  # our own file
    metadata.storage_meta = payloads(sentinel)["os.system"]
    file.write_bytes(pickle.dumps(metadata))
    assert_same(open_file(tmp_path / "dcp").load(), small_state())
    assert not sentinel.exists()


def test_nothing_is_imported(tmp_path):
    data = b"cantigravity\nfly\n(tR."
    assert "antigravity" not in sys.modules
    value = InertUnpickler(data, where="x").load()
    assert isinstance(value, Stub)
    assert value.qualified_name == "antigravity.fly"
    assert "antigravity" not in sys.modules


def unpickle(data: bytes) -> Any:
    return InertUnpickler(data, where="c.pt").load()


@pytest.mark.parametrize(
    ("what", "data"),
    [
        (
            "state of a function",
            b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aI1\nsb.",
        ),
        (
            "slots of a function",
            b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x01\x00\x00\x00aI1\ns\x86b.",
        ),
        ("state of a stub's class", b"cx\ny\n}X\x0a\x00\x00\x00__module__I1\nsb."),
        ("state of a dtype", b"ctorch\nfloat32\n}X\x01\x00\x00\x00aI1\nsb."),
        ("an allow-listed function as a class", b"(I1\nitorch\nSize\n."),
        ("the extension registry", b"\x82\x01."),
        ("an absurd memo", b"]r\xff\xff\xff\x7f."),
        ("a length outside the file", b"\x8e" + struct.pack("<Q", 1 << 40) + b"x."),
        ("a bytearray outside the file", b"\x96" + struct.pack("<Q", 1 << 40) + b"x."),
        ("bytes of a given size", b"cbuiltins\nbytes\n(I99999999999\ntR."),
        ("a bytearray of a given size", b"cbuiltins\nbytearray\n(I99999999999\ntR."),
        ("a persistent id", b"I1\nQ."),
        ("no end", b"]"),
        ("nothing", b""),
    ],
)
def test_pickles_that_no_checkpoint_needs_are_refused(what, data):
    with pytest.raises(UnreadableCheckpoint, match=r"c\.pt"):
        unpickle(data)


def test_refused_pickles_change_nothing_in_this_process():
    before = InertUnpickler._tensor.__defaults__
    with pytest.raises(UnreadableCheckpoint):
        unpickle(b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__I1\ns\x86b.")
    assert InertUnpickler._tensor.__defaults__ is before


def test_many_nested_containers_are_walked_once():
    # Ten levels of ten references each: 10^10 paths, eleven objects.
    nested: Any = torch.ones(1)
    for _ in range(10):
        nested = {str(i): nested for i in range(10)}
    buffer = io.BytesIO()
    torch.save({"state_dict": small_state(), "bomb": nested}, buffer)
    tree = read_archive(Path("c.pt"), stream=buffer).unpickler.load()
    found, _ = find_state(tree, "x")
    assert found.path == ("state_dict",)


def test_copying_one_list_again_and_again_is_stopped():
    # A list of 100,000 items, then ten thousand sets made of it.
    items = list(range(100_000))
    data = pickle.dumps(items, protocol=2)[:-1]  # leaves the list on the stack, memoised as 0
    data += b"0" + b"cbuiltins\nset\nh\x00\x85R0" * 10_000 + b"N."
    with pytest.raises(UnreadableCheckpoint, match="too often"):
        unpickle(data)


# -- sizes, offsets, strides ---------------------------------------------------------------------------------


def forged(tmp_path: Path, *, numel: Any = 4, offset: Any = 0, size: Any = (4,), stride: Any = (1,)) -> Path:
    """Write a torch zip of one tensor of four floats with the given claims."""

    class Tensor:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, {})

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"w": Tensor()})
    path = tmp_path / "c.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c/data.pkl", buffer.getvalue())
        archive.writestr("c/data/0", struct.pack("<4f", 1, 2, 3, 4))
    return path


def test_forged_file_with_honest_claims_is_read(tmp_path):
    state = open_file(forged(tmp_path, offset=1, size=(2,))).load()
    assert state["w"].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    "claims",
    [
        {"numel": 5},
        {"numel": 1 << 40},
        {"numel": -1},
        {"numel": "4"},
        {"size": (5,)},
        {"size": (1 << 40,)},
        {"offset": 1},
        {"offset": -1},
        {"stride": (2,)},
        {"stride": (-1,), "offset": 3},
        {"size": (-4,)},
        {"size": (1 << 62, 1 << 62), "stride": (0, 0)},
        {"size": (1 << 40,), "stride": (0,)},
        {"size": (2, 2)},
        {"size": (1,) * 100, "stride": (1,) * 100},
        {"size": 4},
        {"offset": 1.5},
    ],
)
def test_tensors_that_reach_outside_their_storage_are_refused(tmp_path, claims):
    with pytest.raises(UnreadableCheckpoint, match=r"c\.pt"):
        open_file(forged(tmp_path, **claims))


def test_checked_tensors_cannot_be_changed_by_the_pickle(tmp_path):
    class Changed:
        def __reduce__(self) -> Any:
            call = torch._utils._rebuild_tensor_v2
            return call, (torch.FloatStorage(4), 0, (4,), (1,), False, {}), {"offset": 1 << 30, "shape": (9,)}

    with pytest.warns(UserWarning, match="TypedStorage"):
        torch.save({"w": Changed()}, tmp_path / "c.pt")
    with pytest.raises(UnreadableCheckpoint, match="after its bounds were checked"):
        open_file(tmp_path / "c.pt")


# -- archives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_zip", [True, False])
def test_truncation_anywhere_is_a_clear_error_and_never_a_crash(tmp_path, new_zip):
    tree = {"model": small_state(), "args": Payload(list)}
    torch.save(tree, tmp_path / "c.pt", _use_new_zipfile_serialization=new_zip)
    whole = (tmp_path / "c.pt").read_bytes()
    for length in range(1, len(whole), 97):
        (tmp_path / "d.pt").write_bytes(whole[:length])
        with pytest.raises(UnreadableCheckpoint, match=r"d\.pt"):
            open_file(tmp_path / "d.pt").load()


@pytest.mark.parametrize("new_zip", [True, False])
def test_flipped_bytes_never_crash(tmp_path, new_zip):
    tree = {"model": small_state(), "args": Payload(list)}
    torch.save(tree, tmp_path / "c.pt", _use_new_zipfile_serialization=new_zip)
    whole = bytearray((tmp_path / "c.pt").read_bytes())
    for position in range(0, len(whole), 61):
        damaged = whole.copy()
        damaged[position] ^= 0xFF
        (tmp_path / "d.pt").write_bytes(damaged)
        (run,) = open_runs([str(tmp_path / "d.pt")])
        if not run.checkpoints[0].problem:
            with contextlib.suppress(UnreadableCheckpoint):  # the one exception allowed
                run.checkpoints[0].load()


@pytest.mark.parametrize("member", ["c/data.pkl", "c/data/0"])
def test_zip_bomb_is_refused_without_unpacking_it(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        if member != "c/data.pkl":
            archive.writestr("c/data.pkl", b"N.")
        archive.writestr(member, bytes(200_000_000))
    assert (tmp_path / "c.pt").stat().st_size < 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableCheckpoint, match="would unpack to"):
            open_file(tmp_path / "c.pt")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_archive_with_a_member_twice_is_refused(tmp_path):
    torch.save(small_state(), tmp_path / "c.pt")
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile(tmp_path / "c.pt", "a") as archive,
    ):
        archive.writestr("c/data.pkl", b"N.")
    with pytest.raises(UnreadableCheckpoint, match="twice"):
        open_file(tmp_path / "c.pt")


def test_storage_without_data_is_refused(tmp_path):
    torch.save(small_state(), tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "c.pt") as old, zipfile.ZipFile(tmp_path / "d.pt", "w") as new:
        for name in old.namelist():
            if not name.endswith("data/0"):
                new.writestr(name, old.read(name))
    with pytest.raises(UnreadableCheckpoint, match="storage '0' is missing"):
        open_file(tmp_path / "d.pt")


def test_module_that_contains_itself_is_refused(tmp_path):
    module = torch.nn.Linear(2, 2)
    module._modules["me"] = module
    torch.save(module, tmp_path / "c.pt")
    with pytest.raises(UnreadableCheckpoint, match="contains itself"):
        open_file(tmp_path / "c.pt")
