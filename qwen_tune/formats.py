"""The shapes in which people keep conversations, and how each becomes messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwen_tune.conversation import (
    Conversation,
    RowError,
    kind,
    parse_json_text,
    parse_messages,
    parse_tools,
)

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}

# What `apply_chat_template`, and all that it hands a row's arguments to, takes for itself.
OWNED_TEMPLATE_KWARGS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "conversations",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "self",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}

ACCEPTED = (
    'messages ({"messages": [{"role": "user", "content": …}, …]}), '
    'sharegpt ({"conversations": [{"from": "human", "value": …}, …]}), '
    'alpaca ({"instruction": …, "output": …}) and prompt_completion ({"prompt": …, "completion": …})'
)


def detect_format(row: Mapping[str, Any]) -> str:
    """The name of the format that a row's columns show.

    Raises:
        RowError: No format has these columns; the message shows the row's columns and the accepted forms.
    """
    for name, columns in (
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
        ("prompt_completion", {"prompt", "completion"}),
    ):
        if columns <= row.keys():
            return name
    shown = ", ".join(map(str, list(row)[:8])) or "none"
    raise RowError(
        f"the format is not recognised from the columns ({shown}); accepted are {ACCEPTED}",
        "name the columns in the recipe: data.train[].columns: {messages: your_column}",
    )


def to_conversation(
    row: Mapping[str, Any], format_name: str, *, source: str, source_name: str, system: str | None = None
) -> Conversation:
    """Turns one row into a conversation.

    Args:
        row: Column names and values.
        format_name: One of messages, sharegpt, alpaca, prompt_completion.
        source: `file:line` of the row.
        source_name: The recipe's name for the data.
        system: A system text for rows that have none.

    Raises:
        RowError: The row is not of that format, or is not something to train on.
    """
    for column in ("images", "audios", "videos", "image", "audio", "video"):
        if row.get(column):
            raise RowError(f'not yet: the row carries "{column}"; only text is trained so far', "remove these rows")
    messages, warnings = parse_messages(_with_system(TO_MESSAGES[format_name](row), row.get("system"), system))
    template_kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(template_kwargs, dict):
        raise RowError(f"chat_template_kwargs is {kind(template_kwargs)}; expected an object")
    if not isinstance(template_kwargs.get("enable_thinking", False), bool):
        raise RowError("chat_template_kwargs.enable_thinking must be true or false")
    if reserved := template_kwargs.keys() & OWNED_TEMPLATE_KWARGS:
        raise RowError(f"chat_template_kwargs sets {', '.join(sorted(reserved))}, which no row can set", "remove it")
    return Conversation(
        source=source,
        source_name=source_name,
        messages=messages,
        tools=parse_tools(row.get("tools")),
        chat_template_kwargs=template_kwargs,
        warnings=warnings,
    )


def _with_system(raw: list[Any], own: Any, default: str | None) -> list[Any]:
    """Puts the row's `system` column, or else the recipe's system text, before turns that begin without one."""
    begins = bool(raw) and isinstance(raw[0], dict) and raw[0].get("role") == "system"
    if own and begins and raw[0].get("content") != own:
        raise RowError('the row has a "system" column and another system turn', "keep one of them")
    text = own or default
    return raw if begins or not text else [{"role": "system", "content": text}, *raw]


def _from_messages(row: Mapping[str, Any]) -> list[Any]:
    return _list_column(row, "messages")


def _from_sharegpt(row: Mapping[str, Any]) -> list[Any]:
    turns = _list_column(row, "conversations")
    messages: list[dict[str, Any]] = []
    for index, turn in enumerate(turns):
        at = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise RowError(f'{at} is {kind(turn)}; expected an object with "from" and "value"')
        if "role" in turn and "from" not in turn:
            messages.append(turn)
            continue
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise RowError(
                f"{at}.from is {speaker!r}; expected one of {', '.join(SHAREGPT_ROLES)}", "rename the speaker"
            )
        value = turn.get("value")
        # Whatever else the turn says (train, reasoning_content, weight …) is read, or refused, like a message's.
        others = {key: item for key, item in turn.items() if key not in ("from", "value")}
        if speaker == "function_call":
            call = parse_json_text(value, f"{at}.value") if isinstance(value, str) else value
            calls = call if isinstance(call, list) else [call]
            messages.append({**others, "role": "assistant", "content": None, "tool_calls": calls})
        else:
            messages.append({**others, "role": SHAREGPT_ROLES[speaker], "content": value})
    return messages


def _from_alpaca(row: Mapping[str, Any]) -> list[Any]:
    messages: list[dict[str, Any]] = []
    history = row.get("history") or []
    if isinstance(history, str):
        history = parse_json_text(history, "history")
    if not isinstance(history, list):
        raise RowError(f"history is {kind(history)}; expected a list of [question, answer] pairs")
    for index, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(f"history[{index}] is {kind(pair)}; expected a [question, answer] pair")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    instruction, given = row["instruction"], row.get("input")
    for name, value in (("instruction", instruction), ("input", given)):
        if value is not None and not isinstance(value, str):
            raise RowError(f"{name} is {kind(value)}; expected a string")
    question = f"{instruction}\n{given}" if given and given.strip() else instruction
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _from_prompt_completion(row: Mapping[str, Any]) -> list[Any]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        # Only the completion is learned: answers inside the prompt are context.
        context = [
            {**turn, "train": False} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn
            for turn in prompt
        ]
        return [*context, *completion]
    if isinstance(prompt, list) or isinstance(completion, list):
        raise RowError("prompt and completion are of different kinds; expected two strings or two lists of turns")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _list_column(row: Mapping[str, Any], column: str) -> list[Any]:
    value = row.get(column)
    if isinstance(value, str):
        value = parse_json_text(value, column)
    if not isinstance(value, list):
        raise RowError(f"{column} is {kind(value)}; expected a list of turns")
    return value


TO_MESSAGES: dict[str, Callable[[Mapping[str, Any]], list[Any]]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}
