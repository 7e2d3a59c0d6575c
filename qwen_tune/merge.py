"""Base and adapter into a full model, with proof that the merge changed what it should and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_tune.adapter import write_generation_config
from qwen_tune.base import BaseCheckpoint, TensorSpan, read_json, resolve_base
from qwen_tune.checkpoints import sha256
from qwen_tune.errors import MergeError, Problem, first_line
from qwen_tune.recipe import ModelSpec
from qwen_tune.run_dir import RunDir, temporary_beside, write_atomically

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Starts of an adapter that change the base: merged into the base as it was, such an adapter gives another model.
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "eva")


@dataclass(frozen=True)
class AdapterDir:
    """A PEFT adapter directory with the base that it names.

    `quantization` is the configuration under which the adapter was trained, where its run recorded one; `dequantized`
    says whether it is merged into the base as it was then, or into the base's own weights.
    """

    path: Path
    config: Mapping[str, Any]
    base: BaseCheckpoint
    quantization: Mapping[str, Any] | None = None
    dequantized: bool = False

    @classmethod
    def open(cls, path: Path, base: str | None = None) -> AdapterDir:
        """Reads an adapter's configuration and finds its base.

        Args:
            path: A run directory, a checkpoint or an adapter directory.
            base: `dequantized` or `original` weights of the base that the adapter names, or another base. Default:
                dequantized where the run trained on a quantized base.

        Raises:
            MergeError: There is no adapter, or one that no base can be merged with.
            ModelError: The base is not to be had.
        """
        folder = path / "adapter" if (path / "adapter").is_dir() else path
        config_file = folder / "adapter_config.json"
        if not config_file.exists():
            raise MergeError(
                Problem(
                    str(path),
                    "there is no adapter here; expected a finished run, or a directory with adapter_config.json",
                    "run `qwen-tune train` first",
                )
            )
        if not (folder / "adapter_model.safetensors").exists():
            raise MergeError(Problem(str(folder), "there is no adapter_model.safetensors; pickles are not loaded"))
        config = read_json(config_file)
        quantization = _recorded_facts(folder).get("quantization")
        if base == "dequantized" and quantization is None:
            what = "no run beside the adapter says that it was trained on a quantized base, nor how"
            raise MergeError(Problem(str(path), what, "give the run's directory, or --base original"))
        other = None if base in ("dequantized", "original") else base
        named = other or config.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise MergeError(Problem(str(config_file), "it names no base (base_model_name_or_path)", "give --base"))
        revision = None if other or Path(named).is_dir() else config.get("revision")
        found = resolve_base(ModelSpec(base=named, revision=revision))
        return cls(folder, config, found, quantization, dequantized=quantization is not None and base != "original")

    @property
    def run(self) -> Path | None:
        """The run directory that the adapter lies in, if it does."""
        return self.path.parent if (self.path.parent / "run.json").exists() else None


def _recorded_facts(folder: Path) -> Mapping[str, Any]:
    """What the run says that an adapter or a checkpoint belongs to; nothing where there is none."""
    for run in (folder.parent, folder.parent.parent):
        if (run / "run.json").exists():
            return RunDir.open(run).facts
    return {}


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


def load_with_adapter(adapter: AdapterDir, dtype: Any, *, quantized: bool = False) -> PeftModel:
    """Base and adapter in memory, as PEFT puts them together.

    Args:
        adapter: The adapter and its base.
        dtype: The type of the base's weights; `auto` for that of the files.
        quantized: Leave a base quantized that was so in training, rather than unpack it.

    Raises:
        MergeError: A file cannot be read, or the adapter has keys or shapes that this base does not.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        model = _load_base(adapter, dtype, quantized=quantized)
        return PeftModel.from_pretrained(model, adapter.path)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        what = f"the adapter does not fit the base {adapter.base.id} ({first_line(error)})"
        raise MergeError(Problem(str(adapter.path), what, "give --base")) from error


def _load_base(adapter: AdapterDir, dtype: Any, *, quantized: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if adapter.quantization is None or not (adapter.dequantized or quantized):
        return AutoModelForCausalLM.from_pretrained(adapter.base.path, dtype=dtype, trust_remote_code=False)
    from qwen_tune.model import own_device
    from qwen_tune.quantization import config_from_facts

    model = AutoModelForCausalLM.from_pretrained(
        adapter.base.path,
        dtype=dtype,
        trust_remote_code=False,
        quantization_config=config_from_facts(adapter.quantization),
        device_map={"": own_device() if quantized else "cpu"},
    )
    if quantized:
        return model
    # The weights that the adapter was trained on: what 4 or 8 bits left of the base, in the type of its files.
    model = model.dequantize(dtype=model.dtype)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


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

    _check_start(adapter)
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


def _check_start(adapter: AdapterDir) -> None:
    start = adapter.config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGED_BASES):
        raise MergeError(
            Problem(
                str(adapter.path),
                f"this adapter was started by {start}, which changes the base, and holds no conversion to plain LoRA",
                "merge the adapter of the finished run, which is converted",
            )
        )


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
    if adapter.run is None:
        return
    trained_on = RunDir.open(adapter.run).facts.get("base", {}).get("weights_fingerprint")
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
