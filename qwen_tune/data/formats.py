"""The data formats, and how a record of each becomes a conversation, a text, or token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_tune.chatml.conversation import Conversation, Message, PlainTurns
from qwen_tune.data.documents import TrainingExample, to_pretokenized_example, to_text_example
from qwen_tune.data.messages import parse_messages, parse_tools
from qwen_tune.data.turns import TURN_COLUMNS, history_pairs, list_column, spelling, text_column, to_messages
from qwen_tune.data.values import check_json, kind, parse_json_text, shown_record
from qwen_tune.errors import ExampleError

MEDIA_COLUMNS = frozenset({"images", "audios", "videos", "image", "audio", "video"})


@dataclass(frozen=True)
class Recognised:
    """The format of a source's examples, and why it was recognised as that, for the user."""

    name: str
    reason: str


@dataclass(frozen=True)
class Format:
    name: str

    required: tuple[tuple[str, ...], ...]
    """Columns that an example must have; each entry lists alternative names."""

    optional: tuple[str, ...]
    """Columns that are read if present."""

    example: str
    """An example, for messages."""

    def missing(self, record: Mapping[str, Any]) -> list[str]:
        """The required columns that a record lacks."""
        lacking: list[str] = []
        for names in self.required:
            for name in names:
                if name in record:
                    break
            else:
                lacking.append(names[0])
        return lacking


_CHAT_COLUMNS = ("system", "tools", "chat_template_kwargs")
_FORMATS = (
    Format(
        "messages",
        (TURN_COLUMNS,),
        _CHAT_COLUMNS,
        '{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}',
    ),
    Format(
        "sharegpt",
        (("conversations", "conversation", "messages"),),
        _CHAT_COLUMNS,
        '{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}',
    ),
    Format(
        "alpaca",
        (("instruction",), ("output",)),
        ("input", "history", *_CHAT_COLUMNS),
        '{"instruction": …, "output": …}',
    ),
    Format(
        "prompt_completion",
        (("prompt",), ("completion",)),
        _CHAT_COLUMNS,
        '{"prompt": …, "completion": …}',
    ),
    Format(
        "query_response",
        (("query",), ("response",)),
        ("history", *_CHAT_COLUMNS),
        '{"query": …, "response": …}',
    ),
    Format("tokenized", (("input_ids",),), ("labels", "attention_mask"), '{"input_ids": [1, 2, …]}'),
    Format("text", (("text",),), (), '{"text": …}'),
)
FORMATS = {entry.name: entry for entry in _FORMATS}
COLUMNS = tuple(
    dict.fromkeys(
        column
        for entry in _FORMATS
        for column in (*(name for names in entry.required for name in names), *entry.optional)
    )
)
"""The columns of all formats: those that a recipe may rename."""

REQUIRED_COLUMNS = frozenset(name for entry in _FORMATS for names in entry.required for name in names)
ACCEPTED = "; ".join(f"{entry.name} {entry.example}" for entry in _FORMATS)


def recognise(record: Mapping[str, Any]) -> Recognised:
    """Recognises the format by the columns of a record.

    Raises:
        ExampleError: No format has these columns; the message shows the record and the accepted formats.
    """
    # Tables of mixed formats hold every column in each row: ignore those without a value at first.
    filled = {name: value for name, value in record.items() if value is not None}
    for columns in (filled, record):
        for entry in _FORMATS:
            if not entry.missing(columns):
                return _recognised(entry, columns)
    raise ExampleError(
        f"the format is not recognised; the example is {shown_record(record)}; accepted are {ACCEPTED}",
        "name the columns in the recipe, as in data.train[].columns: {messages: your_column}",
    )


def _recognised(entry: Format, columns: Mapping[str, Any]) -> Recognised:
    if entry.name != "messages":
        named = [next(name for name in names if name in columns) for names in entry.required]
        plural = "columns" if len(named) > 1 else "column"
        return Recognised(entry.name, f"{plural} {' and '.join(chr(34) + name + chr(34) for name in named)}")
    column = next(name for name in TURN_COLUMNS if name in columns)
    turns, as_text = columns[column], ""
    if isinstance(turns, str):
        turns, as_text = list_column(columns, column), ", as JSON text"
    spelled = spelling(turns[0]) if isinstance(turns, list) and turns else None
    if spelled is None:
        return Recognised("messages" if column == "messages" else "sharegpt", f'column "{column}"')
    name = "messages" if spelled == "role and content" else "sharegpt"
    return Recognised(name, f'column "{column}" holds a list of turns with {spelled}{as_text}')


def to_training_example(
    record: Mapping[str, Any], format_name: str, *, source: str, source_name: str, system: str | None = None
) -> TrainingExample:
    """Converts one record into what is trained.

    Args:
        record: Column names and values.
        format_name: A key of `FORMATS`.
        source: `file:line` of the record.
        source_name: The recipe's name for the data.
        system: A system text for conversations that have none.

    Raises:
        ExampleError: The example is not of that format, or is not something to train on.
    """
    if format_name in TO_MESSAGES:
        return to_conversation(record, format_name, source=source, source_name=source_name, system=system)
    _refuse_media(record)
    unused = [name for name in _CHAT_COLUMNS if record.get(name)]
    warnings = tuple(f'column "{name}" is not used by format {format_name}' for name in unused)
    convert = to_text_example if format_name == "text" else to_pretokenized_example
    return convert(record, source=source, source_name=source_name, warnings=warnings)


