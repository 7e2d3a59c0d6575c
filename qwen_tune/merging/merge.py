"""Base and adapter into a full model, with proof that the merge changed what it should and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_tune.disk import sha256
from qwen_tune.errors import MergeError, Problem
from qwen_tune.model.adapter_dir import AdapterDir, load_with_adapter, recorded_facts
from qwen_tune.model.adapter_writer import write_generation_config
from qwen_tune.model.base import BaseCheckpoint, TensorSpan
from qwen_tune.runs.directory import RunDir, temporary_beside, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def merge_run(run: RunDir) -> Path:
    """Merges a run's own adapter into its own base, beside the adapter."""
    return merge(run.path, output=run.merged, overwrite=True)


def merge(path: Path, *, output: Path | None = None, base: str | None = None, overwrite: bool = False) -> Path:
    """Merges an adapter into its base as PEFT does, in the type of the base's weights.

    Args:
        path: A run directory or an adapter directory.
        output: Where the model goes; `merged` in the run directory when None.
        base: See `AdapterDir.open`.
        overwrite: Whether a model that is there may be replaced.

    Returns:
        The model's directory, complete: weights, configuration, tokenizer, chat template and merge.json.

    Raises:
        MergeError: Adapter and base do not fit, or the output is in use.
    """
    adapter = AdapterDir.open(path, base)
    if output is None and adapter.path.parent.name == "checkpoints":
        raise MergeError(Problem(str(path), "a checkpoint is no place for a model", "say where it goes with --output"))
    target = output or (adapter.run / "merged" if adapter.run else path.with_name(f"{path.resolve().name}-merged"))
    _check_target(target, adapter, overwrite)
    _check_base(adapter)
    temporary = temporary_beside(target)
    temporary.mkdir(parents=True)
    try:
        consumed = _write_model(adapter, temporary)
        facts = _prove(adapter, temporary, consumed)
        write_atomically(temporary / "merge.json", json.dumps(facts, indent=2) + "\n")
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _check_target(target: Path, adapter: AdapterDir, overwrite: bool) -> None:
    """Makes sure that writing the output, or replacing what is there, can cost nobody anything.

    Raises:
        MergeError: The output lies in or around the base or the adapter, or is there and may not be replaced.
    """
    resolved = target.resolve()
    for name, path in (("base", adapter.base.path.resolve()), ("adapter", adapter.path.resolve())):
        if resolved == path or resolved in path.parents or path in resolved.parents:
            what = f"the output would lie in or around the {name}"
            raise MergeError(Problem(str(target), what, "give another --output"))
    if not target.exists():
        return
    if not (target / "merge.json").exists():
        raise MergeError(
            Problem(str(target), "something is there that is no merged model of ours", "give another --output")
        )
    if not overwrite:
        raise MergeError(
            Problem(str(target), "the output is there already", "give another --output, or replace it with --overwrite")
        )


