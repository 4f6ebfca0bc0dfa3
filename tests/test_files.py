"""The saved directory: what is written comes back, and each damage is named in one sentence."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from foreword import files
from foreword.errors import InputError, RunError
from foreword.kv import KVPrefix, SiteKV

transformers.logging.set_verbosity_error()


def a_prefix(seed=0, size=4):
    """Two sites that differ in heads and in the size of their values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return KVPrefix(
        {
            "layers.0.attn": SiteKV(draw(1, 2, 3, size), draw(1, 2, 3, size)),
            "layers.1.attn": SiteKV(draw(1, 1, 3, size), draw(1, 1, 3, 2 * size)),
        }
    )


def header_of(kv, **more):
    return {
        "base": {"id": "some/base", "fingerprint": "0" * 16, "parameters": 1000},
        "prefix": {"form": "direct", "length": kv.length, "parameters": kv.numel()},
        "sites": [
            {"name": name, "kind": "decoder", "keys": list(site.keys.shape[1:]), "values": list(site.values.shape[1:])}
            for name, site in kv.sites.items()
        ],
        **more,
    }


def save(directory, kv, **more):
    files.write(directory, header_of(kv, **more), files.kv_tensors(kv))
    return directory


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "mine", a_prefix())


def content(directory):
    """Every file under a folder by its path, hidden ones too."""
    return {p.relative_to(directory): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


def equal(a, b):
    return a.sites.keys() == b.sites.keys() and all(
        torch.equal(x, y) for name in a.sites for x, y in zip(a.sites[name], b.sites[name], strict=True)
    )


def edit_header(directory, **changes):
    """Change keys of `prefix.json`; None removes one."""
    path = directory / files.HEADER
    header = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in header.items() if v is not None}), encoding="utf-8")


def redigest(directory):
    """Make the header vouch for the tensors that are there."""
    edit_header(directory, digest=hashlib.sha256((directory / files.TENSORS).read_bytes()).hexdigest())


def refused(sentence):
    return pytest.raises(InputError, match=sentence)


# ---- what is written comes back


def test_a_prefix_comes_back_as_it_was_written(tmp_path):
    kv = a_prefix()
    save(tmp_path / "deep" / "mine", kv, task={"task": "classify", "labels": ["α", "b"]})
    header, tensors = files.read(tmp_path / "deep" / "mine")
    assert equal(files.kv_from(header, tensors), kv)
    assert header["format"] == files.FORMAT
    assert header["task"] == {"task": "classify", "labels": ["α", "b"]}
    assert header["digest"] == hashlib.sha256((tmp_path / "deep" / "mine" / files.TENSORS).read_bytes()).hexdigest()


def test_a_directory_holds_header_tensors_and_card_and_nothing_lies_beside_it(saved):
    assert sorted(p.name for p in saved.iterdir()) == [files.CARD, files.HEADER, files.TENSORS]
    assert list(saved.parent.iterdir()) == [saved]


def test_tensors_are_kept_in_float32_without_the_batch_and_without_a_gradient(tmp_path):
    kv = a_prefix()
    half = KVPrefix({n: SiteKV(s.keys.bfloat16().requires_grad_(), s.values.bfloat16()) for n, s in kv.sites.items()})
    save(tmp_path / "half", half)
    tensors = load_file(tmp_path / "half" / files.TENSORS)
    assert set(tensors) == {f"{n}.{part}" for n in kv.sites for part in ("keys", "values")}
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert tensors["layers.1.attn.values"].shape == (1, 3, 8)
    assert torch.equal(tensors["layers.0.attn.keys"], half.sites["layers.0.attn"].keys[0].float())


def test_views_and_tensors_that_share_memory_are_written_whole(tmp_path):
    kv = a_prefix(size=8)
    views = KVPrefix(
        {n: SiteKV(s.keys.transpose(2, 3).contiguous().transpose(2, 3), s.keys[..., :8]) for n, s in kv.sites.items()}
    )
    save(tmp_path / "views", views)
    assert equal(files.kv_from(*files.read(tmp_path / "views")), views)


