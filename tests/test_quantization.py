"""QLoRA: real steps on a quantized tiny model, its record, and a merge that has nothing quantized left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from conftest import make_workspace
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qwen_tune.artifacts.adapter_dir import AdapterDir, load_with_adapters
from qwen_tune.errors import MergeError, ModelError
from qwen_tune.evaluation.chat import ChatModel
from qwen_tune.evaluation.verification import compare_merged, verify_merged
from qwen_tune.merging.merge import merge
from qwen_tune.train import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module", params=["nf4", "int8"])
def quantized(request, tmp_path_factory):
    """(kind, run directory) of a short run on a quantized base."""
    folder = make_workspace(tmp_path_factory.mktemp(request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        overrides = ["run.dir=run", f"model.quantization={request.param}", "train.learning_rate=1e-2"]
        train("recipe.yaml", overrides)
    return request.param, folder / "run"


def test_it_learns_with_adapters_in_float32_and_records_the_whole_configuration(quantized):
    kind, run = quantized
    facts = json.loads((run / "run.json").read_text())
    assert facts["losses"]["eval_after"] < facts["losses"]["eval_before"] - 0.5
    assert facts["adapter"]["dtype"] == "float32"
    recorded = facts["quantization"]
    assert recorded["library"] == "bitsandbytes"
    assert recorded["version"][0].isdigit()
    if kind == "nf4":
        wanted = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        assert wanted.items() <= recorded.items()
        assert recorded["bnb_4bit_compute_dtype"] == "float32"  # bfloat16 on a GPU
    else:
        assert recorded["load_in_8bit"] is True
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_merged_model_is_whole_and_answers_like_the_one_that_was_trained(quantized, tmp_path):
    _, run = quantized
    merged = merge(run, output=tmp_path / "merged")
    tensors = load_file(merged / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}  # the tiny base's own type
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    record = json.loads((merged / "merge.json").read_text())
    assert record["base"]["weights"] == "dequantized"
    comparison = compare_merged([run], merged)
    assert comparison.passed, comparison
    # It is the dequantized base that changed by the adapter, not the original one.
    original = merge(run, output=tmp_path / "original", base="original")
    assert json.loads((original / "merge.json").read_text())["base"]["weights"] == "original"
    ids = torch.randint(0, 500, (1, 50), generator=torch.Generator().manual_seed(0))
    trained = load_with_adapters([AdapterDir.open(run)], torch.float32, quantized=True).eval()
    with torch.no_grad():
        wanted = trained(input_ids=ids, use_cache=False).logits
        near, far = (
            (AutoModelForCausalLM.from_pretrained(path)(input_ids=ids, use_cache=False).logits - wanted).abs().max()
            for path in (merged, original)
        )
    assert near < far


def test_the_merged_tensors_are_those_of_peft_on_the_dequantized_base(quantized, tmp_path):
    _, run = quantized
    merged = load_file(merge(run, output=tmp_path / "merged") / "model.safetensors")
    expected = load_with_adapters([AdapterDir.open(run)], "auto").merge_and_unload().state_dict()
    assert merged.keys() == expected.keys() - {"lm_head.weight"}  # tied
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name]), name


def test_an_adapter_that_changes_nothing_is_found_out_here_too(quantized, tmp_path):
    _, run = quantized
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(MergeError, match="the merge changed nothing"):
        merge(tmp_path / "run", output=tmp_path / "merged")


def test_verifying_reports_what_the_choice_of_the_base_costs(quantized, tmp_path, monkeypatch):
    _, run = quantized
    monkeypatch.chdir(run.parent)  # the recipe names its rows from here
    for base, merged in ((None, tmp_path / "merged"), ("original", tmp_path / "original")):
        merge(run, output=merged, base=base)
        comparison = verify_merged([run], merged, base)
        assert json.loads((merged / "merge.json").read_text())["verification"]["losses"] == comparison.losses
        trained, near, far = comparison.losses.values()
        assert abs(near - trained) < abs(far - trained)
        assert f"merged into the original base {far:.4f}" in str(comparison)


def test_a_chat_uses_the_base_as_it_was_trained(quantized):
    _, run = quantized
    model = ChatModel.load(run)
    layer = model.model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert isinstance(layer, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
    assert model.answer([{"role": "user", "content": "Hello!"}], max_new_tokens=4)


def test_dequantizing_needs_the_record_of_the_run(quantized, tmp_path):
    _, run = quantized
    adapter = (run / "adapter").rename(tmp_path / "adapter")
    try:
        with pytest.raises(MergeError, match=r"nor how. Fix: give the run's directory"):
            merge(adapter, output=tmp_path / "merged", base="dequantized")
    finally:
        adapter.rename(run / "adapter")


def test_a_bitsandbytes_that_does_not_load_is_reported_before_weights_are(workspace, qwen_tune):
    package = workspace / "broken" / "bitsandbytes"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise OSError('libbitsandbytes.so: no kernel for this machine')")
    result = qwen_tune(
        *("train", "recipe.yaml", "run.dir=run", "model.quantization=nf4"),
        cwd=workspace,
        PYTHONPATH=str(package.parent),
    )
    assert result.returncode == 2, result.stderr
    assert "model.quantization: nf4 is asked for, and bitsandbytes does not load (libbitsandbytes.so" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (workspace / "run").exists()


def test_a_base_that_is_quantized_already_is_refused(workspace, monkeypatch):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        workspace / "tiny-qwen", quantization_config=config, device_map={"": "cpu"}
    ).save_pretrained(workspace / "small")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (workspace / "small" / name).write_bytes((workspace / "tiny-qwen" / name).read_bytes())
    monkeypatch.chdir(workspace)
    with pytest.raises(
        ModelError, match=r"quantized already \(bitsandbytes\).*use the checkpoint that it was made from"
    ):
        train("recipe.yaml", ["model.base=./small", "run.dir=run"])
    assert not Path("run").exists()
