"""Weight files: what is read, what is refused, and that nothing in them runs."""

import hashlib
import json
import os
import pickle
import struct
import zipfile

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volcast.export.weights import LargeFiles, digest, entry, read_checkpoint, scalar, state_dict

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.ckpt"])
def test_formats(tmp_path, name):
    (safetensors.torch.save_file if "safe" in name else torch.save)(STATE, tmp_path / name)
    assert same(state_dict(read_checkpoint(tmp_path / name), (), tmp_path / name, "unet"), STATE)


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"unet_state_dict": STATE, "scale_factor": torch.tensor(0.9), "epoch": 3}, ()),
        ({"unet_state_dict": STATE, "scale_factor": torch.tensor(0.9)}, ("unet_state_dict",)),
        ({"ema": {"net": STATE}, "state_dict": {"x": torch.ones(1)}}, ("ema", "net")),
        ({"module." + key: value for key, value in STATE.items()}, ()),
        ({"state_dict": {"module." + key: value for key, value in STATE.items()}}, ()),
    ],
)
def test_wrappers_and_prefixes(tmp_path, content, keys):
    torch.save(content, tmp_path / "w.pt")
    assert same(state_dict(read_checkpoint(tmp_path / "w.pt"), keys, tmp_path / "w.pt", "unet"), STATE)


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (
            {"model": STATE, "state_dict": STATE},
            (),
            "entries are model, state_dict; .*--set unet_weights_key=NAME",
        ),
        ({"weights": STATE, "epoch": 1}, (), "entries are weights, epoch"),
        ({"model": STATE}, ("ema",), r"no entry 'ema' \(there: model\); .*unet_weights_key"),
        ({"model": 3}, ("model",), "'model' is no state dict"),
        ({"model": {"a": 3}}, ("model",), r"'a' is no plain tensor \(int\)"),
        ({"a": torch.ones(2).to_sparse()}, (), "'a' is no plain tensor"),
        ([1, 2], (), "holds a list, not a state dict"),
        ({}, (), "holds a dict, not a state dict"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, keys, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        state_dict(read_checkpoint(tmp_path / "w.pt"), keys, tmp_path / "w.pt", "unet")


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", ["torch", "legacy", "pickle"])
def test_pickled_code_is_not_run(tmp_path, save):
    canary = Canary(tmp_path / "canary")
    if save == "pickle":
        (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": canary}))
    else:
        torch.save({"a": canary}, tmp_path / "w.pt", _use_new_zipfile_serialization=save == "torch")
    with pytest.raises(ValueError, match=r"w\.pt: holds objects besides tensors; .*safetensors") as caught:
        read_checkpoint(tmp_path / "w.pt")
    assert "\n" not in str(caught.value) and not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(canary))
    assert (tmp_path / "canary").exists()  # the canary does sing where pickle is loaded


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("part", [0, 4, 0.5, 0.97])
def test_truncated(tmp_path, name, part):
    (safetensors.torch.save_file if "safe" in name else torch.save)(STATE, tmp_path / name)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[: int(part * len(raw)) if part < 1 else part])
    with pytest.raises(ValueError, match=f"{name}: (truncated or|is) not a weight file.*--weights"):
        read_checkpoint(tmp_path / name)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "gone.pt", tmp_path):
        with pytest.raises(ValueError, match="no such file; fetch it again"):
            read_checkpoint(path)


def test_scalars(tmp_path):
    for value in (0.5, torch.tensor(0.5), torch.tensor([[0.5]], dtype=torch.float64)):
        assert scalar(entry({"s": value}, ("s",), tmp_path, ""), tmp_path, ("s",)) == 0.5
    for value in ("0.5", torch.ones(2), None):
        with pytest.raises(ValueError, match="s is no number; give it with --set scale_factor"):
            scalar(value, tmp_path, ("s",))


def listing(tmp_path, **fields):
    (tmp_path / "w.pt").write_bytes(b"volcast")
    (tmp_path / "large_files.yml").write_text(json.dumps({"large_files": [{"path": "./w.pt", **fields}]}))
    LargeFiles(tmp_path).check(tmp_path / "w.pt")


def test_large_files(tmp_path):
    for kind in ("md5", "sha1", "sha256"):
        wanted = hashlib.new(kind, b"volcast").hexdigest()
        listing(tmp_path, hash_type=kind, hash_val=wanted)
        assert digest(tmp_path / "w.pt", kind) == wanted
        altered = ("1" if wanted[0] == "0" else "0") + wanted[1:]
        with pytest.raises(ValueError, match=f"its {kind} is not {altered}"):
            listing(tmp_path, hash_type=kind, hash_val=altered)
    listing(tmp_path, hash_val="")
    listing(tmp_path, hash_val=hashlib.md5(b"volcast").hexdigest(), url="https://example.org/w")
    with pytest.raises(ValueError, match="hash_type='crc': need md5, sha1 or sha256"):
        listing(tmp_path, hash_type="crc", hash_val="0")
    (tmp_path / "w.pt").unlink()
    (tmp_path / "large_files.yml").write_text(
        '{"large_files": [{"path": "w.pt", "url": "https://example.org/w"}]}'
    )
    with pytest.raises(ValueError, match="no such file; download https://example.org/w"):
        LargeFiles(tmp_path).check(tmp_path / "w.pt")
    LargeFiles(tmp_path).check(tmp_path / "other.pt")
    (tmp_path / "large_files.yml").write_text("large_files: 3")
    with pytest.raises(ValueError, match="large_files is not a list"):
        LargeFiles(tmp_path)


def mutated(raw, edits):
    data = bytearray(raw)
    for position, value, cut in edits:
        if cut:
            start = position % (len(data) + 1)
            del data[start : start + value + 1]
        elif data:
            data[position % len(data)] = value
    return bytes(data)


EDITS = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255), st.booleans()), min_size=1, max_size=4)
FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(edits=EDITS)
def test_fuzzed_safetensors(tmp_path, edits):
    raw = safetensors.torch.save(STATE)
    only_value_errors(tmp_path / "w.safetensors", mutated(raw, edits))


@FUZZ
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "BOOL", "I64", "U64", "F4", "X"]),
    "shape": st.lists(st.sampled_from([0, 1, 2, 3, -1, 2**40, 2**63]), max_size=3),
    "data_offsets": st.lists(st.sampled_from([0, 8, 16, 2**62]), min_size=2, max_size=2),
})), size=st.sampled_from([0, 8, 16]))  # fmt: skip
def test_fuzzed_safetensors_headers(tmp_path, header, size):
    text = json.dumps(header).encode()
    only_value_errors(tmp_path / "w.safetensors", struct.pack("<Q", len(text)) + text + bytes(size))


@FUZZ
@given(edits=EDITS, inside=st.booleans())
def test_fuzzed_checkpoints(tmp_path, edits, inside):
    source = tmp_path / "source.pt"
    if not source.exists():
        torch.save({"state_dict": STATE, "scale_factor": torch.tensor(0.9)}, source)
    raw = source.read_bytes()
    if not inside:
        return only_value_errors(tmp_path / "w.pt", mutated(raw, edits))
    # The pickle inside the archive, with the archive whole: checksums would stop most edits of the file itself.
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "w.pt", "w") as new:
        for item in old.namelist():
            data = old.read(item)
            new.writestr(item, mutated(data, edits) if item.endswith(".pkl") else data)
    only_value_errors(tmp_path / "w.pt", (tmp_path / "w.pt").read_bytes())


def only_value_errors(path, data):
    path.write_bytes(data)
    try:
        state = state_dict(read_checkpoint(path), (), path, "unet")
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(value, torch.Tensor) for value in state.values())
