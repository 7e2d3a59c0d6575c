"""The recipe's data sources, read into conversations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_tune.conversation import Conversation, RowError
from qwen_tune.errors import DataError, Problem, first_line
from qwen_tune.formats import detect_format, to_conversation
from qwen_tune.recipe import DataSpec, SourceSpec
from qwen_tune.remote import fetch, is_url
from qwen_tune.rows import READERS, Row, find_files, read_rows, without_nulls

COLUMNS = (
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "prompt",
    "completion",
    "system",
    "tools",
    "chat_template_kwargs",
)
PROBLEMS_KEPT = 1000  # enough to say how bad it is, few enough to say it soon


def load_conversations(data: DataSpec, *, rows_per_source: int | None = None) -> list[Conversation]:
    """Every conversation of `data.train`, in the recipe's order.

    Args:
        data: The recipe's data section.
        rows_per_source: Read no more rows of a source than this (a sample for `validate`).

    Raises:
        DataError: All problems of all sources, in order of file and line.
    """
    return load_sources(data.train, system=data.system, rows_per_source=rows_per_source)


def load_sources(
    sources: Sequence[SourceSpec],
    *,
    system: str | None,
    rows_per_source: int | None = None,
) -> list[Conversation]:
    """Every conversation of some sources; see `load_conversations`."""
    conversations: list[Conversation] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            for item in itertools.islice(_read_source(source, system), rows_per_source):
                if isinstance(item, Problem):
                    problems.append(item)
                    if len(problems) >= PROBLEMS_KEPT:
                        raise DataError(problems)
                else:
                    conversations.append(item)
        except DataError as error:
            if len(problems) >= PROBLEMS_KEPT:
                raise
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return conversations


def _read_source(source: SourceSpec, system: str | None) -> Iterator[Conversation | Problem]:
    tools = _read_tools(source.tools)
    renamed = list(source.columns.items())
    if unknown := [ours for ours in source.columns if ours not in COLUMNS]:
        raise DataError(
            Problem(
                f"data.train[].columns ({source.name})",
                f"{', '.join(unknown)} is no column that a format has; they have {', '.join(COLUMNS)}",
                "write our name first, then the name in the data: messages: chat",
            )
        )
    format_name: str = source.format
    for item in _rows(source):
        if isinstance(item, Problem):
            yield item
            continue
        columns = {**item.columns, **{ours: item.columns[theirs] for ours, theirs in renamed if theirs in item.columns}}
        if tools and not columns.get("tools"):
            columns["tools"] = tools
        try:
            for ours, theirs in renamed:
                if theirs not in item.columns:
                    raise RowError(f'there is no column "{theirs}", which the recipe maps to {ours}', "see columns")
            if format_name == "auto":
                format_name = detect_format(columns)
            _require_format(columns, format_name, source)
            yield to_conversation(columns, format_name, source=item.source, source_name=source.name, system=system)
        except RowError as problem:
            yield problem.at(item.source)
            if format_name == "auto":
                return  # without a format every further row would say the same


def _require_format(columns: dict[str, Any], format_name: str, source: SourceSpec) -> None:
    required = {
        "messages": ("messages",),
        "sharegpt": ("conversations",),
        "alpaca": ("instruction", "output"),
        "prompt_completion": ("prompt", "completion"),
    }[format_name]
    missing = [name for name in required if name not in columns]
    if missing:
        how = "this source is read as" if source.format == "auto" else "the recipe says format:"
        raise RowError(
            f"the row lacks {' and '.join(missing)} ({how} {format_name}); "
            f"it has {', '.join(list(columns)[:8]) or 'no columns'}",
            "keep rows of one form in a file",
        )


def _rows(source: SourceSpec) -> Iterator[Row | Problem]:
    files = None if is_url(source.path) else find_files(source.path)
    if files is None and not is_url(source.path):
        yield from _hub_rows(source)
        return
    for name, value in (("subset", source.subset), ("split", source.split), ("revision", source.revision)):
        if value is not None:
            what = f"{name} is for Hub data sets; this is a {'URL' if files is None else 'local path'}"
            raise DataError(Problem(source.path, what, f"remove {name}"))
    if files is None:
        for remote in fetch(source.path, tuple(READERS)):
            yield from read_rows(remote.path, remote.address)
    else:
        for file in files:
            yield from read_rows(file)


def _hub_rows(source: SourceSpec) -> Iterator[Row | Problem]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    datasets.disable_progress_bars()
    split = source.split or "train"
    try:
        table = datasets.load_dataset(source.path, name=source.subset, split=split, revision=source.revision)
    except ValueError as error:  # an unknown split or subset: the message names the ones there are
        raise DataError(Problem(source.path, first_line(error), "set data.train[].split and .subset")) from error
    except (DatasetsError, HfHubHTTPError, OfflineModeIsEnabled, OSError, RuntimeError) as error:
        raise DataError(
            Problem(
                source.path,
                f"neither a local file or folder nor a data set that the Hub gives us ({first_line(error)})",
                "check the name; for a private data set run `hf auth login`",
            )
        ) from error
    for number, columns in enumerate(table, start=1):
        yield Row(f"{source.path}[{split}]:{number}", without_nulls(columns))


def _read_tools(path: str | None) -> list[Any] | None:
    if path is None:
        return None
    from qwen_tune.conversation import parse_tools

    try:
        return list(parse_tools(Path(path).expanduser().read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem(path, f"the tools file cannot be read: {first_line(error)}")) from None
    except RowError as problem:
        raise DataError(problem.at(path)) from None
