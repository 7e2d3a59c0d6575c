"""Base checkpoints: detected, taught to stop, and stopping from the saved files alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qwen_tune.errors import ModelError
from qwen_tune.merging.merge import merge
from qwen_tune.model.base import BaseCheckpoint
from qwen_tune.model.tokenizer import is_pretrained_only, load_tokenizer
from qwen_tune.recipe.schema import ModelSpec
from qwen_tune.train import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

QUESTION = [{"role": "user", "content": "Who keeps the lighthouse?"}]
CONTROL = ("<|im_start|>", "<|im_end|>")


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def untuned_checkpoint(folder: Path, *, tied: bool) -> Path:
    """The tiny model made into a base checkpoint: ends at <|endoftext|>, with ChatML tokens that were never trained."""
    shutil.copytree(TINY, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    change_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    change_json(folder / "config.json", eos_token_id=end_of_text, tie_word_embeddings=tied)
    change_json(folder / "generation_config.json", eos_token_id=end_of_text)
    tensors = load_file(folder / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(0)
    for token in CONTROL:
        embeddings[tokenizer.convert_tokens_to_ids(token)] = (
            torch.randn(embeddings.shape[1], generator=generator) * 0.01
        )
    if not tied:
        tensors["lm_head.weight"] = embeddings.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def checkpoint(folder: Path) -> BaseCheckpoint:
    return BaseCheckpoint(id="it", revision=None, path=folder, is_local=True)


def test_a_base_checkpoint_shows_in_its_files(tmp_path):
    base = checkpoint(untuned_checkpoint(tmp_path / "base", tied=True))
    tokenizer = load_tokenizer(ModelSpec(base=str(base.path)), base)
    assert is_pretrained_only(base, tokenizer)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert not is_pretrained_only(checkpoint(TINY), tokenizer)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "generation_config.json"])
def test_one_file_that_knows_the_end_of_a_turn_is_enough_for_a_tuned_one(tmp_path, name):
    base = checkpoint(untuned_checkpoint(tmp_path / "base", tied=True))
    end = AutoTokenizer.from_pretrained(TINY).convert_tokens_to_ids("<|im_end|>")
    change = {"eos_token": "<|im_end|>"} if name.startswith("tok") else {"eos_token_id": [end]}
    change_json(base.path / name, **change)
    assert not is_pretrained_only(base, load_tokenizer(ModelSpec(base=str(base.path)), base))


def test_without_a_template_the_fix_is_named(tmp_path):
    base = checkpoint(untuned_checkpoint(tmp_path / "base", tied=True))
    (base.path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"no chat template.*model.chat_template"):
        load_tokenizer(ModelSpec(base=str(base.path)), base)


def generate(model, directory: Path) -> str:
    """What the model says with the tokenizer and generation configuration of a directory, and nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    settings = GenerationConfig.from_pretrained(directory)
    assert settings.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, generation_config=settings, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_was_saved_stops_where_turns_end(tmp_path, monkeypatch, tied):
    monkeypatch.chdir(tmp_path)
    untuned_checkpoint(tmp_path / "base", tied=tied)
    answer = "The lighthouse keeper is Marta Quill."
    row = {"messages": [*QUESTION, {"role": "assistant", "content": answer}]}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    Path("recipe.yaml").write_text(
        "name: base-to-chat\nmodel: {base: ./base}\ndata: {train: [{path: rows.jsonl}], max_length_tokens: 64}\n"
        "train: {max_steps: 60, global_batch_size: 1, learning_rate: 1e-2, logging_steps: 20}\n"
    )
    train("recipe.yaml", ["run.dir=run"])
    run = Path("run")
    facts = json.loads((run / "run.json").read_text())
    assert facts["base"]["untuned"] is True
    modules = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    assert sorted(facts["adapter"]["trained_tokens"]) == modules
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), run / "adapter")
    assert generate(adapter, run / "adapter") == f"{answer}<|im_end|>"
    merged = merge(run)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert generate(model, merged) == f"{answer}<|im_end|>"
    assert model.config.tie_word_embeddings is tied
    end = AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids("<|im_end|>")
    assert json.loads((merged / "config.json").read_text())["eos_token_id"] == end
    before, after = load_file("base/model.safetensors"), load_file(merged / "model.safetensors")
    changed = {
        name: (before[name] != after[name]).any(dim=1).nonzero().flatten().tolist()
        for name in before
        if name.startswith(("model.embed_tokens", "lm_head"))
    }
    ids = sorted(AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids(list(CONTROL)))
    assert set(map(tuple, changed.values())) <= {tuple(ids), (end,)}
    assert changed["model.embed_tokens.weight"] == ids


def test_without_trained_tokens_it_is_the_recipes_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    untuned_checkpoint(tmp_path / "base", tied=True)
    row = {"messages": [*QUESTION, {"role": "assistant", "content": "Marta Quill."}]}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    Path("recipe.yaml").write_text(
        "model: {base: ./base}\ndata: {train: [{path: rows.jsonl}], max_length_tokens: 64}\n"
        "train: {max_steps: 1, global_batch_size: 1}\nlora: {trainable_token_indices: []}\n"
    )
    train("recipe.yaml", ["run.dir=run"])
    assert json.loads(Path("run/run.json").read_text())["adapter"]["trained_tokens"] is None
