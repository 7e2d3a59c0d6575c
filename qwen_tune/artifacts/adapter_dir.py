"""An adapter as files, found with its base and put on it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_tune.disk import read_json
from qwen_tune.errors import MergeError, Problem, first_line
from qwen_tune.model.base import METADATA_PATTERNS, BaseCheckpoint, find_base
from qwen_tune.model.tensor_files import FINGERPRINT_KEY, read_metadata
from qwen_tune.runs.checkpoints import list_checkpoints
from qwen_tune.runs.directory import RunDir

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


ADAPTER_FILE = "adapter_model.safetensors"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# Starts of an adapter that change the base: merged into the base as it was, such an adapter gives another model.
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def suggest_adapter(run: Path) -> str:
    """The fix for a run without an adapter: its last checkpoint is one."""
    checkpoints = list_checkpoints(run / "checkpoints")
    return f"take {checkpoints[-1]}, or finish the run" if checkpoints else "run `qwen-tune train` first"


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
            path: A run directory, a checkpoint, an adapter directory, or the Hub id of an adapter.
            base: `dequantized` or `original` weights of the base that the adapter names, or another base. Default:
                dequantized where the run trained on a quantized base.

        Raises:
            MergeError: There is no adapter, or one that no base can be merged with.
            ModelError: The base is not available.
        """
        folder = _folder_of(path)
        config_file = folder / "adapter_config.json"
        if not config_file.exists():
            what = "there is no adapter here; expected a finished run, or a directory with adapter_config.json"
            raise MergeError(Problem(str(path), what, suggest_adapter(path)))
        if not (folder / ADAPTER_FILE).exists():
            what = f"there is no {ADAPTER_FILE}; pickles are not loaded, as they can run any program"
            raise MergeError(Problem(str(folder), what, "save the adapter as safetensors, as PEFT does by default"))
        config = read_json(config_file)
        quantization = recorded_facts(folder).get("quantization")
        if base == "dequantized" and quantization is None:
            what = "no run beside the adapter says that it was trained on a quantized base, nor how"
            raise MergeError(Problem(str(path), what, "give the run's directory, or --base original"))
        other = None if base in ("dequantized", "original") else base
        named = other or config.get("base_model_name_or_path")
        if not isinstance(named, str) or not named:
            raise MergeError(Problem(str(config_file), "it names no base (base_model_name_or_path)", "give --base"))
        revision = None if other or Path(named).is_dir() else config.get("revision")
        found = find_base(named, revision)
        return cls(folder, config, found, quantization, dequantized=quantization is not None and base != "original")

    @property
    def run(self) -> Path | None:
        """The run directory of the adapter, if it is in one."""
        return self.path.parent if (self.path.parent / "run.json").exists() else None


def _folder_of(path: Path) -> Path:
    """The folder with an adapter's files, from the Hub if there is no such place and the name could be there.

    Raises:
        MergeError: The Hub gives us no such adapter.
    """
    if path.exists() or not _HUB_ID.fullmatch(str(path)):
        folder = path.resolve()  # its run is found by the folders around it
        return folder / "adapter" if (folder / "adapter").is_dir() else folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=[*METADATA_PATTERNS, ADAPTER_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        what = f"neither a directory nor an adapter that the Hub gives us ({first_line(error)})"
        fix = "check the name; for a private adapter run `hf auth login`"
        raise MergeError(Problem(str(path), what, fix)) from error


def recorded_facts(folder: Path) -> Mapping[str, Any]:
    """The record of the run that an adapter or a checkpoint belongs to; empty without a run."""
    for run in (folder.parent, folder.parent.parent):
        if (run / "run.json").exists():
            return RunDir.open(run).facts
    return {}


def load_with_adapters(adapters: Sequence[AdapterDir], dtype: Any, *, quantized: bool = False) -> PeftModel:
    """Base and adapters in memory, as PEFT puts them together; all of them are active.

    Args:
        adapters: The adapters; the base is the first one's.
        dtype: The type of the base's weights; `auto` for that of the files.
        quantized: Leave a base quantized that was so in training, rather than unpack it.

    Raises:
        MergeError: A file cannot be read, or an adapter has keys or shapes that this base does not.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    names = ["default", *(f"adapter{number}" for number in range(1, len(adapters)))]
    adapter = adapters[0]
    check_start(adapter)
    try:
        model = PeftModel.from_pretrained(_load_base(adapter, dtype, quantized=quantized), adapter.path)
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            check_start(adapter)
            model.load_adapter(adapter.path, name)
        if len(names) > 1:
            model.base_model.set_adapter(names)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        what = f"the adapter does not fit the base {adapter.base.id} ({first_line(error)})"
        raise MergeError(Problem(str(adapter.path), what, "give --base")) from error
    return model


def _load_base(adapter: AdapterDir, dtype: Any, *, quantized: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if adapter.quantization is None or not (adapter.dequantized or quantized):
        return AutoModelForCausalLM.from_pretrained(adapter.base.path, dtype=dtype, trust_remote_code=False)
    from qwen_tune.model.loading import own_device
    from qwen_tune.model.quantization import config_from_facts

    model = AutoModelForCausalLM.from_pretrained(
        adapter.base.path,
        dtype=dtype,
        trust_remote_code=False,
        quantization_config=config_from_facts(adapter.quantization),
        device_map={"": own_device() if quantized else "cpu"},
    )
    if quantized:
        from qwen_tune.model.quantized_layers import keep_training_function

        keep_training_function(model)
        return model
    # The weights that the adapter was trained on: what 4 or 8 bits left of the base, in the type of its files.
    model = model.dequantize(dtype=model.dtype)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def base_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the weights that an adapter was trained on; None where nobody has recorded it."""
    recorded = recorded_facts(folder).get("base", {}).get("weights_fingerprint")
    return recorded or read_metadata(folder / ADAPTER_FILE).get(FINGERPRINT_KEY)


def check_start(adapter: AdapterDir) -> None:
    """Raises MergeError where the adapter's start took a part of the base, which is not in the base any more."""
    start = adapter.config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASES):
        raise MergeError(
            Problem(
                str(adapter.path),
                f"this adapter was started by {start}, which changes the base, and holds no conversion to plain LoRA",
                "take the adapter of the finished run, which is converted",
            )
        )
