"""What a model answers, with the same prompt that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwen_tune.console import show
from qwen_tune.errors import Problem, RunError

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


@dataclass
class ChatModel:
    """A loaded model and the tokenizer whose template it is asked with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    has_adapter: bool

    @classmethod
    def load(cls, path: Path) -> ChatModel:
        """Loads a run's adapter on its base, an adapter directory, or a model directory.

        Raises:
            RunError: The directory is none of these.
            MergeError: The adapter does not fit its base.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        from qwen_tune.artifacts.adapter_dir import AdapterDir, load_with_adapters, suggest_adapter
        from qwen_tune.chatml.sandbox import render_with_limits
        from qwen_tune.disk import read_json
        from qwen_tune.model.loading import automatic_dtype, own_device

        is_adapter = (path / "adapter").is_dir() or (path / "adapter_config.json").exists()
        if is_adapter:
            adapter = AdapterDir.open(path)
            dtype = automatic_dtype(adapter.base.config)
            folder, model = adapter.path, load_with_adapters([adapter], dtype, quantized=True)
            if not (folder / "tokenizer_config.json").exists():
                folder = adapter.base.path
        elif (path / "config.json").exists():
            folder, dtype = path, automatic_dtype(read_json(path / "config.json"))
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
        else:
            what = "the run has no adapter yet" if (path / "run.json").exists() else "there is no model here"
            expected = "expected a finished run, a checkpoint, an adapter or a model directory"
            raise RunError(Problem(str(path), f"{what}; {expected}", suggest_adapter(path)))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # The template may be a stranger's.
        render_with_limits(lambda: tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False))
        if (folder / "generation_config.json").exists():
            # The base's own file may not know the end of a turn; the one beside the adapter does.
            model.generation_config = GenerationConfig.from_pretrained(folder)
        if model.device.type == "cpu":
            model = model.to(own_device())
        return cls(model.eval(), tokenizer, has_adapter=is_adapter)

    def answer(self, messages: Sequence[dict[str, str]], *, max_new_tokens: int, stream: bool = False) -> str:
        """The model's greedy answer; see `greedy_answer`."""
        return greedy_answer(self.model, self.tokenizer, messages, max_new_tokens=max_new_tokens, stream=stream)

    def base_answer(self, messages: Sequence[dict[str, str]], *, max_new_tokens: int) -> str:
        with self.model.disable_adapter():
            return self.answer(messages, max_new_tokens=max_new_tokens)


def chat(path: Path, prompt: str | None, *, system: str | None, compare: bool, max_new_tokens: int) -> None:
    """Answers one prompt, or holds a conversation until an empty line or the end of input.

    Raises:
        RunError: `compare` without an adapter, or no model.
    """
    model = ChatModel.load(path)
    if compare and not model.has_adapter:
        raise RunError(Problem(str(path), "--compare needs a run or an adapter; this is a full model"))
    start = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        _say(model, [*start, {"role": "user", "content": prompt}], compare, max_new_tokens)
        return
    messages = list(start)
    show("An empty line ends the conversation.")
    while question := _ask():
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": _say(model, messages, compare, max_new_tokens)})


def _say(model: ChatModel, messages: Sequence[dict[str, str]], compare: bool, max_new_tokens: int) -> str:
    if not compare:
        return model.answer(messages, max_new_tokens=max_new_tokens, stream=True)
    show(f"base:  {model.base_answer(messages, max_new_tokens=max_new_tokens)}")
    answer = model.answer(messages, max_new_tokens=max_new_tokens)
    show(f"tuned: {answer}")
    return answer


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
