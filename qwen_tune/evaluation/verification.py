"""Rows of a run on which models are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_tune.artifacts.adapter_dir import AdapterDir, load_with_adapters
from qwen_tune.disk import parse_json, sha256, write_atomically
from qwen_tune.errors import DataError, MergeError, Problem, RecipeError
from qwen_tune.model.base import BaseCheckpoint
from qwen_tune.model.tensor_files import TensorSpan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from qwen_tune.chatml.template import ChatTemplate, TokenizedExample

PLAIN_PROMPTS = ("Hello!", "Write a function that adds two numbers.", "What is the capital of France?")


def examples_of_the_run(run: Path, template: ChatTemplate, count: int) -> list[TokenizedExample]:
    """The first held-out samples, or training samples; none where the examples are not available any more."""
    from qwen_tune.data.preparation import prepare_data
    from qwen_tune.recipe.files import load_recipe

    try:
        recipe = load_recipe(run / "recipe.yaml")
        data = prepare_data(recipe.data, template, seed=recipe.train.seed)
    except (DataError, RecipeError):
        return []
    return list((data.evaluation.samples if len(data.evaluation.samples) else data.train.samples)[:count])


def plain_prompts(template: ChatTemplate) -> list[list[int]]:
    """A few questions as token ids, for models without a run's examples."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PLAIN_PROMPTS]
    texts = [template.render(chat, add_generation_prompt=True) for chat in chats]
    return [template.tokenizer.encode(text, add_special_tokens=False) for text in texts]


def mean_loss(model: PreTrainedModel, rows: list[TokenizedExample], longest: int) -> float:
    """Nats/token over supervised tokens, of the first `longest` tokens of each example, one example at a time."""
    import torch
    from torch.nn.functional import cross_entropy

    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row.input_ids[:longest]], device=model.device)
            labels = torch.tensor(row.labels[:longest], device=model.device)[1:]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count if count else float("nan")


SAMPLES = 8
TOKENS_A_SAMPLE = 256
LOSS_SAMPLES = 32
LOSS_TOKENS = 1024
SPARE_BYTES = 2 << 30  # for libraries, logits and activations

# The largest |logit - logit'| over the largest |logit|. In float32 only the order of sums differs; a merge stored in 16
# bits rounds every weight it touches, to 8 (bfloat16) or 11 (float16) significant bits. Measured on a model of 0.5B
# parameters in bfloat16: 7e-3.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names
COMPUTED_BYTES = 4  # of a weight: both are computed in float32


