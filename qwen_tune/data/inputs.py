"""The way from a recipe to its examples, which `preview`, `prepare` and `train` share: base, tokenizer, data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_tune.chatml.template import ChatTemplate
from qwen_tune.data.preparation import PreparedData, prepare_data
from qwen_tune.model.base import BaseCheckpoint, resolve_base
from qwen_tune.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen_tune.recipe.schema import Recipe


@dataclass(frozen=True)
class Inputs:
    """What a recipe's base and data sections come to."""

    base: BaseCheckpoint
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData


def load_inputs(recipe: Recipe, base: BaseCheckpoint | None = None) -> Inputs:
    """Finds the base, loads its tokenizer, and prepares the data or finds them in the cache.

    Args:
        recipe: The recipe.
        base: Its base, from a caller that needs the weights as well; without it they stay on the Hub.

    Raises:
        ModelError: The base, its tokenizer or its template cannot be used.
        DataError: Every example that cannot be trained on.
    """
    base = base or resolve_base(recipe.model, weights=False, max_length_tokens=recipe.data.max_length_tokens)
    tokenizer = load_tokenizer(recipe.model, base)
    return Inputs(base, tokenizer, prepare_data(recipe.data, ChatTemplate(tokenizer), seed=recipe.train.seed))