def test_a_tasks_own_tensors_are_kept_too(tmp_path):
    kv, head = a_prefix(), torch.arange(6.0).view(2, 3)
    files.write(tmp_path / "mine", header_of(kv), {**files.kv_tensors(kv), "head.weight": head})
    assert torch.equal(files.read(tmp_path / "mine")[1]["head.weight"], head)


def test_the_card_tells_base_length_labels_and_figures(tmp_path):
    training = {"test": {"accuracy": 0.91234, "rows": 500}}
    save(tmp_path / "mine", a_prefix(), task={"task": "classify", "labels": ["a", "b"]}, training=training)
    card = (tmp_path / "mine" / files.CARD).read_text(encoding="utf-8")
    for part in ("base_model: some/base", "3 virtual tokens", "labels: a, b", "| accuracy | 0.9123 |"):
        assert part in card


def test_an_existing_directory_is_replaced_whole(saved):
    (saved / "stray.txt").write_text("of the former prefix", encoding="utf-8")
    save(saved, a_prefix(seed=1))
    assert equal(files.kv_from(*files.read(saved)), a_prefix(seed=1))
    assert sorted(p.name for p in saved.iterdir()) == [files.CARD, files.HEADER, files.TENSORS]
    assert list(saved.parent.iterdir()) == [saved]


# ---- each damage is named


def test_a_directory_without_a_header_holds_no_prefix(tmp_path):
    with refused(rf"^{re.escape(str(tmp_path))} holds no saved prefix: prefix\.json is missing\.$"):
        files.read(tmp_path)


def test_a_directory_that_is_not_there_holds_no_prefix(tmp_path):
    with refused(r"nowhere holds no saved prefix: prefix\.json is missing\.$"):
        files.read(tmp_path / "nowhere")


def test_an_unfinished_training_is_told_from_an_empty_directory(tmp_path):
    (tmp_path / "training").mkdir()
    with refused(r"prefix\.json is missing \(its training has not finished; resume it with --resume\)\.$"):
        files.read(tmp_path)


@pytest.mark.parametrize("damage", [b'{"format": 1, "base"', b"", b"\xff\xfe\x00{"])
def test_a_header_that_is_not_json_is_damaged(saved, damage):
    (saved / files.HEADER).write_bytes(damage)
    with refused(r"prefix\.json is damaged: it is not valid JSON \(.+\); save the prefix again\.$"):
        files.read(saved)


@pytest.mark.parametrize("other", ["[1, 2]", '"text"', "null", '{"model": "x"}'])
def test_other_json_is_not_the_header_of_a_prefix(saved, other):
    (saved / files.HEADER).write_text(other, encoding="utf-8")
    with refused(r"prefix\.json is not the header of a prefix; save the prefix again\.$"):
        files.read(saved)


@pytest.mark.parametrize("version", [files.FORMAT + 1, 0, "1"])
def test_another_format_version_is_refused(saved, version):
    edit_header(saved, format=version)
    with refused(
        rf"has format version {version} and this foreword reads version {files.FORMAT}; "
        r"use the foreword that wrote it, or train again\.$"
    ):
        files.read(saved)


@pytest.mark.parametrize("key", [key for key in files.REQUIRED if key != "format"])
def test_a_header_that_lacks_a_key_is_damaged(saved, key):
    edit_header(saved, **{key: None})
    with refused(rf"prefix\.json is damaged: it lacks {key}; save the prefix again\.$"):
        files.read(saved)


def test_all_missing_keys_are_named_at_once(saved):
    (saved / files.HEADER).write_text('{"format": 1, "base": {}}', encoding="utf-8")
    with refused(r"it lacks prefix, sites, digest; save the prefix again\.$"):
        files.read(saved)


