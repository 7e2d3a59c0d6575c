"""Merging as files: what is copied, what a kill or a full disk leaves, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, environment
from safetensors.torch import load_file, save_file

from qwen_tune.errors import QwenTuneError
from qwen_tune.merging.merge import merge
from qwen_tune.merging.output_dir import partial_directory
from qwen_tune.model.tensor_files import header

pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS, HIDDEN, INNER, VOCABULARY = 4, 512, 2048, 1024
MANY_LAYERS = 24  # enough that writing takes a while


def write_base(folder: Path, files: int = 1, layers: int = LAYERS) -> Path:
    """A checkpoint of Qwen2's names that no library made; some tensors are none that a causal model loads."""
    torch.manual_seed(1)
    tensors = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        module = f"model.layers.{layer}"
        tensors |= {f"{module}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        tensors |= {f"{module}.mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        tensors |= {f"{module}.mlp.down_proj.weight": (HIDDEN, INNER), f"{module}.input_layernorm.weight": (HIDDEN,)}
    weights = {name: (torch.randn(shape) * 0.02).to(torch.bfloat16) for name, shape in tensors.items()}
    weights["mtp.layers.0.self_attn.q_proj.weight"] = torch.randn(HIDDEN, HIDDEN).to(torch.bfloat16)
    weights["visual.blocks.0.attn.qkv.weight"] = torch.randn(96, 32)
    weights["visual.position_ids"] = torch.arange(7)
    weights["model.scale"] = torch.tensor(3.5)
    weights["model.nothing"] = torch.empty(0, HIDDEN)
    weights["visual.merger.weight"] = torch.randn(4096, 2048).to(torch.bfloat16)  # so that the last file is the largest
    folder.mkdir(parents=True)
    config = {"model_type": "qwen2", "tie_word_embeddings": False, "rope_parameters": {"rope_theta": 1e6}}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (TINY / name).exists():
            shutil.copy(TINY / name, folder)
    (folder / "preprocessor_config.json").write_text('{"size": 448}')
    names = list(weights)
    if files == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {name: f"model-{1 + n * files // len(names):05}-of-{files:05}.safetensors" for n, name in enumerate(names)}
    for file in sorted(set(where.values())):
        part = {name: weights[name] for name in names if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_adapter(folder: Path, base: Path, layers: int = LAYERS) -> Path:
    torch.manual_seed(2)
    tensors = {}
    for layer in range(layers):
        for part, rows in (("self_attn.q_proj", HIDDEN), ("mlp.up_proj", INNER)):
            module = f"base_model.model.model.layers.{layer}.{part}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(8, HIDDEN) * 0.05
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 8) * 0.05
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]}
    config |= {"base_model_name_or_path": str(base), "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def pair(tmp_path):
    """(base in one file, adapter)."""
    base = write_base(tmp_path / "base")
    return base, write_adapter(tmp_path / "adapter", base)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


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


def test_no_room_is_told_and_what_is_whole_is_kept(tmp_path):
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
    assert "it goes on behind the last whole file" in result.stderr
    assert not (tmp_path / "model").exists()
    kept = sorted(file.name for file in (tmp_path / ".model.merging").glob("*.safetensors*"))
    assert kept == [f"model-0000{n}-of-00008.safetensors" for n in range(1, 8)] + ["model.safetensors.index.json"]
    merge(adapter, output=tmp_path / "model")
    assert not (tmp_path / ".model.merging").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_nothing_is_left(pair, small_disk, qwen_tune):
    _, adapter = pair
    result = qwen_tune("merge", str(adapter), "--output", str(small_disk / "model"))
    assert result.returncode == 2
    assert "GB are to be written" in result.stderr
    assert not list(small_disk.iterdir())


def test_a_disk_that_fills_on_the_way(pair, small_disk, monkeypatch):
    """What is free is told wrongly at the start, as by a quota."""
    import qwen_tune.merging.output_dir as output_dir

    monkeypatch.setattr(output_dir, "SPARE_BYTES", -(1 << 40))
    with pytest.raises(QwenTuneError, match="there is no room for model"):
        merge(pair[1], output=small_disk / "model")
    assert not list(small_disk.iterdir())


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


MODULE = "base_model.model.model.layers.3.self_attn.q_proj"


def without_a_module(base, adapter):
    def change(tensors):
        del tensors[f"{MODULE}.lora_A.weight"], tensors[f"{MODULE}.lora_B.weight"]

    rewrite(adapter / "adapter_model.safetensors", change)


def without_a_matrix(base, adapter):
    rewrite(adapter / "adapter_model.safetensors", lambda tensors: tensors.pop(f"{MODULE}.lora_B.weight"))


def with_a_module_more(base, adapter):
    def change(tensors):
        tensors["base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight"] = torch.ones(8, HIDDEN)
        tensors["base_model.model.model.layers.99.self_attn.q_proj.lora_B.weight"] = torch.ones(HIDDEN, 8)

    rewrite(adapter / "adapter_model.safetensors", change)


def in_integers(base, adapter):
    def change(tensors):
        tensors[f"{MODULE}.lora_B.weight"] = tensors[f"{MODULE}.lora_B.weight"].to(torch.int8)

    rewrite(adapter / "adapter_model.safetensors", change)


def of_another_rank(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))


