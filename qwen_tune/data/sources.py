"""Reads the recipe's data sources in one pass, an example at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_tune.data.documents import TrainingExample
from qwen_tune.data.files import fetch, find_files, is_url, names_hub_data_set, read_records
from qwen_tune.data.formats import COLUMNS, FORMATS, REQUIRED_COLUMNS, Recognised, recognise, to_training_example
from qwen_tune.data.messages import parse_tools
from qwen_tune.data.source_file import Record, SourceFile
from qwen_tune.data.tables import without_nulls
from qwen_tune.disk import UnreadableError, read_text_file
from qwen_tune.errors import DataError, ExampleError, Problem, first_line
from qwen_tune.recipe.schema import DataSpec, SourceSpec

PROBLEMS_KEPT = 1000  # reading stops after so many


class SourceReader:
    """The examples of one source; each iteration reads them again, and none are kept.

    `recognised` is the format of the examples, None until the first is read. `columns_missed` are columns that the
    recipe renames and no example has had so far, None until the first is read.
    """

    def __init__(
        self,
        source: SourceSpec,
        *,
        system: str | None,
        files: list[SourceFile] | None = None,
        recognised: Recognised | None = None,
    ) -> None:
        """Reads nothing yet.

        Args:
            source: The recipe's source.
            system: A system text for conversations that have none.
            files: The result of `source_files`; None to call it at each iteration.
            recognised: The format of the examples, if these files are only a part of the source. Then columns that no
                example has are not reported.
        """
        self.recognised = recognised
        self.columns_missed: set[str] | None = None
        self._source = source
        self._files = files
        self._system = system
        self._given = recognised

    def __iter__(self) -> Iterator[TrainingExample | Problem]:
        """Yields each example, or the problem with it.

        Raises:
            DataError: The source does not exist, or its settings in the recipe do not apply to it.
        """
        source = self._source
        tools = read_tools(source.tools)
        renamed = _renamed_columns(source)
        self.columns_missed = None
        self.recognised = self._given
        if source.format != "auto":
            self.recognised = Recognised(source.format, f"the recipe says format: {source.format}")
        for item in _records(source, self._files):
            if isinstance(item, Problem):
                yield item
                continue
            columns = item.columns
            if self.columns_missed is None:
                self.columns_missed = set(renamed) - REQUIRED_COLUMNS
            try:
                if renamed:
                    self.columns_missed = {ours for ours in self.columns_missed if renamed[ours] not in columns}
                    columns = _rename(columns, renamed)
                if tools and not columns.get("tools"):
                    columns = {**columns, "tools": tools}
                if self.recognised is None:
                    self.recognised = recognise(columns)
                name = self.recognised.name
                if missing := FORMATS[name].missing(columns):
                    raise _lacking(missing, columns, self.recognised)
                yield to_training_example(
                    columns, name, source=item.source, source_name=source.name, system=self._system
                )
            except ExampleError as problem:
                yield problem.at(item.source)
                if self.recognised is None:
                    return  # every further example would have the same problem
        if self._given is None:
            yield from missed_columns(source, self.columns_missed)


def missed_columns(source: SourceSpec, names: set[str] | None) -> list[Problem]:
    """A problem for each column that the recipe renames and no example of the source has."""
    return [
        Problem(
            source.path,
            f'no example has a column "{source.columns[ours]}", which the recipe maps to {ours}',
            "see data.train[].columns",
        )
        for ours in sorted(names or ())
    ]


def source_files(source: SourceSpec) -> list[SourceFile] | None:
    """The local files of a source, fetched if it is a URL; None for a Hub data set.

    Raises:
        DataError: There are none, or they cannot be fetched.
    """
    is_remote = is_url(source.path)
    files = None if is_remote else find_files(source.path)
    if files is None and not is_remote:
        return None
    for name, value in (("subset", source.subset), ("split", source.split), ("revision", source.revision)):
        if value is not None:
            what = f"{name} is for Hub data sets; this is a {'URL' if is_remote else 'local path'}"
            raise DataError(Problem(source.path, what, f"remove {name}"))
    if files is None:
        return fetch(source.path)
    return [SourceFile(file, str(file)) for file in files]


def load_sources(
    sources: Sequence[SourceSpec], *, system: str | None, limit: int | None = None
) -> list[TrainingExample]:
    """The examples of some sources, in order; at most `limit` of each.

    Raises:
        DataError: With all problems of all sources, in the order of file and line.
    """
    examples: list[TrainingExample] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            for item in itertools.islice(SourceReader(source, system=system), limit):
                if isinstance(item, Problem):
                    problems.append(item)
                    if len(problems) >= PROBLEMS_KEPT:
                        raise DataError(problems)
                else:
                    examples.append(item)
        except DataError as error:
            if len(problems) >= PROBLEMS_KEPT:
                raise
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return examples


def _renamed_columns(source: SourceSpec) -> dict[str, str]:
    if unknown := [ours for ours in source.columns if ours not in COLUMNS]:
        raise DataError(
            Problem(
                f"data.train[].columns ({source.name})",
                f"{', '.join(unknown)} is not a column of any format; expected one of {', '.join(COLUMNS)}",
                "write the format's column first, then the one in the data: {messages: chat}",
            )
        )
    return dict(source.columns)


def _rename(columns: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    theirs = set(renamed.values())
    result = {name: value for name, value in columns.items() if name not in theirs}
    for ours, name in renamed.items():
        if name in columns:
            result[ours] = columns[name]
        elif ours in REQUIRED_COLUMNS:
            what = f'the example has no column "{name}", which the recipe maps to {ours}'
            raise ExampleError(
                what, f"map one of its columns: {', '.join(map(str, list(columns)[:8])) or 'it has none'}"
            )
    return result


def _lacking(missing: list[str], columns: Mapping[str, Any], recognised: Recognised) -> ExampleError:
    what = (
        f"the example lacks {' and '.join(missing)}; this source is read as {recognised.name} ({recognised.reason}); "
        f"the example has {', '.join(name[:40] for name in list(columns)[:8]) or 'no columns'}"
    )
    return ExampleError(what, "use one format per source")


def _records(source: SourceSpec, files: list[SourceFile] | None) -> Iterator[Record | Problem]:
    files = source_files(source) if files is None else files
    if files is None:
        yield from _hub_records(source)
        return
    for file in files:
        yield from read_records(file)


def _hub_records(source: SourceSpec) -> Iterator[Record | Problem]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    datasets.disable_progress_bars()
    split = source.split or "train"
    try:
        table = datasets.load_dataset(
            source.path,
            name=source.subset,
            split=split,
            revision=source.revision,
            streaming=not constants.HF_HUB_OFFLINE,  # offline, only the local cache is available
        )
    except ValueError as error:  # an unknown split or subset: the message lists the known ones
        raise DataError(Problem(source.path, first_line(error), "set data.train[].split and .subset")) from error
    except (DatasetsError, HfHubHTTPError, OfflineModeIsEnabled, OSError, RuntimeError) as error:
        raise DataError(
            Problem(
                source.path,
                f"not a local file or folder, nor a data set that the Hub lets us read ({first_line(error)})",
                "check the name; for a private data set run `hf auth login`",
            )
        ) from error
    number = 0
    try:
        for number, columns in enumerate(table, start=1):
            yield Record(f"{source.path}[{split}]:{number}", without_nulls(columns))
    except Exception as error:  # each file format of a data set has its own exceptions
        what = f"the data set cannot be read beyond this example: {first_line(error)}"
        fix = "try again; if it stops at the same example, download the file and write its path"
        raise DataError(Problem(f"{source.path}[{split}]:{number + 1}", what, fix)) from error


def read_tools(path: str | None) -> list[Any] | None:
    """The tools of the JSON file that a recipe names; None without one.

    Raises:
        DataError: The file cannot be read, or is not a list of tools.
    """
    if path is None:
        return None
    try:
        return list(parse_tools(read_text_file(path)))
    except UnreadableError as error:
        raise DataError(Problem(path, f"the tools file cannot be read: {error}", "check data.train[].tools")) from None
    except ExampleError as problem:
        raise DataError(problem.at(path)) from None


CHECKED_EXAMPLES = 1000  # of each source, so that the check is instant


def check_data(data: DataSpec) -> str:
    """Reads the first examples of every local source.

    Returns:
        What was read, for the user.

    Raises:
        DataError: With a problem for every file that is missing and every example that is wrong.
    """
    sources = [*data.train, *(data.eval if isinstance(data.eval, list) else ())]
    local = [source for source in sources if not is_url(source.path) and not names_hub_data_set(source.path)]
    count = len(load_sources(local, system=data.system, limit=CHECKED_EXAMPLES))
    read = f"{count:,} examples read (at most {CHECKED_EXAMPLES:,} of each source)"
    remote = len(sources) - len(local)
    return f"{read}, {remote} remote sources not checked" if remote else read
