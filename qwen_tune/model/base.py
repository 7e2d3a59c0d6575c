"""The base checkpoint as files: where it lies, which revision it is, and what identifies it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_tune.disk import read_json
from qwen_tune.errors import ModelError, Problem, first_line
from qwen_tune.families.known import family_of
from qwen_tune.families.shape import Shape, read_shape, stored_quantization
from qwen_tune.model.tensor_files import TensorSpan, read_spans

if TYPE_CHECKING:
    from qwen_tune.recipe.schema import ModelSpec

METADATA_PATTERNS = ("*.json", "*.jinja", "*.txt")
WEIGHT_FILES = ("*.safetensors",)
INDEX_FILE = "model.safetensors.index.json"

_OTHER_BASE = "check model.base in the recipe, or give another one with --base"
FINGERPRINT_BLOCKS = 64
FINGERPRINT_BLOCK_BYTES = 4096


@dataclass(frozen=True)
class BaseCheckpoint:
    """A Transformers directory. `id` is the Hub id, or the path as the recipe has it; `revision` a commit hash."""

    id: str
    revision: str | None
    path: Path
    is_local: bool

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return read_json(self.path / "config.json")

    @property
    def model_type(self) -> str:
        """The architecture's name in config.json: qwen2, qwen3, …"""
        return str(self.config.get("model_type"))

    @property
    def max_position_embeddings(self) -> int:
        """The context length of the checkpoint in tokens."""
        return int(self.config.get("max_position_embeddings", 1 << 30))

    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the weights, in the order of their names.

        Raises:
            ModelError: There are none, the index names a file that is not there, or one outside the directory.
        """
        index = self.path / INDEX_FILE
        if not index.exists():
            single = self.path / "model.safetensors"
            if single.exists():
                return [single]
            raise ModelError(
                Problem(str(self.path), "no model.safetensors there; expected weights in safetensors files")
            )
        names = sorted(set(self._weight_map().values()))
        for name in names:
            if Path(name).name != name:
                raise ModelError(Problem(str(index), f"it names {name!r}, which is not a file beside it"))
            if not (self.path / name).exists():
                raise ModelError(Problem(str(index), f"it names {name}, which is not there", "download it again"))
        return [self.path / name for name in names]

    def _weight_map(self) -> Mapping[str, str]:
        """The file of each tensor, as the index has it; nothing where there is no index."""
        index = self.path / INDEX_FILE
        if not index.exists():
            return {}
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
            raise ModelError(Problem(str(index), "it has no weight_map of tensors to files", "download it again"))
        return files

    def tensors(self) -> dict[str, TensorSpan]:
        """Every tensor's place, from the files' headers alone.

        Raises:
            ModelError: A file is not whole, or does not hold what the index says.
        """
        spans = {name: span for file in self.weight_files() for name, span in read_spans(file).items()}
        for name, file in self._weight_map().items():
            if name not in spans or spans[name].file.name != file:
                what = f"it says that {name} lies in {file}, which is not so"
                raise ModelError(Problem(str(self.path / INDEX_FILE), what, "download the checkpoint again"))
        return spans

    @cached_property
    def shape(self) -> Shape:
        return read_shape(self.config, self.id)

    def config_sha256(self) -> str:
        return hashlib.sha256((self.path / "config.json").read_bytes()).hexdigest()

    def weights_fingerprint(self) -> str:
        """sha256 over names, dtypes, shapes and 64 blocks of 4 KiB spread over each tensor.

        Reading all of a 145 GB checkpoint at every start is not affordable; a re-trained or re-quantized checkpoint
        differs in nearly every block.
        """
        digest = hashlib.sha256()
        with ExitStack() as stack:
            files = {file: stack.enter_context(file.open("rb", buffering=0)) for file in self.weight_files()}
            for name, span in sorted(self.tensors().items()):
                digest.update(f"{name} {span.dtype} {span.shape}\n".encode())
                file = files[span.file].fileno()
                blocks = min(FINGERPRINT_BLOCKS, -(-span.length // FINGERPRINT_BLOCK_BYTES))
                size = min(FINGERPRINT_BLOCK_BYTES, span.length)
                for block in range(blocks):
                    digest.update(os.pread(file, size, span.start + block * span.length // blocks))
        return digest.hexdigest()


def resolve_base(model: ModelSpec, *, weights: bool = True, max_length_tokens: int | None = None) -> BaseCheckpoint:
    """Finds the base checkpoint of a recipe; see `find_base`.

    Args:
        model: The recipe's model section.
        weights: False to do without the weights (a preview needs the tokenizer alone).
        max_length_tokens: The longest sample, which must fit into the checkpoint's context.

    Raises:
        ModelError: It is not there, not complete, or of a kind that is not trained yet.
    """
    base = find_base(model.base, model.revision, weights=weights)
    family_of(base.config, base.id)
    if max_length_tokens is not None and max_length_tokens > base.max_position_embeddings:
        raise ModelError(
            Problem(
                "data.max_length_tokens",
                f"{max_length_tokens} is more than the {base.max_position_embeddings} tokens of context of {base.id}",
                f"set it to {base.max_position_embeddings} or less",
            )
        )
    if weights:
        base.weight_files()
    return base


def check_unquantized(base: BaseCheckpoint) -> None:
    """Looks whether the checkpoint's weights are as they were trained.

    Raises:
        ModelError: They are quantized already.
    """
    if method := stored_quantization(base.config):
        raise ModelError(
            Problem(
                base.id,
                f"its weights are quantized already ({method}); an adapter trained on them fits no other weights",
                "use the checkpoint that it was made from, with model.quantization: nf4 or int8 to save memory",
            )
        )


def find_base(id: str, revision: str | None = None, *, weights: bool = True) -> BaseCheckpoint:
    """Finds a checkpoint of any kind, downloading it from the Hub when it is not local.

    Args:
        id: A directory, or a Hub id. It is a directory if it starts with . / ~ or is there.
        revision: Branch, tag or commit of a Hub id.
        weights: False to leave the weights on the Hub.

    Raises:
        ModelError: It is not there, or has no config.json.
    """
    return _local_base(id, revision) or _hub_base(id, revision, weights=weights)


def _local_base(id: str, revision: str | None) -> BaseCheckpoint | None:
    path = Path(id).expanduser()
    if not id.startswith((".", "/", "~")) and not path.is_dir():
        return None
    if not path.is_dir():
        raise ModelError(Problem(id, "the base checkpoint is not there; expected a directory", _OTHER_BASE))
    if not (path / "config.json").exists():
        raise ModelError(Problem(id, "the directory holds no config.json; expected a Transformers checkpoint"))
    if revision is not None:
        raise ModelError(Problem(id, "model.revision is for Hub ids; this is a directory", "remove revision"))
    return BaseCheckpoint(id=id, revision=None, path=path.resolve(), is_local=True)


def _hub_base(id: str, revision: str | None, *, weights: bool) -> BaseCheckpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*METADATA_PATTERNS, *(WEIGHT_FILES if weights else ())]
    try:
        path = Path(snapshot_download(id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            Problem(
                id,
                f"neither a directory nor a model that the Hub gives us ({first_line(error)})",
                f"{_OTHER_BASE}; for a gated model accept its terms and run `hf auth login`; without a network give "
                "a directory",
            )
        ) from error
    if not (path / "config.json").exists():
        raise ModelError(Problem(id, "the repository holds no config.json; expected a Transformers checkpoint"))
    return BaseCheckpoint(id=id, revision=path.name, path=path, is_local=False)