def _write_model(adapter: AdapterDir, target: Path) -> int:
    """Writes the merged model.

    Returns:
        How many of the adapter's tensors found a place.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoTokenizer

    model = load_with_adapter(adapter, "auto")
    with safe_open(adapter.path / "adapter_model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    # Embeddings are no part of it; "auto" would ask the Hub whether the vocabulary has grown.
    placed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if stored != placed:
        lost = sorted(stored ^ placed)
        raise MergeError(
            Problem(str(adapter.path), f"{len(lost)} of the adapter's tensors fit nothing in the base ({lost[0]}, …)")
        )
    merged = model.merge_and_unload()
    # What a tokenizer and a server read comes from the adapter; sampling settings would refuse to be saved when they
    # contradict each other in the base's file, so the file is written by us.
    merged.generation_config = type(merged.generation_config)()
    merged.save_pretrained(target)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        adapter.path if (adapter.path / "tokenizer_config.json").exists() else adapter.base.path
    )
    tokenizer.save_pretrained(target)
    write_generation_config(target, adapter.base, tokenizer)
    _complete_config(target / "config.json", tokenizer)
    return len(placed)


def _complete_config(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ends texts where turns end, and adds the keys under which transformers 4 looks.

    Without the latter it takes 10,000 for rope_theta, saying nothing.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    config["eos_token_id"] = tokenizer.eos_token_id
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_base(adapter: AdapterDir) -> None:
    """Compares the base with the one that the run recorded.

    PEFT takes any base whose shapes fit, and the result is a model that nobody trained.
    """
    trained_on = recorded_facts(adapter.path).get("base", {}).get("weights_fingerprint")
    if trained_on and trained_on != adapter.base.weights_fingerprint():
        raise MergeError(
            Problem(
                adapter.base.id,
                "these are not the weights that the adapter was trained on (their fingerprints differ)",
                "give the right base with --base",
            )
        )


def _prove(adapter: AdapterDir, target: Path, consumed: int) -> dict[str, Any]:
    """Compares the files that were written with the base's: names, shapes, numbers, and which tensors changed.

    Raises:
        MergeError: A tensor is missing, has another shape, is not a number, or changed without an adapter; or none did.
    """
    import torch
    from safetensors import safe_open

    merged = BaseCheckpoint(id=str(target), revision=None, path=target, is_local=True)
    ours, theirs = merged.tensors(), _without_tied_copy(adapter.base)
    if {name: span.shape for name, span in ours.items()} != {name: span.shape for name, span in theirs.items()}:
        different = sorted(ours.keys() ^ theirs.keys()) or ["a shape"]
        raise MergeError(Problem(adapter.base.id, f"the merged tensors are not the base's ({different[0]}, …)"))
    planned = _planned_changes(adapter, ours)
    changed: set[str] = set()
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in {span.file for span in (*ours.values(), *theirs.values())}
        }
        for name, span in ours.items():
            tensor, before = files[span.file].get_tensor(name), files[theirs[name].file].get_tensor(name)
            if not bool(torch.isfinite(tensor).all()):
                raise MergeError(Problem(name, "the merged tensor holds values that are no numbers"))
            if tensor.dtype != before.dtype or not torch.equal(tensor, before):
                changed.add(name)
    if changed - planned:
        raise MergeError(Problem(sorted(changed - planned)[0], "the merge changed a tensor that has no adapter"))
    if not changed:
        raise MergeError(
            Problem(str(adapter.path), "the merge changed nothing: the adapter's matrices are zero", "train it first")
        )
    return {
        "base": {
            "id": adapter.base.id,
            "revision": adapter.base.revision,
            "weights": "dequantized" if adapter.dequantized else "original",
        },
        "adapter_tensors": consumed,
        "tensors": len(ours),
        "changed": len(changed),
        "planned": len(planned),
        "unchanged_with_adapter": sorted(planned - changed),
        "files": {file.name: sha256(file) for file in sorted(target.iterdir()) if file.is_file()},
    }


def _planned_changes(adapter: AdapterDir, tensors: Mapping[str, TensorSpan]) -> set[str]:
    """The names of the model's tensors that this merge may change."""
    from safetensors import safe_open

    with safe_open(adapter.path / "adapter_model.safetensors", framework="pt") as file:
        keys = [key.removeprefix("base_model.model.") for key in file.keys()]  # noqa: SIM118
    planned = set()
    for key in keys:
        module, *part = re.split(r"\.(?:lora_|token_adapter\.)", key)
        # Biases and modules that are saved whole go by their own names.
        planned.add(f"{module}.weight" if part else key.replace(".base_layer.", "."))
    if adapter.dequantized:
        planned |= {name for name in tensors if re.search(r"\.layers\.\d+\..*_proj\.weight$", name)}
    return planned


def _without_tied_copy(base: BaseCheckpoint) -> dict[str, TensorSpan]:
    """The base's tensors, less an output matrix that is only a copy of the tied embeddings.

    Some checkpoints store both; Transformers ties them and writes one.
    """
    from safetensors import safe_open

    tensors = base.tensors()
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not base.config.get("tie_word_embeddings") or head not in tensors or embedding not in tensors:
        return tensors
    with safe_open(tensors[head].file, framework="pt") as one, safe_open(tensors[embedding].file, "pt") as other:
        is_copy = one.get_tensor(head).equal(other.get_tensor(embedding))
    return {name: span for name, span in tensors.items() if name != head or not is_copy}
