from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

from qwen_tune.errors import ModelError
from qwen_tune.model.base import BaseCheckpoint, resolve_base
from qwen_tune.model.tokenizer import load_tokenizer
from qwen_tune.recipe.schema import ModelSpec


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(TINY, folder)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def resolve(folder, **model) -> BaseCheckpoint:
    return resolve_base(ModelSpec(base=str(folder), **model))


def test_a_local_checkpoint_is_known_by_its_files(checkpoint):
    base = resolve(checkpoint)
    assert base.is_local
    assert base.model_type == "qwen3"
    spans = base.tensors()
    assert spans["model.embed_tokens.weight"].shape[1] == base.config["hidden_size"]
    with (checkpoint / "model.safetensors").open("rb") as file:
        span = spans["model.norm.weight"]
        file.seek(span.start)
        stored = torch.frombuffer(bytearray(file.read(span.length)), dtype=torch.float32)
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", framework="pt") as tensors:
        assert torch.equal(stored, tensors.get_tensor("model.norm.weight"))


def test_the_fingerprint_sees_other_weights_and_not_other_files(checkpoint):
    base = resolve(checkpoint)
    before = base.weights_fingerprint()
    assert before == base.weights_fingerprint()
    (checkpoint / "notes.txt").write_text("new")
    assert base.weights_fingerprint() == before
    span = base.tensors()["model.norm.weight"]
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(span.start)
        file.write(b"\x00\x00\x00\x01")
    assert base.weights_fingerprint() != before


def test_shards_are_found_through_their_index(checkpoint):
    save_file({"a": torch.ones(2)}, checkpoint / "one.safetensors")
    save_file({"b": torch.ones(3)}, checkpoint / "two.safetensors")
    (checkpoint / "model.safetensors").unlink()
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert set(resolve(checkpoint).tensors()) == {"a", "b"}
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"gone\.safetensors, which is not there"):
        resolve(checkpoint)
    for outside in ("../base/one.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(ModelError, match="not a file beside it"):
            resolve(checkpoint)


def test_a_base_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="the base checkpoint is not there"):
        resolve("./nowhere")
    with pytest.raises(ModelError, match="neither a directory nor a model that the Hub gives us"):
        resolve("Qwen/Qwen-that-does-not-exist")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve(tmp_path / "empty")


def test_bases_that_cannot_be_trained_yet_or_at_all(checkpoint):
    with pytest.raises(ModelError, match="revision is for Hub ids"):
        resolve(checkpoint, revision="main")
    with pytest.raises(ModelError, match=r"4096 is more than the \d+ tokens of context"):
        resolve_base(ModelSpec(base=str(checkpoint)), max_length_tokens=4096)
    weights = checkpoint / "model.safetensors"
    weights.rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        resolve(checkpoint)
    edit(checkpoint / "config.json", model_type="llama")
    with pytest.raises(ModelError, match='not yet: the model type is "llama"'):
        resolve(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        resolve(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token": "<|im_end|>", "eos_token": "<|endoftext|>"}, "models trained so never stop"),
        ({"pad_token": "<|im_end|>"}, "models trained so never stop"),
        ({"pad_token": None}, "models trained so never stop"),
    ],
)
def test_tokenizers_with_which_a_model_would_never_stop(checkpoint, changes, message):
    edit(checkpoint / "tokenizer_config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(ModelSpec(base=str(checkpoint)), resolve(checkpoint))


def test_tokenizers_of_nothing_or_of_another_model(checkpoint):
    edit(checkpoint / "config.json", vocab_size=100)
    with pytest.raises(ModelError, match="is not this model's of 100"):
        load_tokenizer(ModelSpec(base=str(checkpoint)), resolve(checkpoint))
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(ModelSpec(base=str(checkpoint)), resolve(checkpoint))
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"there is no tokenizer\.json"):
        load_tokenizer(ModelSpec(base=str(checkpoint)), resolve(checkpoint))


def test_the_recipes_template_replaces_the_checkpoints(checkpoint, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}")
    model = ModelSpec(base=str(checkpoint), chat_template=str(template))
    assert load_tokenizer(model, resolve(checkpoint)).chat_template == "{{ messages }}"
    with pytest.raises(ModelError, match="the chat template cannot be read"):
        load_tokenizer(ModelSpec(base=str(checkpoint), chat_template="gone.jinja"), resolve(checkpoint))