@dataclass(frozen=True)
class Comparison:
    """Base + adapter against the merged model, both computed in float32.

    `relative_difference` is the largest difference of two logits over the largest logit; `same_choice` the share of
    positions at which both prefer the same next token. `losses` (nats/token) are there where the run was quantized.
    """

    samples: int
    tokens: int
    stored_dtype: str
    relative_difference: float
    tolerance: float
    same_choice: float
    losses: dict[str, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        facts = {**asdict(self), "passed": self.passed}
        return facts if self.losses else {name: value for name, value in facts.items() if name != "losses"}

    @property
    def passed(self) -> bool:
        """Whether rounding explains the difference; False if it is not finite."""
        return self.relative_difference <= self.tolerance

    def __str__(self) -> str:
        text = (
            f"verified on {self.tokens:,} tokens of {self.samples} samples: the same next token at "
            f"{self.same_choice:.1%} of the positions, logits within {self.relative_difference:.1e} of the largest "
            f"(at most {self.tolerance:.0e} for weights stored in {self.stored_dtype})"
        )
        if self.losses:
            parts = ", ".join(f"{name.replace('_', ' ')} {loss:.4f}" for name, loss in self.losses.items())
            text += f"\nloss on examples of the run (nats/token): {parts}"
        return text


def verify_merged(paths: Sequence[Path], merged: Path, base: str | None = None) -> Comparison:
    """Reads every file again, compares, and adds the result to the model's merge.json; see `compare_merged`.

    Raises:
        MergeError: A file is not what was written, this machine is too small to compare, or the models differ by more
            than the rounding of the stored type explains; merge.json says so as well.
    """
    check_files(merged)
    comparison = compare_merged(paths, merged, base)
    record = merged / "merge.json"
    facts = parse_json(record.read_text(encoding="utf-8"))
    write_atomically(record, json.dumps({**facts, "verification": comparison.facts()}, indent=2) + "\n")
    if not comparison.passed:
        raise MergeError(
            Problem(
                str(merged),
                f"the merged model does not answer like base and adapter: its logits differ by "
                f"{comparison.relative_difference:.1e} of the largest; expected at most {comparison.tolerance:.0e}",
                "merge again; if it stays, the base is another one than the adapter was trained on",
            )
        )
    return comparison


def check_files(merged: Path) -> None:
    """Raises MergeError if a file differs from what merge.json records."""
    known = parse_json((merged / "merge.json").read_text(encoding="utf-8"))["files"]
    for name, digest in known.items():
        if not (merged / name).exists() or sha256(merged / name) != digest:
            raise MergeError(Problem(str(merged / name), "this is not the file that was written", "merge again"))


def compare_merged(paths: Sequence[Path], merged: Path, base: str | None = None) -> Comparison:
    """Loads both models one after the other and compares their logits.

    Args:
        paths: The run, whose held-out examples are used (or training examples, or else a few plain prompts), or
        adapters in
            the order in which they were merged.
        merged: The merged model's directory.
        base: Another base than the one that the adapter names.

    Raises:
        MergeError: Base and adapter cannot be loaded, there is too little memory, or the merged model is stored in a
            type that has no tolerance.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qwen_tune.chatml.template import ChatTemplate

    adapters = [AdapterDir.open(path, base) for path in paths]
    stored = _stored_dtype(merged)
    _check_memory(merged)
    template = ChatTemplate(AutoTokenizer.from_pretrained(merged))
    run = adapters[0].run
    rows = examples_of_the_run(run, template, LOSS_SAMPLES) if run else []
    samples = [row.input_ids for row in rows[:SAMPLES]] or plain_prompts(template)
    batches = [torch.tensor([ids[:TOKENS_A_SAMPLE]]) for ids in samples]
    expected = list(_logits(load_with_adapters(adapters, torch.float32), batches))
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, trust_remote_code=False)
    largest, difference, same = torch.tensor(0.0), torch.tensor(0.0), 0
    for one, other in zip(expected, _logits(model, batches), strict=True):
        largest = torch.maximum(largest, one.abs().max())  # unlike Python's max, it keeps NaN
        difference = torch.maximum(difference, (one - other).abs().max())
        same += int((one.argmax(-1) == other.argmax(-1)).sum())
    losses = {}
    if rows and adapters[0].quantization and len(adapters) == 1:
        here = mean_loss(model, rows, LOSS_TOKENS)
        del model  # there may not be room for two
        losses = _losses(adapters[0], here, rows)
    tokens = sum(ids.shape[1] for ids in batches)
    return Comparison(
        samples=len(batches),
        tokens=tokens,
        stored_dtype=stored,
        relative_difference=float(difference / largest),
        tolerance=TOLERANCE[stored],
        same_choice=same / tokens,
        losses=losses,
    )


def _losses(adapter: AdapterDir, here: float, rows: list[TokenizedExample]) -> dict[str, float]:
    """What the choice of the base costs: the loss as it was trained, merged as it was, and merged the other way."""
    other = replace(adapter, dequantized=not adapter.dequantized)
    there = mean_loss(load_with_adapters([other], "auto").merge_and_unload().float(), rows, LOSS_TOKENS)
    losses = {adapter.dequantized: here, other.dequantized: there}
    return {
        "base_and_adapter": mean_loss(load_with_adapters([adapter], "auto", quantized=True), rows, LOSS_TOKENS),
        "merged_into_the_dequantized_base": losses[True],
        "merged_into_the_original_base": losses[False],
    }


def _logits(model: PreTrainedModel, batches: list[Tensor]) -> Iterator[Tensor]:
    import torch

    model.eval()
    with torch.inference_mode():
        for ids in batches:
            yield model(input_ids=ids, use_cache=False).logits[0].float()


def _check_memory(merged: Path) -> None:
    """Raises MergeError if the model does not fit into free memory in float32."""
    import psutil

    needed = COMPUTED_BYTES * sum(math.prod(span.shape) for span in _spans(merged)) + SPARE_BYTES
    free = psutil.virtual_memory().available
    if needed > free:
        what = (
            f"the model is merged, but comparing it with base + adapter takes {needed / 1e9:.0f} GB of memory, and "
            f"{free / 1e9:.0f} GB are free"
        )
        raise MergeError(Problem(str(merged), what, "run `qwen-tune merge --verify --overwrite` on a larger machine"))


def _stored_dtype(merged: Path) -> str:
    """The coarsest type of the stored weights; counters and masks do not count."""
    stored = {span.dtype for span in _spans(merged) if not span.dtype.startswith(("I", "U", "BOOL"))}
    if unknown := sorted(stored - DTYPE_NAMES.keys()):
        raise MergeError(
            Problem(
                str(merged),
                f"weights are stored as {', '.join(unknown)}; expected {', '.join(DTYPE_NAMES)}",
                "compare the model as it was merged, before other tools change its type",
            )
        )
    return max((DTYPE_NAMES[dtype] for dtype in stored), key=TOLERANCE.__getitem__)


def _spans(merged: Path) -> list[TensorSpan]:
    model = BaseCheckpoint(id=str(merged), revision=None, path=merged, is_local=True)
    return list(model.tensors().values())
