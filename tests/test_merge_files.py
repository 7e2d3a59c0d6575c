"""Merging as files: what is copied, and what a kill or a full disk leaves."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, environment
from made_checkpoints import LAYERS, MANY_LAYERS, rewrite, sha256, weights, write_adapter, write_base

from qwen_tune.artifacts.directory import resumable_directory
from qwen_tune.errors import QwenTuneError
from qwen_tune.merging.merge import merge
from qwen_tune.merging.safetensors_writer import PROGRESS
from qwen_tune.merging.target import check_free
from qwen_tune.model.tensor_files import header

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pair(tmp_path):
    """(base in one file, adapter)."""
    base = write_base(tmp_path / "base")
    return base, write_adapter(tmp_path / "adapter", base)


def test_what_only_the_base_has_is_copied_and_all_is_recorded(pair):
    base, adapter = pair
    merged = merge(adapter)
    before, after = weights(base), weights(merged)
    assert before.keys() == after.keys()
    facts = json.loads((merged / "merge.json").read_text())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("model.") and ("q_proj" in name or "up_proj" in name)}
    assert facts["changed"] == facts["planned"] == len(changed) == 2 * LAYERS
    assert facts["adapter_tensors"] == 4 * LAYERS
    assert facts["tensors"] == len(before)
    assert facts["files"] == {file.name: sha256(file) for file in merged.iterdir() if file.name != "merge.json"}
    config = json.loads((merged / "config.json").read_text())
    assert config["rope_theta"] == 1e6  # where Transformers 4 looks
    assert config["torch_dtype"] == "bfloat16"
    assert json.loads((merged / "preprocessor_config.json").read_text()) == {"size": 448}


START = """
import os, sys
from pathlib import Path
from qwen_tune.merging.merge import merge
import torch  # so that the next moments are the writing
merge(Path(sys.argv[1]), output=Path(sys.argv[2]))
"""


def test_tensors_may_begin_at_any_byte(pair, tmp_path):
    base, adapter = pair
    expected = weights(merge(adapter, output=tmp_path / "even"))
    tensors = {"model.three_bytes": torch.tensor([1, 2, 3], dtype=torch.uint8), **weights(base)}
    kinds = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
    head = header(((name, kinds[one.dtype], tuple(one.shape)) for name, one in tensors.items()), {"format": "pt"})
    data = [one.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for one in tensors.values()]
    (base / "model.safetensors").write_bytes(head + b"".join(data))
    merged = weights(merge(adapter, output=tmp_path / "odd"))
    assert torch.equal(merged.pop("model.three_bytes"), tensors["model.three_bytes"])
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


def test_a_kill_costs_the_file_that_was_written_and_no_other(tmp_path):
    files = 8
    base = write_base(tmp_path / "base", files=files, layers=MANY_LAYERS)
    adapter = write_adapter(tmp_path / "adapter", base, layers=MANY_LAYERS)
    whole = merge(adapter, output=tmp_path / "whole")
    target, part = tmp_path / "model", tmp_path / ".model.merging"
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(adapter), str(target)], cwd=ROOT, env=environment(), stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while len(list(part.glob("*.safetensors"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert not target.exists()  # nothing stands under its name
    done = json.loads((part / "merging.json").read_text())["shards"]
    assert 1 <= len(done) < files
    for name in done:
        os.utime(part / name, (1, 1))
    # One of them is damaged meanwhile: by its size and time it is what was written.
    damaged = sorted(done)[0]
    with (part / damaged).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(part / damaged, (1, 1))
    merge(adapter, output=target)
    assert not part.exists()
    as_they_were = {file.name for file in target.glob("*.safetensors") if file.stat().st_mtime == 1}
    assert as_they_were == set(done) - {damaged}
    assert {file.name: sha256(file) for file in whole.glob("*.safetensors")} == {
        file.name: sha256(file) for file in target.glob("*.safetensors")
    }


def test_what_another_merge_began_is_not_gone_on_with(tmp_path):
    base = write_base(tmp_path / "base", files=3)
    adapter = write_adapter(tmp_path / "adapter", base)
    part = tmp_path / ".model.merging"
    merge(adapter, output=tmp_path / "other")
    shutil.copytree(tmp_path / "other", part)
    (part / "merge.json").unlink()
    shards = {
        file.name: {"sha256": sha256(file), "bytes": file.stat().st_size, "changed": []}
        for file in part.glob("*.safetensors")
    }
    (part / "merging.json").write_text(json.dumps({"key": "of another adapter", "shards": shards}))
    for file in part.glob("*.safetensors"):
        os.utime(file, (1, 1))
    merged = merge(adapter, output=tmp_path / "model")
    assert all(file.stat().st_mtime > 1 for file in merged.glob("*.safetensors"))
    assert json.loads((merged / "merge.json").read_text())["changed"] == 2 * LAYERS


def test_two_merges_do_not_write_one_model(pair, tmp_path):
    import fcntl

    _, adapter = pair
    (tmp_path / ".model.merging").mkdir()
    holder = os.open(tmp_path / ".model.merging", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        with pytest.raises(QwenTuneError, match="another merge is writing it"):
            merge(adapter, output=tmp_path / "model")
    finally:
        os.close(holder)
    merge(adapter, output=tmp_path / "model")


def test_files_that_are_written_together_are_those_that_are_written_in_turn(tmp_path):
    base = write_base(tmp_path / "base", files=8, layers=MANY_LAYERS)
    adapter = write_adapter(tmp_path / "adapter", base, layers=MANY_LAYERS)
    written = [merge(adapter, output=tmp_path / f"by-{cores}", cores=cores) for cores in (1, 2, 3, 8)]
    files = [{file.name: sha256(file) for file in folder.iterdir()} for folder in written]
    assert files[0] == files[1] == files[2] == files[3]
    # A file that cannot be written ends the merge; those that stand are taken up by the next one.
    (tmp_path / ".model.merging").mkdir()
    last = sorted(base.glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-1000])
    os.utime(last, (1, 1))
    with pytest.raises(QwenTuneError):
        merge(adapter, output=tmp_path / "model", cores=8)
    last.write_bytes(whole)
    assert {f.name: sha256(f) for f in merge(adapter, output=tmp_path / "model", cores=8).iterdir()} == files[0]


def test_no_room_is_reported_and_what_is_whole_is_kept(tmp_path):
    base = write_base(tmp_path / "base", files=8)
    adapter = write_adapter(tmp_path / "adapter", base)
    *others, last = (file.stat().st_size for file in sorted(base.glob("*.safetensors")))
    limit = last - 1000
    assert max(others) < limit
    result = subprocess.run(
        [sys.executable, "-m", "qwen_tune", "merge", str(adapter), "--output", str(tmp_path / "model")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 2, result.stderr
    assert "there is no room for model-00008-of-00008.safetensors" in result.stderr
    assert "it resumes after the last whole file" in result.stderr
    assert not (tmp_path / "model").exists()
    kept = sorted(file.name for file in (tmp_path / ".model.merging").glob("*.safetensors*"))
    assert kept == [f"model-0000{n}-of-00008.safetensors" for n in range(1, 8)] + ["model.safetensors.index.json"]
    merge(adapter, output=tmp_path / "model")
    assert not (tmp_path / ".model.merging").exists()


def test_a_full_disk_is_reported_and_nothing_is_left(pair, small_disk, qwen_tune):
    _, adapter = pair
    result = qwen_tune("merge", str(adapter), "--output", str(small_disk / "model"))
    assert result.returncode == 2
    assert "GB are to be written" in result.stderr
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_on_the_way(pair, small_disk, monkeypatch):
    """What is free is reported wrongly at the start, as by a quota."""
    import qwen_tune.artifacts.directory as output_dir

    monkeypatch.setattr(output_dir, "SPARE_BYTES", -(1 << 40))
    with pytest.raises(QwenTuneError, match="there is no room for model"):
        merge(pair[1], output=small_disk / "model")
    assert not list(small_disk.iterdir())


def test_adapters_of_different_bases_are_not_merged_into_one(tmp_path):
    """Neither says more of its base than a name."""
    adapters = []
    for name in ("one", "other"):
        base = write_base(tmp_path / name / "base")
        if name == "other":
            rewrite(base / "model.safetensors", lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].mul_(2))
        adapters.append(write_adapter(tmp_path / name / "adapter", base))
    with pytest.raises(QwenTuneError, match="it names another base than"):
        merge(*adapters, output=tmp_path / "model")


def test_an_adapter_is_found_from_within_its_folder(pair, monkeypatch):
    monkeypatch.chdir(pair[1])
    assert merge(Path()) == pair[1].with_name("adapter-merged")


def test_what_somebody_puts_there_meanwhile_is_not_lost(tmp_path):
    target = tmp_path / "model"

    def write() -> None:
        with resumable_directory(target, PROGRESS, lambda: check_free(target, overwrite=False)) as part:
            (part / "model.safetensors").write_text("hours of work")
            (part / PROGRESS).write_text("{}")
            target.mkdir()
            (target / "thesis.txt").write_text("years")

    with pytest.raises(QwenTuneError, match="something that qwen-tune did not merge"):
        write()
    assert (target / "thesis.txt").read_text() == "years"
    assert (tmp_path / ".model.merging" / "model.safetensors").read_text() == "hours of work"


def test_a_link_is_followed(pair, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert merge(pair[1], output=tmp_path / "link") == tmp_path / "disk"
    assert (tmp_path / "link" / "merge.json").exists()
    assert (tmp_path / "link").is_symlink()


def test_a_mounted_disk_is_not_a_place_to_rename_to(pair, small_disk):
    with pytest.raises(QwenTuneError, match=r"a disk is mounted there.* --output .*/disk/model"):
        merge(pair[1], output=small_disk)


def test_other_weights_of_the_same_shapes_are_refused(tmp_path, qwen_tune, trained):
    """The adapter's file itself says what it was trained on: it may have come without its run."""
    run, _ = trained
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    shutil.copytree(TINY, tmp_path / "base")

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.25

    rewrite(tmp_path / "base" / "model.safetensors", change)
    result = qwen_tune("merge", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), cwd=tmp_path)
    assert result.returncode == 2
    assert "these are not the weights that the adapter was trained on" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_untied_base_is_not_taken_for_the_tied_one(tmp_path, trained):
    run, _ = trained
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    shutil.copytree(TINY, tmp_path / "base")
    config = json.loads((TINY / "config.json").read_text())
    assert config["tie_word_embeddings"] is True

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(tmp_path / "base" / "model.safetensors", change)
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(QwenTuneError, match="not the weights that the adapter was trained on"):
        merge(tmp_path / "adapter", base=str(tmp_path / "base"))