def without_alpha(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": None}))


def with_a_broken_pattern(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"q_(proj": 4}}))


def of_another_kind(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))


def started_from_the_base(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa_niter_16"}))


def diverged(base, adapter):
    def change(tensors):
        tensors[f"{MODULE}.lora_B.weight"][0, 0] = float("inf")

    rewrite(adapter / "adapter_model.safetensors", change)


def of_the_wrong_shape(base, adapter):
    def change(tensors):
        tensors[f"{MODULE}.lora_A.weight"] = torch.ones(8, HIDDEN + 8)

    rewrite(adapter / "adapter_model.safetensors", change)


def overlapping(base, adapter):
    file = adapter / "adapter_model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name.endswith("q_proj.lora_A.weight")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def no_json(base, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 10) + b"not json!!" + bytes(100))


def index_outside(base, adapter):
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../base/model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_others(base, adapter):
    index = {"metadata": {}, "weight_map": {"model.other.weight": "model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def quantized_base(base, adapter):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))


def base_in_bytes(base, adapter):
    def change(tensors):
        name = "model.layers.3.self_attn.q_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    rewrite(base / "model.safetensors", change)


def with_a_head_of_fewer_tokens(base, adapter):
    def change(tensors):
        tensors["base_model.model.lm_head.weight"] = torch.ones(VOCABULARY - 16, HIDDEN)

    rewrite(adapter / "adapter_model.safetensors", change)


def with_a_pattern_list(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": [4]}))


def with_targets_of_no_names(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": 7}))


def broken_tokenizer(base, adapter):
    (adapter / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": [')


def broken_companion(base, adapter):
    (base / "generation_config.json").write_text("{")


DAMAGES = [
    (with_a_head_of_fewer_tokens, "does not fit the base .*lm_head"),
    (with_a_pattern_list, "rank_pattern in adapter_config.json is no mapping"),
    (with_targets_of_no_names, "target_modules in adapter_config.json is no list of names"),
    (broken_tokenizer, "tokenizer.json: the file is cut off, or no JSON"),
    (broken_companion, r"generation_config\.json: cannot be read as JSON"),
    (without_a_module, r"no matrices for model\.layers\.3\.self_attn\.q_proj\.weight, which adapter_config"),
    (without_a_matrix, "expected a matrix A and a matrix B"),
    (with_a_module_more, r"layers\.99\.self_attn\.q_proj\.lora_A, which the base does not have"),
    (in_integers, "is stored as I8; expected one of F64, F32, F16, BF16"),
    (of_another_rank, r"has rank 8; adapter_config\.json says 4"),
    (without_alpha, "no lora_alpha; expected a number"),
    (with_a_broken_pattern, "no regular expression"),
    (of_another_kind, "of the kind LOHA; expected LORA"),
    (started_from_the_base, "started by pissa_niter_16, which changes the base"),
    (diverged, "values that are no numbers"),
    (of_the_wrong_shape, "does not fit the base"),
    (overlapping, "do not follow those before it"),
    (no_json, "not a safetensors file"),
    (index_outside, "which is not a file beside it"),
    (index_of_others, "which is not so"),
    (quantized_base, r"its weights are quantized \(awq\)"),
    (base_in_bytes, "is stored as F8_E4M3"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_what_cannot_be_merged_is_refused_and_nothing_is_left(pair, tmp_path, damage, message):
    damage(*pair)
    with pytest.raises(QwenTuneError, match=message):
        merge(pair[1], output=tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


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
        with partial_directory(target, overwrite=False) as part:
            (part / "model.safetensors").write_text("hours of work")
            (part / "merging.json").write_text("{}")
            target.mkdir()
            (target / "thesis.txt").write_text("years")

    with pytest.raises(QwenTuneError, match="no merged model of ours"):
        write()
    assert (target / "thesis.txt").read_text() == "years"
    assert (tmp_path / ".model.merging" / "model.safetensors").read_text() == "hours of work"


def test_a_link_is_followed(pair, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert merge(pair[1], output=tmp_path / "link") == tmp_path / "disk"
    assert (tmp_path / "link" / "merge.json").exists()
    assert (tmp_path / "link").is_symlink()


def test_a_mounted_disk_is_no_place_to_rename_to(pair, small_disk):
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
