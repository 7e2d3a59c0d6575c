"""What is reported about a wrong value or key, and the fix that is suggested."""

# ruff: noqa: E501 - a table of messages is read line by line

from __future__ import annotations

import pytest
from recipe_texts import MINIMAL, problems_of

pytestmark = pytest.mark.usefixtures("own_folder")


WRONG: list[tuple[str, str]] = [
    # One line of a section each, then the report after `job.yaml:N: `.
    ("lora: {r: 0}", "lora.r: got 0; must be at least 1. Fix: leave it out for the default, 16"),
    ('lora: {r: "16"}', 'lora.r: got "16" (text); must be a whole number. Fix: write 16, without quotes'),
    ("lora: {r: 1_6}", "lora.r: got 1_6 (text); must be a whole number. Fix: write 16, without quotes"),
    ("lora: {r: 16.0}", "lora.r: got 16.0 (a number); must be a whole number. Fix: write 16"),
    ("lora: {r: 1.5}", "lora.r: got 1.5 (a number); must be a whole number. Fix: leave it out for the default, 16"),
    ("lora: {r: true}", "lora.r: got true; must be a whole number. Fix: leave it out for the default, 16"),
    ("lora: {use_dora: no}", "lora.use_dora: got no (text); must be true or false. Fix: write false"),
    ("lora: {use_dora: On}", "lora.use_dora: got On (text); must be true or false. Fix: write true"),
    (
        "lora: {target_modules: q_proj}",
        "lora.target_modules: got q_proj (text); must be one of all-linear, attention, mlp, all-linear+embeddings, "
        "or a list. Fix: write [q_proj]",
    ),
    ("lora: {target_modules: [q_proj, 1]}", 'lora.target_modules[1]: got 1 (a whole number); must be text. Fix: put it in quotes: "1"'),
    ("lora: 16", "lora: got 16 (a whole number); must be a mapping. Fix: write its keys below it, indented: r, lora_alpha"),
    ("train: {learning_rate: -1}", "train.learning_rate: got -1; must be greater than 0. Fix: leave it out for the default, 0.0002"),
    ("train: {learning_rate: 2e4}", "train.learning_rate: got 20000.0; must be at most 1."),
    ("train: {learning_rate: .nan}", "train.learning_rate: got nan; must be a finite number."),
    ("train: {learning_rate: 12:30}", "train.learning_rate: got 12:30 (text); must be a number. Fix: write a number"),
    ("train: {global_batch_size: 0}", "train.global_batch_size: got 0; must be at least 1."),
    ("train: {per_device_train_batch_size: 0}", "train.per_device_train_batch_size: got 0; must be auto, or at least 1."),
    ("train: {gradient_checkpointing: true}", "train.gradient_checkpointing: got true; must be one of auto, none, selective, full. Fix: write full"),
    ("train: {optim: adamw_tuch}", "train.optim: got adamw_tuch; must be one of adamw_torch, "),
    ("train: {max_steps: 5, num_train_epochs: 1}", "train.max_steps: got 5 beside num_train_epochs: 1;"),
    ("tracking: {report_to: wandb}", "tracking.report_to: got wandb (text); must be a list. Fix: write [wandb]"),
    ("tracking: {project: 2024}", 'tracking.project: got 2024 (a whole number); must be text. Fix: put it in quotes: "2024"'),
    ("export: {formats: [gguf-q8]}", "export.formats[0]: got gguf-q8; must be one of gguf-f16, "),
    ("hub: {private: true}", "hub.repo_id: is missing, but required. Fix: add `repo_id: owner/name`"),
    ("hub: {repo_id: me}", "hub.repo_id: got me; must be owner/name"),
    ("name: a b", 'name: got a b; must be letters, digits, `-`, `_` and `.`, starting with a letter or digit'),
    # Keys.
    ("lora: {rank: 8}", "lora.rank: unknown key. Fix: write lora.r"),
    ("lora: {lora_alhpa: 8}", "lora.lora_alhpa: unknown key. Fix: did you mean lora_alpha?"),
    ("lora: {Lora-Alpha: 8}", "lora.Lora-Alpha: unknown key. Fix: write lora_alpha"),
    ("lora: {lora_alhpa: null}", "lora.lora_alhpa: unknown key. Fix: did you mean lora_alpha?"),
    ("learning_rate: 1e-4", "learning_rate: unknown key. Fix: it belongs to train.learning_rate"),
    ("lr: 1e-4", "lr: unknown key. Fix: write train.learning_rate"),
    ("epochs: 3", "epochs: unknown key. Fix: write train.num_train_epochs"),
    ("batch_size: 3", "batch_size: unknown key. Fix: write train.global_batch_size"),
    ("train: {gradient_accumulation_steps: 3}", "train.gradient_accumulation_steps: unknown key. Fix: write train.global_batch_size; the accumulation is derived from it"),
    ("cutoff_len: 3", "cutoff_len: unknown key. Fix: write data.max_length_tokens"),
    ("sequence_len: 3", "sequence_len: unknown key. Fix: write data.max_length_tokens"),
    ("max_seq_length: 3", "max_seq_length: unknown key. Fix: write data.max_length_tokens"),
    ("load_in_4bit: true", "load_in_4bit: unknown key. Fix: write model.quantization: nf4"),
    ("train: {warmup_ratio: 0.1}", "train.warmup_ratio: unknown key. Fix: write train.warmup_steps; a number below 1 is a fraction of all steps"),
    ("trust_remote_code: true", "trust_remote_code: unknown key. Fix: delete it; it cannot be turned on"),
    ("finetuning_type: lora", "finetuning_type: unknown key. Fix: delete it; every recipe trains an adapter"),
    ("template: qwen", "template: unknown key. Fix: write model.chat_template"),
    ("train: {adam_beta1: 0.9}", "train.adam_beta1: unknown key. Fix: it belongs to train.trainer_args.adam_beta1"),
    ("train: {save_strategy: steps}", "train.save_strategy: unknown key. Fix: write train.save_steps"),
    ("lora: {extends: base.yaml}", "lora.extends: unknown key. Fix: move it to the top level of the file"),
    ("zzzzz: 1", "zzzzz: unknown key. Fix: delete it; the keys of a recipe are name, run, model, data"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "what"), WRONG)
