"""Rows of a run on which models are compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen_tune.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qwen_tune.chatml.template import ChatTemplate, TokenizedExample

PLAIN_PROMPTS = ("Hello!", "Write a function that adds two numbers.", "What is the capital of France?")


def rows_of_the_run(run: Path, template: ChatTemplate, count: int) -> list[TokenizedExample]:
    """The first held-out samples, or training samples; none where the rows are not to be had any more."""
    from qwen_tune.prepared.preparation import prepare_data
    from qwen_tune.recipe.files import load_recipe

    try:
        recipe = load_recipe(run / "recipe.yaml")
        data = prepare_data(recipe.data, template, seed=recipe.train.seed)
    except (DataError, RecipeError):
        return []
    return list((data.evaluation.examples if len(data.evaluation.examples) else data.train.examples)[:count])


def plain_prompts(template: ChatTemplate) -> list[list[int]]:
    """A few questions as tokens, where there are no rows."""
    chats = [[{"role": "user", "content": prompt}] for prompt in PLAIN_PROMPTS]
    texts = [template.render(chat, add_generation_prompt=True) for chat in chats]
    return [template.tokenizer.encode(text, add_special_tokens=False) for text in texts]


def mean_loss(model: PreTrainedModel, rows: list[TokenizedExample], longest: int) -> float:
    """Nats a supervised token, over the first `longest` tokens of each row; computed a row at a time."""
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
