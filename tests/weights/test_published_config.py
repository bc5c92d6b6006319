"""Published configs: what is known, what is passed over, what null means, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from marble_jax.errors import InputError
from marble_jax.weights.published_config import check_heads, config_from


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 8
    widths: tuple[int, ...] = (1,)
    norm: str | None = "rms"


def test_known_keys_are_taken_and_others_passed_over():
    config = config_from(Config, {"width": 4, "dropout": 0.1, "_class_name": "X"})
    assert config == Config(width=4)


def test_lists_become_tuples_so_that_the_config_can_be_hashed():
    config = config_from(Config, {"widths": [2, 3]})
    assert config.widths == (2, 3) and hash(config) == hash(Config(widths=(2, 3)))


def test_null_is_the_default_except_where_the_field_takes_none():
    config = config_from(Config, {"width": None, "widths": None, "norm": None})
    assert config == Config(norm=None)


def test_unknown_keys_are_refused_on_request():
    with pytest.raises(
        InputError, match="X config: expected X fields; received 'widht'; did you mean 'width'"
    ):
        config_from(Config, {"widht": 4}, "X config: expected X fields")
    assert config_from(Config, {"_version": 1}, "X config: expected X fields") == Config()


def test_heads():
    check_heads("X config", 8, 4)
    with pytest.raises(
        InputError,
        match="X config num_attention_heads: expected a divisor of hidden_size 8; received 3",
    ):
        check_heads("X config", 8, 3)
