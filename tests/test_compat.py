"""Private names of the libraries: there in the installed ones, and named where a release has taken one away."""

from __future__ import annotations

import pytest
from transformers import Trainer

from qwen_tune.compat import TRAINER_METHODS, attention_of, check_trainer, set_last_rates
from qwen_tune.errors import LibraryError


def test_the_installed_trainer_has_what_is_overridden():
    from trl import SFTTrainer

    check_trainer(SFTTrainer)


def test_a_trainer_without_a_method_is_named_with_what_depends_on_it():
    without = type("Other", (), {name: getattr(Trainer, name) for name in TRAINER_METHODS if name != "_load_scaler"})
    with pytest.raises(LibraryError, match=r"Trainer has no _load_scaler \(pickles are never loaded\)\. Fix: install"):
        check_trainer(without)


def test_a_name_that_is_gone_is_reported_with_the_library_and_its_version():
    with pytest.raises(LibraryError, match=r"transformers \d+\.\d+\S*: object has no _attn_implementation"):
        attention_of(object())
    with pytest.raises(LibraryError, match=r"torch \d+\.\d+\S*: object has no _last_lr"):
        set_last_rates(object(), [0.1])
