"""The commands as users start them: real processes, real files, and what they leave after."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment
from safetensors import safe_open

from qwen_tune.machine import cpu_bfloat16_units

LAUNCHER = Path(sys.executable).with_name("accelerate")


def test_the_record_of_a_run_balances(trained):
    path, _ = trained
    facts = json.loads((path / "run.json").read_text())
    rows, tokens = facts["rows"], facts["tokens"]
    assert (facts["state"], facts["exit"], facts["world_size"]) == ("finished", 0, 1)
    lines = (ROOT / "data" / "quickstart.jsonl").read_text().splitlines()
    assert rows["read"] == len(lines)
    assert rows["read"] == rows["trained"] + rows["evaluation"] + rows["not_sampled"] + sum(rows["dropped"].values())
    assert tokens["prepared"] == tokens["supervised"] + tokens["context"]
    assert tokens["processed"] > 0
    assert tokens["padding"] == 0
    assert facts["losses"]["eval_after"] < facts["losses"]["eval_before"]
    assert facts["losses"]["train_last"] < facts["losses"]["train_first"]
    assert facts["base"]["local_path"] == str((ROOT / "data" / "tiny-qwen").resolve())
    assert facts["adapter"]["trainable_parameters"] > 0
    assert facts["peak_memory_bytes"] > 0


def test_metrics_are_a_line_a_step(trained):
    path, _ = trained
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 6]
    assert all(line.keys() == {"step", "epoch", "eval_loss", "eval_quickstart_loss"} for line in evaluations)
    lines = [line for line in lines if line not in evaluations]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_bytes"}
    assert all(line.keys() == keys for line in lines)
    assert json.loads((path / "run.json").read_text())["tokens"]["processed"] == lines[-1]["tokens"]


def test_what_is_printed_is_plain_where_there_is_no_terminal(trained):
    _, output = trained
    assert "step 1/6" in output
    assert "\x1b" not in output
    assert "held out" in output


def test_the_adapter_directory_is_enough_for_anyone(trained):
    """A process that knows nothing of us loads it, asks it, and it stops."""
    path, _ = trained
    names = {file.name for file in (path / "adapter").iterdir()}
    assert {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "generation_config.json", "README.md",
    } <= names  # fmt: skip
    # The code of its own card, as a reader would paste it.
    card = (path / "adapter" / "README.md").read_text().split("```python")[1].split("```")[0]
    code = card.replace("Hello", "What is two plus two?") + (
        "import json, sys; print(json.dumps([tokenizer.decode(output[0, -1]), 'qwen_tune' in sys.modules]))"
    )
    command = [sys.executable, "-c", code]
    here = path / "adapter"
    result = subprocess.run(command, cwd=here, env=environment(), capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == ["<|im_end|>", False]
    config = json.loads((path / "adapter" / "generation_config.json").read_text())
    assert len(config["eos_token_id"]) == 2
    assert str(ROOT) not in (path / "adapter" / "README.md").read_text()


def test_the_merged_model_is_complete_and_proven(trained):
    path, _ = trained
    merged = path / "merged"
    names = {file.name for file in merged.iterdir()}
    assert {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json", "merge.json",
    } <= names  # fmt: skip
    config = json.loads((merged / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    facts = json.loads((merged / "merge.json").read_text())
    assert facts["changed"] == facts["planned"] == facts["adapter_tensors"] / 2
    base = ROOT / "data" / "tiny-qwen"
    with safe_open(base / "model.safetensors", "pt") as old, safe_open(merged / "model.safetensors", "pt") as new:
        assert set(old.keys()) == set(new.keys())
        changed = [name for name in old.keys() if not old.get_tensor(name).equal(new.get_tensor(name))]  # noqa: SIM118
    assert len(changed) == facts["changed"]
    assert all("proj" in name for name in changed)


def test_merge_verify_chat_and_compare(trained, qwen_tune, tmp_path):
    path, _ = trained
    again = qwen_tune("merge", str(path), "--output", str(tmp_path / "model"), "--verify")
    assert again.returncode == 0, again.stderr
    assert "same next token" in again.stdout
    assert "100.0" in again.stdout
    in_the_way = qwen_tune("merge", str(path), "--output", str(tmp_path / "model"))
    assert (in_the_way.returncode, "--overwrite" in in_the_way.stderr) == (2, True)
    question = "What is two plus two?"
    compared = qwen_tune("chat", str(path), question, "--compare")
    assert [line.split(":")[0] for line in compared.stdout.splitlines()] == ["base", "tuned"]
    tuned = compared.stdout.splitlines()[1].removeprefix("tuned:").strip()
    assert qwen_tune("chat", str(tmp_path / "model"), question).stdout.strip() == tuned


def test_an_adapter_of_another_base_is_not_merged(trained, qwen_tune, tmp_path):
    path, _ = trained
    other = tmp_path / "other"
    code = (
        "import sys; from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "config = AutoConfig.from_pretrained(sys.argv[1]); config.num_hidden_layers = 1\n"
        "config.layer_types = config.layer_types[:1]\n"
        "AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "data" / "tiny-qwen"), str(other)]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    result = qwen_tune("merge", str(path), "--base", str(other), "--output", str(tmp_path / "model"))
    assert result.returncode == 2
    assert "not the weights that the adapter was trained on" in result.stderr
    bare = qwen_tune("merge", str(path / "adapter"), "--base", str(other), "--output", str(tmp_path / "model"))
    assert bare.returncode == 2
    assert "not the weights that the adapter was trained on" in bare.stderr
    assert not (tmp_path / "model").exists()


def test_preview_json_is_what_trains(qwen_tune, tiny_tokenizer, workspace):
    result = qwen_tune("preview", "recipe.yaml", "--json", "--all", cwd=workspace)
    assert result.returncode == 0, result.stderr
    samples = [json.loads(line) for line in result.stdout.splitlines()]
    first = samples[0]
    assert first.keys() == {"source", "text", "input_ids", "labels", "supervised_text"}
    assert tiny_tokenizer.decode(first["input_ids"]) == first["text"]
    assert all(text.endswith("<|im_end|>") for sample in samples for text in sample["supervised_text"])
    line = int(first["source"].rsplit(":", 1)[1])
    row = json.loads((workspace / "rows.jsonl").read_text().splitlines()[line - 1])
    assert first["supervised_text"][0] == row["messages"][1]["content"] + "<|im_end|>"


def test_preview_in_words(qwen_tune, workspace):
    result = qwen_tune("preview", "recipe.yaml", "--rows", "2", cwd=workspace)
    assert result.returncode == 0, result.stderr
    assert "<|im_start|>user" in result.stdout
    assert "data: " in result.stdout


START = {
    "accelerate": [str(LAUNCHER), "launch", str(ROOT / "qwen_tune" / "train.py")],
    "module": [sys.executable, "-m", "qwen_tune", "train"],
    "script": [sys.executable, str(ROOT / "qwen_tune" / "train.py")],
}


@pytest.mark.parametrize("how", START)
def test_each_way_of_starting_trains_with_all_cores(how, workspace):
    """The launcher leaves one thread a process; the entry takes them all back."""
    command = [*START[how], "recipe.yaml", "train.max_steps=1", "data.eval=null"]
    environ = environment(OMP_NUM_THREADS="1")
    result = subprocess.run(command, cwd=workspace, env=environ, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    facts = json.loads((workspace / "runs" / "small" / "run.json").read_text())
    assert facts["state"] == "finished"
    assert facts["threads"] == len(os.sched_getaffinity(0))


def test_a_finished_run_has_nothing_to_do_and_a_dry_run_writes_nothing(qwen_tune, workspace):
    dry = qwen_tune("train", "recipe.yaml", "--dry-run", cwd=workspace)
    assert dry.returncode == 0, dry.stderr
    assert "steps" in dry.stdout
    assert not (workspace / "runs").exists()
    assert qwen_tune("train", "recipe.yaml", "train.max_steps=1", cwd=workspace).returncode == 0
    again = qwen_tune("train", "recipe.yaml", "train.max_steps=1", cwd=workspace)
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True)
    other = qwen_tune("train", "recipe.yaml", "train.max_steps=1", "train.seed=7", cwd=workspace)
    assert (other.returncode, "of another recipe (train.seed was 42, now 7)" in other.stderr) == (2, True)
    more = qwen_tune("train", "recipe.yaml", "train.max_steps=2", cwd=workspace)
    assert (more.returncode, "it has no checkpoint to resume from" in more.stderr) == (2, True)


def test_an_installed_copy_trains_too(workspace, tmp_path_factory):
    """The package as pip installs it, away from the checkout: its data files have to be in it."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "qwen_tune", source / "qwen_tune", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True, text=True)
    environ = environment(PYTHONPATH=str(site))
    short = ["recipe.yaml", "train.max_steps=1", "data.eval=null"]
    script = [sys.executable, str(site / "qwen_tune" / "train.py"), *short]
    result = subprocess.run(script, cwd=workspace, env=environ, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    again = subprocess.run(
        [str(site / "bin" / "qwen-tune"), "train", *short], cwd=workspace, env=environ, capture_output=True, text=True
    )
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stderr


def test_a_run_in_use_is_left_alone_and_an_interrupted_one_says_so(workspace, qwen_tune):
    command = [sys.executable, "-m", "qwen_tune", "train", "recipe.yaml", "train.max_steps=100000"]
    process = subprocess.Popen(command, cwd=workspace, env=environment(), stderr=subprocess.PIPE, text=True)
    metrics = workspace / "runs" / "small" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    second = qwen_tune("train", "recipe.yaml", "--overwrite", cwd=workspace)
    assert second.returncode == 2
    assert "in use by a process that is still running" in second.stderr
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    facts = json.loads((workspace / "runs" / "small" / "run.json").read_text())
    assert (facts["state"], facts["exit"]) == ("interrupted", 130)


BAD = {
    "missing recipe": (["gone.yaml"], "gone.yaml", "does not exist. Fix: name one of recipe.yaml"),
    "unknown key": (["recipe.yaml", "train.learning_rat=1"], "learning_rat", "learning_rate"),
    "wrong type": (["recipe.yaml", "train.learning_rate=fast"], "train.learning_rate", "fast"),
    "missing data": (["recipe.yaml", "data.train.0.path=row.jsonl"], "the data file does not exist", "rows.jsonl"),
    "empty file": (["recipe.yaml", "data.train.0.path=empty.jsonl"], "empty.jsonl:1", "the file is empty"),
    "no assistant": (["recipe.yaml", "data.train.0.path=alone.jsonl"], "alone.jsonl:2", "no assistant turn"),
    "unknown role": (["recipe.yaml", "data.train.0.path=role.jsonl"], "role.jsonl:1", 'write "assistant"'),
    "missing base": (["recipe.yaml", "model.base=./nowhere"], "./nowhere", "the base checkpoint is not there"),
    "batch that does not divide": (
        ["recipe.yaml", "train.global_batch_size=3", "train.per_device_train_batch_size=2"],
        "train.global_batch_size",
        "2 or 4",
    ),
    "float16 on a CPU": (["recipe.yaml", "model.dtype=float16"], "model.dtype", "no GPU"),
    "bfloat16 where there is none": (["recipe.yaml", "model.dtype=bfloat16"], "model.dtype", "has none"),
    "unknown tracker": (["recipe.yaml", "tracking.report_to=[wandbb]"], "tracking.report_to", "wandb"),
    "eval source without examples": (["recipe.yaml", "data.eval=[{path: empty.jsonl}]"], "empty.jsonl", "is empty"),
    "target that is not there": (["recipe.yaml", "lora.target_modules=[q_porj]"], "q_porj", "q_proj"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_one_message_and_nothing_is_written(fault, qwen_tune, workspace):
    if fault == "bfloat16 where there is none" and cpu_bfloat16_units():
        pytest.skip("this CPU multiplies bfloat16")
    good = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
    (workspace / "empty.jsonl").write_text("")
    (workspace / "alone.jsonl").write_text(good + '{"messages": [{"role": "user", "content": "q"}]}\n')
    (workspace / "role.jsonl").write_text(good.replace('"assistant"', '"assistent"'))
    before = sorted(workspace.iterdir())
    arguments, *expected = BAD[fault]
    result = qwen_tune("train", *arguments, cwd=workspace)
    assert result.returncode == 2, result.stdout + result.stderr
    for text in expected:
        assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(workspace.iterdir()) == before
