"""What a model answers, with the same prompt that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def greedy_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    *,
    max_new_tokens: int,
    stream: bool = False,
) -> str:
    """The greedy answer, without the tokens that end it.

    Args:
        model: The model; it must be in evaluation mode.
        tokenizer: Its tokenizer, whose template writes the prompt.
        messages: The conversation so far, ending with the user.
        max_new_tokens: Where to stop an answer that does not end.
        stream: Whether to print the answer as it comes.
    """
    from transformers import TextStreamer

    inputs = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    # A base checkpoint's own configuration does not know the end of a turn; the tokenizer does.
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(answer, str)
    return answer.strip()