def to_conversation(
    record: Mapping[str, Any], format_name: str, *, source: str, source_name: str, system: str | None = None
) -> Conversation:
    """Converts one record of a conversation format; see `to_training_example`.

    Raises:
        ExampleError: The example is not of that format, or is not something to train on.
    """
    _refuse_media(record)
    column, raw = TO_MESSAGES[format_name](record)
    messages, warnings = parse_messages(raw, column)
    template_kwargs = record.get("chat_template_kwargs")
    return Conversation(
        source,
        source_name,
        _with_system(messages, record.get("system"), system),
        parse_tools(record.get("tools")),
        _parse_template_kwargs(template_kwargs) if template_kwargs else {},
        warnings,
    )


def _refuse_media(record: Mapping[str, Any]) -> None:
    for column in MEDIA_COLUMNS.intersection(record):
        if record[column]:
            what = f'not yet: the example has "{column}"; only text is trained so far'
            raise ExampleError(what, "remove such examples")


def _parse_template_kwargs(given: Any) -> Mapping[str, Any]:
    if isinstance(given, str):
        given = parse_json_text(given, "chat_template_kwargs")
    if not isinstance(given, dict):
        raise ExampleError(
            f"chat_template_kwargs is {kind(given)}; expected an object", 'write {"enable_thinking": false}'
        )
    check_json(given, "chat_template_kwargs")
    # A null means absent, as in tables, which hold one wherever another example has a value. Variables that the
    # template does not read are refused by `chatml.ChatTemplate.refuse_variables`.
    return {name: value for name, value in given.items() if value is not None}


def _with_system(messages: Sequence[Message], own: Any, default: str | None) -> Sequence[Message]:
    """Puts the `system` column, or else the recipe's system text, before turns that begin without one."""
    if own is not None and not isinstance(own, str):
        raise ExampleError(f"system is {kind(own)}; expected text", "write the text or remove it")
    own = own if own and not own.isspace() else None
    if not own and not default:
        return messages
    begins = messages[0].role == "system"
    if own and begins and messages[0].content != own:
        raise ExampleError('the example has a "system" column and another system turn', "keep one of them")
    text = own or default
    if begins or not text:
        return messages
    if isinstance(messages, PlainTurns):
        return PlainTurns(("system", *messages.roles), [text, *messages.texts])
    return (Message("system", text), *messages)


def _from_turns(record: Mapping[str, Any]) -> tuple[str, list[Any]]:
    return _turns_of(record, TURN_COLUMNS)


def _from_sharegpt(record: Mapping[str, Any]) -> tuple[str, list[Any]]:
    return _turns_of(record, ("conversations", "conversation", "messages"))


def _turns_of(record: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, list[Any]]:
    column = columns[0]
    if record.get(column) is None:
        column = next((name for name in columns if record.get(name) is not None), column)
    return column, to_messages(list_column(record, column), column)


def _from_alpaca(record: Mapping[str, Any]) -> tuple[str, list[Any]]:
    question, given = text_column(record, "instruction"), record.get("input")
    if given is not None and not isinstance(given, str):
        raise ExampleError(f"input is {kind(given)}; expected a string", "write the text, or leave it out")
    if given and not given.isspace():
        question = f"{question}\n{given}"
    return _answered(record, question, "output", history_pairs(record))


def _from_query_response(record: Mapping[str, Any]) -> tuple[str, list[Any]]:
    return _answered(record, text_column(record, "query"), "response", history_pairs(record))


def _from_prompt_completion(record: Mapping[str, Any]) -> tuple[str, list[Any]]:
    prompt, completion = _turns_or_text(record["prompt"]), _turns_or_text(record["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        if not completion:
            raise ExampleError(
                "completion is empty; expected the assistant's turns", "add the answer or remove the example"
            )
        # Only the completion is supervised: answers inside the prompt are context.
        context = [
            {**turn, "train": False} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn
            for turn in to_messages(prompt, "prompt")
        ]
        return "messages", [*context, *to_messages(completion, "completion")]
    if isinstance(prompt, list) or isinstance(completion, list):
        what = "prompt and completion are of different kinds; expected two strings or two lists of turns"
        raise ExampleError(what, "write both as lists of turns")
    return _answered(record, text_column(record, "prompt"), "completion", [])


def _answered(record: Mapping[str, Any], question: str, answer: str, before: list[Any]) -> tuple[str, list[Any]]:
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": text_column(record, answer)}]
    return "messages", [*before, *pair]


def _turns_or_text(value: Any) -> Any:
    """A list of turns, parsed if it is JSON text of one; any other value is returned as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            turns = parse_json_text(value, "prompt")
        except ExampleError:
            return value
        if isinstance(turns, list) and all(spelling(turn) in ("role and content", "from and value") for turn in turns):
            return turns
    return value


TO_MESSAGES: dict[str, Callable[[Mapping[str, Any]], tuple[str, list[Any]]]] = {
    "messages": _from_turns,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "query_response": _from_query_response,
}