def test_missing_tensors_are_named(saved):
    (saved / files.TENSORS).unlink()
    with refused(r"mine is damaged: prefix\.safetensors is missing; save the prefix again\.$"):
        files.read(saved)


DIGEST = r"prefix\.safetensors is damaged or belongs to another prefix\.json \(its digest differs\); save the "


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_tensors_are_refused(saved, kept):
    path = saved / files.TENSORS
    path.write_bytes(path.read_bytes()[:kept])
    with refused(DIGEST):
        files.read(saved)


@pytest.mark.parametrize("place", [0, 20, -1])
def test_one_flipped_bit_is_refused(saved, place):
    path = saved / files.TENSORS
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with refused(DIGEST):
        files.read(saved)


def test_the_header_of_one_prefix_refuses_the_tensors_of_another(saved, tmp_path):
    other = save(tmp_path / "other", a_prefix(seed=1))
    (saved / files.TENSORS).write_bytes((other / files.TENSORS).read_bytes())
    with refused(DIGEST):
        files.read(saved)


@pytest.mark.parametrize("kept", [7, 100, -1])
def test_tensors_truncated_before_they_were_vouched_for_are_refused(saved, kept):
    path = saved / files.TENSORS
    path.write_bytes(path.read_bytes()[:kept])
    redigest(saved)
    with refused(r"prefix\.safetensors is damaged: .+; save the prefix again\.$"):
        files.read(saved)


def test_a_shape_that_differs_from_the_headers_is_refused(saved):
    tensors = load_file(saved / files.TENSORS)
    tensors["layers.1.attn.values"] = torch.zeros(1, 2, 8)
    save_file(tensors, saved / files.TENSORS)
    redigest(saved)
    with refused(r"layers\.1\.attn\.values has shape \[1, 2, 8\], the header says \[1, 3, 8\]\.$"):
        files.read(saved)


def test_a_site_without_tensors_is_refused(saved):
    tensors = load_file(saved / files.TENSORS)
    del tensors["layers.0.attn.keys"]
    save_file(tensors, saved / files.TENSORS)
    redigest(saved)
    with refused(r"layers\.0\.attn\.keys has shape None, the header says \[2, 3, 4\]\.$"):
        files.read(saved)


# ---- fingerprints


def a_base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def test_a_base_has_one_fingerprint_in_float32_and_bfloat16():
    base = a_base()
    found = files.fingerprint(base)
    assert re.fullmatch("[0-9a-f]{16}", found)
    assert files.fingerprint(a_base()) == found
    assert files.fingerprint(base.bfloat16()) == found


def test_the_fingerprint_changes_with_any_parameter():
    base = a_base()
    found = files.fingerprint(base)
    for name, parameter in base.named_parameters():
        before = parameter.detach().clone()
        parameter.data += 0.5
        assert files.fingerprint(base) != found, name
        parameter.data = before
    assert files.fingerprint(base) == found


def test_the_fingerprint_changes_with_a_name_or_a_shape():
    found = {
        files.fingerprint(torch.nn.ParameterDict({name: torch.zeros(shape)}))
        for name, shape in (("a", (2, 3)), ("b", (2, 3)), ("a", (3, 2)), ("a", (6,)))
    }
    assert len(found) == 4


# ---- saving fails


def full_disk(tensors, path):
    Path(path).write_bytes(b"half a file")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


NO_SPACE = r"^the prefix could not be saved to .*mine: No space left on device; nothing was changed there\.$"


def test_a_full_disk_keeps_the_former_prefix_and_leaves_nothing_beside_it(saved, monkeypatch):
    before = content(saved.parent)
    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(RunError, match=NO_SPACE):
        save(saved, a_prefix(seed=1))
    assert content(saved.parent) == before
    monkeypatch.undo()
    assert equal(files.kv_from(*files.read(saved)), a_prefix())


def test_a_full_disk_leaves_no_new_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(RunError, match=NO_SPACE):
        save(tmp_path / "mine", a_prefix())
    assert list(tmp_path.iterdir()) == []


