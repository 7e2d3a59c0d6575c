"""Whether a merged model answers like base and adapter: their logits, on the rows of the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_tune.errors import DataError, MergeError, Problem, RecipeError
from qwen_tune.model.adapter_dir import AdapterDir, load_with_adapter
from qwen_tune.runs.directory import write_atomically

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from qwen_tune.chatml.template import ChatTemplate

SAMPLES = 8
TOKENS_A_SAMPLE = 256
PLAIN_PROMPTS = ("Hello!", "Write a function that adds two numbers.", "What is the capital of France?")

# The largest |logit - logit'| over the largest |logit|. In float32 only the order of sums differs; a merge stored in 16
# bits rounds every weight it touches, to 8 (bfloat16) or 11 (float16) significant bits. Measured on a model of 0.5B
# parameters in bfloat16: 7e-3.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names


@dataclass(frozen=True)
class Comparison:
    """Base + adapter against the merged model, both computed in float32.

    `relative_difference` is the largest difference of two logits over the largest logit; `same_choice` the share of
    positions at which both prefer the same next token.
    """

    samples: int
    tokens: int
    stored_dtype: str
    relative_difference: float
    tolerance: float
    same_choice: float

    def facts(self) -> dict[str, Any]:
        """For merge.json."""
        return {**asdict(self), "passed": self.passed}

    @property
    def passed(self) -> bool:
        """Whether rounding explains the difference (never when it is no number)."""
        return self.relative_difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"verified on {self.tokens:,} tokens of {self.samples} samples: the same next token at "
            f"{self.same_choice:.1%} of the positions, logits within {self.relative_difference:.1e} of the largest "
            f"(at most {self.tolerance:.0e} for weights stored in {self.stored_dtype})"
        )


def verify_merged(run_or_adapter: Path, merged: Path, base: str | None = None) -> Comparison:
    """Compares, and adds the result to the model's merge.json; see `compare_merged`.

    Raises:
        MergeError: They differ by more than the rounding of the stored type explains; merge.json says so as well.
    """
    comparison = compare_merged(run_or_adapter, merged, base)
    record = merged / "merge.json"
    facts = json.loads(record.read_text(encoding="utf-8"))
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


def compare_merged(run_or_adapter: Path, merged: Path, base: str | None = None) -> Comparison:
    """Loads both models one after the other and compares their logits.

    Args:
        run_or_adapter: The run, whose held-out rows are used (or training rows, or else a few plain prompts).
        merged: The merged model's directory.
        base: Another base than the one that the adapter names.

    Raises:
        MergeError: Base and adapter cannot be loaded, or the merged model is stored in a type that has no tolerance.
    """
    import torch
    from transformers import AutoModelForCausalLM

    adapter = AdapterDir.open(run_or_adapter, base)
    stored = _stored_dtype(merged)
    batches = _token_ids(adapter, merged)
    expected = list(_logits(load_with_adapter(adapter, torch.float32), batches))
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, trust_remote_code=False)
    largest = difference = 0.0
    same = 0
    for one, other in zip(expected, _logits(model, batches), strict=True):
        largest = max(largest, float(one.abs().max()))
        difference = max(difference, float((one - other).abs().max()))
        same += int((one.argmax(-1) == other.argmax(-1)).sum())
    tokens = sum(ids.shape[1] for ids in batches)
    return Comparison(
        samples=len(batches),
        tokens=tokens,
        stored_dtype=stored,
        relative_difference=difference / largest,
        tolerance=TOLERANCE[stored],
        same_choice=same / tokens,
    )


def _logits(model: PreTrainedModel, batches: list[Tensor]) -> Iterator[Tensor]:
    import torch

    model.eval()
    with torch.inference_mode():
        for ids in batches:
            yield model(input_ids=ids, use_cache=False).logits[0].float()


def _stored_dtype(merged: Path) -> str:
    """The coarsest of the types that the weights are stored in."""
    from qwen_tune.model.base import BaseCheckpoint

    spans = BaseCheckpoint(id=str(merged), revision=None, path=merged, is_local=True).tensors().values()
    stored = {span.dtype for span in spans}
    if unknown := sorted(stored - DTYPE_NAMES.keys()):
        raise MergeError(
            Problem(
                str(merged),
                f"weights are stored as {', '.join(unknown)}; expected {', '.join(DTYPE_NAMES)}",
                "compare the model as it was merged, before other tools change its type",
            )
        )
    return max((DTYPE_NAMES[dtype] for dtype in stored), key=TOLERANCE.__getitem__)


def _token_ids(adapter: AdapterDir, merged: Path) -> list[Tensor]:
    import torch
    from transformers import AutoTokenizer

    from qwen_tune.chatml.template import ChatTemplate

    tokenizer = AutoTokenizer.from_pretrained(merged)
    template = ChatTemplate(tokenizer)
    rows = _rows_of_the_run(adapter.run, template) if adapter.run else []
    if not rows:
        chats = [[{"role": "user", "content": prompt}] for prompt in PLAIN_PROMPTS]
        texts = [template.render(chat, add_generation_prompt=True) for chat in chats]
        rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [torch.tensor([row[:TOKENS_A_SAMPLE]]) for row in rows]


def _rows_of_the_run(run: Path, template: ChatTemplate) -> list[list[int]]:
    """Held-out samples, or training samples; none where the rows are not to be had any more."""
    from qwen_tune.prepared.preparation import prepare_data
    from qwen_tune.recipe.files import load_recipe

    try:
        recipe = load_recipe(run / "recipe.yaml")
        data = prepare_data(recipe.data, template, seed=recipe.train.seed)
    except (DataError, RecipeError):
        return []
    chosen = data.evaluation.examples if len(data.evaluation.examples) else data.train.examples
    return [example.input_ids for example in chosen[:SAMPLES]]
