"""Base and adapter into a full model, tensor by tensor, with proof that what should have changed did, and no more."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_tune.artifacts.adapter_dir import ADAPTER_FILE, AdapterDir, base_fingerprint, check_start
from qwen_tune.artifacts.directory import check_room, resumable_directory
from qwen_tune.artifacts.metadata_files import write_metadata_files
from qwen_tune.console import make_console
from qwen_tune.disk import key_of, sha256, write_atomically
from qwen_tune.errors import MergeError, Problem
from qwen_tune.families.shape import is_tied, stored_quantization
from qwen_tune.machine import usable_cores
from qwen_tune.merging.planning import plan_merge
from qwen_tune.merging.safetensors_writer import PROGRESS, Shard, ShardFacts, ShardWriter, divide, index_of
from qwen_tune.merging.steps import HEAD, MergePlan, embedding_of
from qwen_tune.merging.stream import BaseWeights, MergeStream
from qwen_tune.merging.target import check_free, check_place, choose_target
from qwen_tune.model.base import INDEX_FILE, BaseCheckpoint
from qwen_tune.model.tensor_files import TensorSpan, read_spans, same_bytes

LAYOUT = 1
"""Raised whenever the same adapter and base would give other files: what an older version began is started over."""

MERGED_TYPES = ("BF16", "F16", "F32", "F64")


def merge(
    *paths: Path,
    output: Path | None = None,
    base: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
    cores: int | None = None,
) -> Path:
    """Merges adapters into their base as PEFT does, in the type of the base's weights, a few rows at a time.

    What is written stands under another name until it is whole; a merge that was killed resumes after its last whole
    file when it is called again.

    Args:
        paths: Run directories, adapter directories or Hub ids of adapters, in the order in which they are merged.
        output: Where the model goes; `merged` in the run directory when None.
        base: See `AdapterDir.open`.
        overwrite: Whether a model that is there may be replaced.
        max_shard_bytes: Largest weight file; None for the base's own division.
        cores: Threads that compute and hash; None for all that this process may use. Four and more write several files
            at the same time.

    Returns:
        The model's directory, complete: weights, configuration, tokenizer, chat template and merge.json.

    Raises:
        MergeError: Adapter and base do not fit, or the output is in use.
        NoRoomError: The disk is too small.
        ModelError: The base is not available, or not whole.
    """
    adapters = [AdapterDir.open(path, base) for path in paths]
    target = choose_target(paths[0], adapters[0], output)
    check_place(target, adapters)
    check_free(target, overwrite)
    job = _Job.of(adapters, max_shard_bytes)
    with resumable_directory(target, PROGRESS, lambda: check_free(target, overwrite)) as part:
        facts = job.write(part, cores or usable_cores())
        write_atomically(part / "merge.json", json.dumps(facts, indent=2) + "\n")
    return target


def open_stream(adapters: Sequence[AdapterDir]) -> MergeStream:
    """The tensors of a merged model, for whoever writes them in some format.

    Args:
        adapters: In the order in which they are merged; the base is the first one's.

    Raises:
        MergeError: Adapters and base do not fit.
        ModelError: The base is not whole.
    """
    first = adapters[0]
    fingerprint = first.base.weights_fingerprint()
    for adapter in adapters:
        check_start(adapter)
        _check_base(adapter, first, fingerprint)
    tensors = _base_tensors(first.base)
    stored = [(adapter, read_spans(adapter.path / ADAPTER_FILE)) for adapter in adapters]
    plan = plan_merge(stored, tensors, is_tied=is_tied(first.base.config))
    _check_types(first.base, plan, tensors)
    return MergeStream(tensors, plan, BaseWeights(tensors, _quantization(first)))


@dataclass(frozen=True)
class _Job:
    """One merge, planned before anything is written."""

    adapters: Sequence[AdapterDir]
    hashes: Sequence[str]
    fingerprint: str
    stream: MergeStream
    shards: Sequence[Shard]

    @classmethod
    def of(cls, adapters: Sequence[AdapterDir], max_shard_bytes: int | None) -> _Job:
        stream = open_stream(adapters)
        hashes = [sha256(adapter.path / ADAPTER_FILE) for adapter in adapters]
        fingerprint = adapters[0].base.weights_fingerprint()
        return cls(adapters, hashes, fingerprint, stream, divide(stream.tensors, max_shard_bytes))

    @property
    def key(self) -> str:
        """What identifies the files: of two jobs with one key, one resumes where the other stopped."""
        base = self.adapters[0].base
        return key_of(
            {
                "layout": LAYOUT,
                "base": [self.fingerprint, *(str(file) for file in base.weight_files())],
                "adapters": [[hash_, dict(one.config)] for hash_, one in zip(self.hashes, self.adapters, strict=True)],
                "quantization": _quantization(self.adapters[0]),
                "shards": [[shard.name, *(tensor.name for tensor in shard.tensors)] for shard in self.shards],
            }
        )

    def write(self, part: Path, cores: int) -> dict[str, Any]:
        """Writes all files but merge.json; returns what that says."""
        length = sum(shard.length for shard in self.shards)
        with _progress(length) as count:
            writer = ShardWriter(part, self.key, cores, count)
            done = writer.find_done(self.shards)
            count(done)
            check_room(part, length - done)
            # First what is small: a fault in it shows at once.
            write_metadata_files(part, self.adapters[0], untied=self.stream.plan.untied)
            if len(self.shards) > 1:
                (part / INDEX_FILE).write_text(index_of(self.shards), encoding="utf-8")
            written = writer.write(self.shards)
        return self._prove(part, written)

    def _prove(self, part: Path, written: Mapping[str, ShardFacts]) -> dict[str, Any]:
        """What merge.json says, and the last look: at names and shapes in the files, and at what has changed.

        Raises:
            MergeError: A tensor is missing, has another shape, or none has changed.
        """
        first = self.adapters[0]
        expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in self.stream.tensors}
        spans = {name: span for shard in self.shards for name, span in read_spans(part / shard.name).items()}
        if {name: (span.dtype, span.shape) for name, span in spans.items()} != expected:
            raise MergeError(Problem(first.base.id, "the merged tensors are not the base's", "merge again"))
        changed = {name for facts in written.values() for name in facts.changed}
        planned = {tensor.name for tensor in self.stream.tensors if tensor.may_differ}
        if not changed & self.stream.plan.steps.keys():
            what = "the merge changed nothing: the adapter's matrices are zero"
            raise MergeError(Problem(str(first.path), what, "train it first"))
        hashes = {name: facts.sha256 for name, facts in written.items()}
        hashes |= {file.name: sha256(file) for file in part.iterdir() if file.name not in (*hashes, PROGRESS)}
        return {
            "base": {
                "id": first.base.id,
                "revision": first.base.revision,
                "weights": "dequantized" if first.dequantized else "original",
                "weights_fingerprint": self.fingerprint,
            },
            "adapters": [{"sha256": hash_} for hash_ in self.hashes],
            "adapter_tensors": self.stream.plan.consumed,
            "tensors": len(spans),
            "bytes": sum(shard.length for shard in self.shards),
            "changed": len(changed),
            "planned": len(planned),
            "unchanged_with_adapter": sorted(planned - changed),
            "untied": self.stream.plan.untied,
            "untied_bytes": spans[HEAD].length if self.stream.plan.untied else 0,
            "files": dict(sorted(hashes.items())),
        }


def _quantization(adapter: AdapterDir) -> Mapping[str, Any] | None:
    """How the base was quantized, if the adapter is merged into the dequantized weights."""
    return adapter.quantization if adapter.dequantized else None


def _base_tensors(base: BaseCheckpoint) -> dict[str, TensorSpan]:
    """The base's tensors, less an output matrix that is only a copy of the tied embeddings.

    Some checkpoints store both; Transformers ties them and writes one.
    """
    tensors = base.tensors()
    embedding = embedding_of(tensors)
    if is_tied(base.config) and HEAD in tensors and embedding and same_bytes(tensors[HEAD], tensors[embedding]):
        del tensors[HEAD]
    return tensors


def _check_base(adapter: AdapterDir, first: AdapterDir, fingerprint: str) -> None:
    """Compares the base with the one that the adapter was trained on, where that was recorded.

    PEFT takes any base whose shapes fit, and the result is a model that nobody trained.
    """
    trained_on = base_fingerprint(adapter.path)
    if trained_on and trained_on != fingerprint:
        raise MergeError(
            Problem(
                first.base.id,
                f"these are not the weights that the adapter was trained on ({adapter.path}; the fingerprints differ)",
                "give the right base with --base",
            )
        )
    if adapter.base.path != first.base.path and adapter.base.weights_fingerprint() != fingerprint:
        what = f"it names another base than {first.path} does: {adapter.base.id}, and not {first.base.id}"
        raise MergeError(Problem(str(adapter.path), what, "merge adapters of one base, or name it with --base"))
    if adapter.dequantized != first.dequantized or (adapter.dequantized and adapter.quantization != first.quantization):
        what = "the adapters were not trained on a base that was quantized in one way"
        raise MergeError(Problem(str(adapter.path), what, "merge all into --base original"))


def _check_types(base: BaseCheckpoint, plan: MergePlan, tensors: Mapping[str, TensorSpan]) -> None:
    if method := stored_quantization(base.config):
        what = f"its weights are quantized ({method}), so nothing can be added to them"
        raise MergeError(Problem(base.id, what, "give the checkpoint that it was made from with --base"))
    for name in plan.steps:
        span = tensors.get(name)
        if span and span.dtype not in MERGED_TYPES:
            what = f"{name} is stored as {span.dtype}; expected one of {', '.join(MERGED_TYPES)}"
            raise MergeError(Problem(base.id, what, "give a base in 16 or 32 bits with --base"))


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A progress bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = make_console(stderr=True)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("merging", total=total)
        yield lambda count: progress.advance(task, count)
