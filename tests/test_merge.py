"""Merging in the process: what may be replaced, what is refused, and bases that store more than they need."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

from qwen_tune.artifacts.adapter_dir import AdapterDir
from qwen_tune.disk import sha256
from qwen_tune.errors import MergeError
from qwen_tune.evaluation.verification import compare_merged, verify_merged
from qwen_tune.merging.merge import merge, open_stream
from qwen_tune.merging.stream import read_pieces
from qwen_tune.model.tensor_files import read_bytes, read_spans

# PEFT 0.21 reads an alias that Transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def adapter(trained, tmp_path):
    """A bare adapter directory beside a copy of its base, both free to be broken."""
    run, _ = trained
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    shutil.copytree(TINY, tmp_path / "base")
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "base")}))
    return tmp_path / "adapter"


def test_a_bare_adapter_is_merged_beside_itself_and_verified_on_prompts(adapter):
    target = merge(adapter)
    assert target == adapter.with_name("adapter-merged")
    comparison = verify_merged([adapter], target)
    assert comparison.passed
    assert json.loads((target / "merge.json").read_text())["verification"]["passed"] is True


def test_every_reader_of_the_stream_gets_the_bytes_that_are_in_the_file(adapter):
    """Piece by piece and out of order, as another format may want them."""
    target = merge(adapter)
    written = {
        name: read_bytes(span, 0, span.length) for name, span in read_spans(target / "model.safetensors").items()
    }
    stream = open_stream([AdapterDir.open(adapter)])
    assert [tensor.name for tensor in stream.tensors] == list(written)
    for tensor in reversed(stream.tensors):
        found = bytearray(tensor.span.length)
        for piece in reversed(list(tensor.pieces())):
            room = memoryview(found)[piece.start : piece.start + piece.size]
            [differs] = read_pieces([piece], room)
            assert differs in (tensor.may_differ, False)
        assert found == written[tensor.name]


def test_a_tied_base_that_stores_its_head_as_well(adapter):
    forget_the_weights_it_was_trained_on(adapter)
    weights = adapter.parent / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    merged = load_file(merge(adapter) / "model.safetensors")
    assert set(merged) == set(tensors) - {"lm_head.weight"}


def test_nothing_but_a_merged_model_is_ever_replaced(adapter, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("years")
    for target in (work, tmp_path / "base", adapter, adapter / "merged", tmp_path, work / "thesis.txt"):
        with pytest.raises(MergeError, match=r"in or around|qwen-tune did not merge"):
            merge(adapter, output=target, overwrite=True)
    assert (work / "thesis.txt").read_text() == "years"
    assert (tmp_path / "base" / "config.json").exists()
    target = merge(adapter, output=tmp_path / "model")
    with pytest.raises(MergeError, match="--overwrite"):
        merge(adapter, output=target)
    assert merge(adapter, output=target, overwrite=True) == target
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_a_model_that_answers_otherwise_is_marked(adapter, tmp_path):
    target = merge(adapter, output=tmp_path / "model")
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"model\.safetensors: this is not the file that was written"):
        verify_merged([adapter], target)
    facts = json.loads((target / "merge.json").read_text())
    facts["files"]["model.safetensors"] = sha256(target / "model.safetensors")
    (target / "merge.json").write_text(json.dumps(facts))
    with pytest.raises(MergeError, match="does not answer like base and adapter"):
        verify_merged([adapter], target)
    assert json.loads((target / "merge.json").read_text())["verification"]["passed"] is False


def test_answers_that_are_not_finite_are_refused(adapter, tmp_path):
    target = merge(adapter, output=tmp_path / "model")
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    assert not compare_merged([adapter], target).passed


def forget_the_weights_it_was_trained_on(adapter):
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})


def break_config(adapter):
    (adapter / "adapter_config.json").write_text("{")


def forget_base(adapter):
    (adapter / "adapter_config.json").write_text("{}")


def truncate_weights(adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def truncate_base(adapter):
    weights = adapter.parent / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def zero(adapter):
    weights = adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}, weights)


def rename_keys(adapter):
    weights = adapter / "adapter_model.safetensors"
    save_file({name.replace("layers.0", "layers.9"): t for name, t in load_file(weights).items()}, weights)


def only_pickle(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "cannot be read as JSON"),
        (forget_base, "it names no base"),
        (truncate_weights, "not a safetensors file"),
        (truncate_base, "cut off or damaged"),
        (zero, "the merge changed nothing"),
        (rename_keys, "does not fit the base .*which the base does not have"),
        (only_pickle, "pickles are not loaded"),
    ],
)
def test_damage_is_found_and_nothing_is_left(adapter, damage, message):
    from qwen_tune.errors import QwenTuneError

    damage(adapter)
    with pytest.raises(QwenTuneError, match=message):
        merge(adapter)
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter", "base"]
