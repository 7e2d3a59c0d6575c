"""What runs in a process of its own: the base is built, the ceiling measured, or one side trained.

Heavy packages are imported where a side needs them: Unsloth must come first in its process, and ours readies its own.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training_bench.cases import Case
from training_bench.rows import ROWS_A_BATCH, Row, probe_examples, read_records
from training_bench.shapes import ALPHA, LINEAR, RANK, SHAPES, Shape

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny-qwen"
LEARNING_RATE = 1e-4
PROBE = "probe"


def machine() -> dict[str, Any]:
    """What this runs on, and its ceiling: the fastest of three large products, the median of repeats."""
    import torch

    use_all_cores()
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    products = {}
    for size in (4096, 8192, 16384) if cuda else (1024, 2048):
        one, other = (torch.randn(size, size, dtype=dtype, device="cuda" if cuda else "cpu") for _ in range(2))
        result = torch.empty_like(one)
        seconds = []
        for repeat in range(13 if cuda else 7):
            wait()
            start = time.perf_counter()
            torch.matmul(one, other, out=result)
            wait()
            seconds += [time.perf_counter() - start] if repeat > 2 else []
        products[size] = 2 * size**3 / statistics.median(seconds)
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "liger-kernel"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {usable_cores()} cores",
        "load_average": os.getloadavg()[0],
        "versions": versions,
        "ceiling_dtype": str(dtype).removeprefix("torch."),
        "ceiling_flops": max(products.values()),
        "products_flops": products,
    }


def wait() -> None:
    """Until a GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores() -> None:
    """On every side the same number of threads."""
    import torch

    torch.set_num_threads(usable_cores())


def build_base(folder: Path, shape: Shape) -> None:
    """A checkpoint of a shape, its random weights made on the device, with the tiny model's tokenizer.

    All sides read the same files, because Unsloth and qwen-tune load nothing else.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    cuda = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    dtype = torch.bfloat16 if cuda else torch.float32
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        torch.set_default_dtype(dtype)
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape.config(), **ends), dtype=dtype)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="5GB")
    for file in TINY.glob("*"):
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copy(file, folder)


def measure(side: str, case: Case, base: Path, rows: Path) -> dict[str, Any]:
    """Trains one side and returns what its gauges found."""
    data = read_records(rows)
    probe = probe_examples(data, case.length)
    with tempfile.TemporaryDirectory() as folder:
        if side.startswith("ours"):
            return train_ours(case, base, rows, probe, Path(folder), compiled=side == "ours-compiled")
        return train_trl(side, case, base, data, probe, Path(folder))


def train_ours(
    case: Case, base: Path, rows: Path, probe: Sequence[Row], folder: Path, *, compiled: bool, watcher: Any = None
) -> dict[str, Any]:
    """The package's own entry, with gauges on the trainer that it builds, and a callback where one is given."""
    from qwen_tune.distributed.world import prepare_process

    prepare_process()
    import qwen_tune.training.trainer as trainers
    from qwen_tune.train import train
    from training_bench.gauges import Gauges

    installed: list[Gauges] = []
    build = trainers.build_trainer

    def build_with_gauges(*args: Any, **kwargs: Any) -> Any:
        trainer = build(*args, **kwargs)
        installed.append(Gauges(trainer, case, probe, lambda trainer, rows: [as_one_pack(rows, "lengths")]))
        installed[0].install()
        if watcher is not None:
            trainer.add_callback(watcher)
        return trainer

    trainers.build_trainer = build_with_gauges
    recipe = {
        "run": {"dir": f"{folder}/run"},
        "model": {"base": str(base), "quantization": "nf4" if case.held == "nf4" else "none"},
        "data": {"train": [{"path": str(rows), "format": "tokenized"}], "max_length_tokens": case.length},
        "lora": {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0},
        "train": {
            "max_steps": steps(case),
            "global_batch_size": 1,
            "learning_rate": LEARNING_RATE,
            "logging_steps": steps(case),
            "gradient_checkpointing": case.checkpointing,
            "torch_compile": compiled,
        },
        "export": {"merge": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    train(path)
    fused = installed[0].trainer.fused
    return {**installed[0].result(), "kernels": str(fused)}


def train_trl(
    side: str, case: Case, base: Path, rows: Sequence[Row], probe: Sequence[Row], folder: Path
) -> dict[str, Any]:
    """TRL's trainer with TRL's own batches and loss; under Unsloth the trainer that Unsloth makes of it."""
    if side == "unsloth":
        import unsloth  # noqa: F401
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    use_all_cores()
    cuda = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_length": case.length,
        "max_steps": steps(case),
        "learning_rate": LEARNING_RATE,
        "logging_steps": steps(case),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": cuda,
        "use_cpu": not cuda,
    }
    if side != "trl":
        full = case.checkpointing == "full"
        settings |= {"packing": True, "per_device_train_batch_size": 1, "gradient_checkpointing": full}
    if side == "trl-liger":
        settings["use_liger_kernel"] = True
    if side == "unsloth":
        # Its own checkpointing sits in the model already; the trainer's would be a second one.
        settings["gradient_checkpointing"] = False
        model, tokenizer, adapter = unsloth_model(case, base)
    else:
        model, tokenizer, adapter = transformers_model(case, base)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    from training_bench.gauges import Gauges

    gauges = Gauges(trainer, case, probe, trl_examples)
    gauges.install()
    trainer.train()
    return gauges.result()


def transformers_model(case: Case, base: Path) -> tuple[Any, Any, Any]:
    """Model, tokenizer and adapter as TRL's documentation makes them."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    quantization = None
    if case.held == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.bfloat16 if cuda else torch.float32,
        device_map={"": 0} if cuda else None,
        quantization_config=quantization,
    )
    adapter = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(LINEAR))
    return model, AutoTokenizer.from_pretrained(base), adapter


def unsloth_model(case: Case, base: Path) -> tuple[Any, Any, None]:
    """Model and tokenizer as Unsloth's notebooks make them; the adapter is on the model."""
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base), max_seq_length=case.length, load_in_4bit=case.held == "nf4"
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        target_modules=list(LINEAR),
        use_gradient_checkpointing="unsloth" if case.checkpointing == "full" else False,
    )
    return model, tokenizer, None


def trl_examples(trainer: Any, rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """What TRL's collator takes: one pack where the data set was packed, else the rows."""
    if "seq_lengths" in trainer.train_dataset.column_names:
        return [as_one_pack(rows, "seq_lengths")]
    return [dict(row) for row in rows]


def as_one_pack(rows: Sequence[Row], lengths: str) -> dict[str, Any]:
    """Rows one after the other, with their lengths under a name."""
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        lengths: [len(row["input_ids"]) for row in rows],
    }


def steps(case: Case) -> int:
    """Optimizer steps of a measurement."""
    return case.warm_up_steps + case.measured_steps


def rows_needed(case: Case) -> int:
    """Rows that last for all steps, twice as many as the mean length asks for."""
    return 2 * ROWS_A_BATCH * steps(case)


def run_job(job: Mapping[str, Any]) -> Any:
    """One of the three things that a process can be asked for."""
    if job["do"] == "machine":
        return machine()
    if job["do"] == "base":
        return build_base(Path(job["base"]), SHAPES[job["shape"]])
    return measure(job["side"], Case(**job["case"]), Path(job["base"]), Path(job["rows"]))