def test_wrong_values_and_keys(line: str, what: str) -> None:
    (problem,) = problems_of(f"{MINIMAL}# a comment\n{line}\n")
    assert problem.startswith(f"job.yaml:7: {what}")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("{train: rows.jsonl}", "data.train: got rows.jsonl (text); must be a list. Fix: write [{path: rows.jsonl}]"),
        ("{train: {path: rows.jsonl}}", "data.train: got a mapping; must be a list. Fix: put `- ` before each item"),
        ("{train: []}", "data.train: got an empty list; must be a list of at least 1"),
        ("{train: [rows.jsonl]}", "data.train[0]: got rows.jsonl (text); must be a mapping. Fix: write {path: rows.jsonl}"),
        ("{train: [null]}", "data.train[0]: got null; must be a mapping"),
        ("{train: [{name: x}]}", "data.train[0].path: is missing, but required. Fix: add `path: data/rows.jsonl`"),
        ("{train: [{path: a.jsonl, wieght: 2}]}", "data.train[0].wieght: unknown key. Fix: did you mean weight?"),
        ("{train: [{path: a}, {path: a}]}", "data.train[1].path: got a, which data.train[0] has too"),
        ("{train: [{path: a}], eval: 0.1}", "data.eval: got 0.1 (a number); must be a mapping such as {fraction: 0.02}"),
        ("{train: [{path: a}], eval: {fraction: 2}}", "data.eval.fraction: got 2; must be less than 1"),
        ("{train: [{path: a}], eval: {fracton: 0.1}}", "data.eval.fraction: is missing"),
        ("{train: [{path: a}], eval: [{pth: b}]}", "data.eval[0].path: is missing"),
        ("{}", "data.train: is missing, but required. Fix: add `train: [{path: data/rows.jsonl}]`"),
    ],
)  # fmt: skip
def test_wrong_data(data: str, what: str) -> None:
    first = problems_of(f"model: {{base: x}}\n\ndata: {data}\n")[0]
    assert first.startswith(f"job.yaml:3: {what}")


def test_required_sections() -> None:
    problems = problems_of("lora: {r: 8}\n")
    assert [problem.split(". Fix")[0] for problem in problems] == [
        "job.yaml:1: model: is missing, but required",
        "job.yaml:1: data: is missing, but required",
    ]
    assert problems_of("model: {dtype: auto}\n" + MINIMAL[MINIMAL.index("data") :])[0].startswith(
        "job.yaml:1: model.base: is missing"
    )