SMALL_FILES_ONLY = """
import resource, signal, sys
import torch
from foreword import files
from foreword.errors import RunError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
header = {
    "base": {"id": "b", "fingerprint": "0", "parameters": 1},
    "prefix": {"form": "direct", "length": 1, "parameters": 1},
    "sites": [],
}
files.write(sys.argv[1], header, {"x": torch.zeros(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    files.write(sys.argv[1], header, {"x": torch.ones(10_000)})
except RunError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_file_system_that_really_takes_no_more_keeps_the_former_prefix(tmp_path):
    target = tmp_path / "mine"
    done = subprocess.run(
        [sys.executable, "-c", SMALL_FILES_ONLY, str(target)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"the prefix could not be saved to .*mine: .*File too large.*; nothing was changed there\.",
        done.stdout.strip(),
    )
    assert torch.equal(files.read(target)[1]["x"], torch.zeros(10))
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(RunError, match=r"could not be saved to .*file.mine: .+; nothing was changed there\.$"):
        save(tmp_path / "file" / "mine", a_prefix())
    assert (tmp_path / "file").read_text(encoding="utf-8") == "not a folder"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError, match=r": Permission denied; nothing was changed there\.$"):
            save(tmp_path / "mine", a_prefix())
    finally:
        tmp_path.chmod(0o700)


def failing_rename(monkeypatch, error):
    """Renaming into place fails; moving the former directory aside and back works."""
    rename = Path.rename

    def fail(self, target):
        if ".writing-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)


def test_a_rename_that_fails_keeps_the_former_prefix(saved, monkeypatch):
    before = content(saved.parent)
    failing_rename(monkeypatch, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(RunError, match=r"mine: Input/output error; nothing was changed there\.$"):
        save(saved, a_prefix(seed=1))
    assert content(saved.parent) == before


def test_an_interrupted_rename_keeps_the_former_prefix(saved, monkeypatch):
    before = content(saved)
    failing_rename(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save(saved, a_prefix(seed=1))
    assert content(saved) == before


def test_an_interrupted_write_leaves_nothing_beside(saved, monkeypatch):
    def interrupt(tensors, path):
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    before = content(saved.parent)
    monkeypatch.setattr(files, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(saved, a_prefix(seed=1))
    assert content(saved.parent) == before


def test_a_header_that_is_no_json_leaves_nothing_beside(saved):
    before = content(saved.parent)
    with pytest.raises(TypeError):
        save(saved, a_prefix(seed=1), training={"loss": torch.zeros(1)})
    assert content(saved.parent) == before


def test_what_a_killed_run_left_beside_does_not_stop_the_next_one(tmp_path):
    (tmp_path / f".mine.writing-{os.getpid()}").mkdir()
    save(tmp_path / "mine", a_prefix())
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_file_in_the_place_is_not_overwritten(tmp_path):
    (tmp_path / "mine").write_text("someone's notes", encoding="utf-8")
    with refused("is a file; a prefix is saved as a directory"):
        save(tmp_path / "mine", a_prefix())
    assert content(tmp_path) == {Path("mine"): b"someone's notes"}


def test_the_current_directory_can_be_the_place(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    save(".", a_prefix())
    assert equal(files.kv_from(*files.read(tmp_path / "mine")), a_prefix())


def test_a_link_to_a_directory_stays_a_link(saved, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(saved)
    save(link, a_prefix(seed=1))
    assert link.is_symlink()
    assert equal(files.kv_from(*files.read(saved)), a_prefix(seed=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "mine"]


@pytest.mark.parametrize("sites", [[{}], [{"name": "a"}], ["a"], 3, {"a": 1}])
def test_sites_that_are_no_sites_are_damage(saved, sites):
    edit_header(saved, sites=sites)
    with refused(r"prefix\.json is damaged"):
        files.read(saved)
