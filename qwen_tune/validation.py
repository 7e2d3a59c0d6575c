"""What can be said of a recipe's files without a tokenizer."""

from __future__ import annotations

from qwen_tune.recipe.schema import DataSpec
from qwen_tune.rows.files import names_hub_data_set
from qwen_tune.rows.remote import is_url
from qwen_tune.rows.sources import load_sources

SAMPLE_ROWS = 1000  # a source; reading more would make a check that is meant to be instant wait for the disk


def check_data(data: DataSpec) -> str:
    """Reads the first rows of every local source.

    Returns:
        What was read, in words.

    Raises:
        DataError: Every file that is missing and every row that is wrong.
    """
    sources = [*data.train, *(data.eval if isinstance(data.eval, list) else ())]
    local = [source for source in sources if not is_url(source.path) and not names_hub_data_set(source.path)]
    count = len(load_sources(local, system=data.system, rows_per_source=SAMPLE_ROWS))
    read = f"{count:,} rows read (at most {SAMPLE_ROWS:,} of a source)"
    remote = len(sources) - len(local)
    return f"{read}, {remote} sources elsewhere not looked at" if remote else read
