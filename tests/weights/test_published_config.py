"""Published configs: what is known, what is passed over, which values are refused, and which file is named."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from marble_jax.errors import InputError
from marble_jax.storage.files import read_json
from marble_jax.validation import Layers, Positive, Width
from marble_jax.weights.published_config import check_heads, config_from


@dataclasses.dataclass(frozen=True)
class Config:
    width: Width = 8
    widths: tuple[Width, ...] = (1,)
    layers: Layers = 1
    scale: Positive = 1.0
    gated: bool = False
    norm: str | None = "rms"

    def __post_init__(self) -> None:
        if self.width % 2:
            raise InputError(f"X config width: expected an even one; received {self.width}")


def read(values, expected=None):
    return config_from(Config, values, "X config", expected)


def test_known_keys_are_taken_and_others_passed_over():
    assert read({"width": 4, "dropout": 0.1, "_class_name": "X"}) == Config(width=4)


def test_lists_become_tuples_so_that_the_config_can_be_hashed():
    config = read({"widths": [2, 3]})
    assert config.widths == (2, 3) and hash(config) == hash(Config(widths=(2, 3)))


def test_null_is_taken_where_a_field_takes_none():
    assert read({"norm": None}) == Config(norm=None)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"width": None}, "width: expected an integer; received None"),
        ({"width": "8"}, "width: expected an integer; received '8'"),
        ({"width": 8.0}, "width: expected an integer; received 8.0"),
        ({"width": True}, "width: expected an integer; received True"),
        ({"width": 0}, "width: expected a number >= 1; received 0"),
        ({"width": 10**30}, "width: expected"),
        ({"layers": 1_000_000}, "layers: expected a number <= 512; received 1000000"),
        ({"widths": 3}, "widths: expected"),
        ({"widths": [2, -1]}, r"widths\[1\]: expected a number >= 1; received -1"),
        ({"widths": None}, "widths: expected"),
        ({"scale": 0}, "scale: expected a number > 0; received 0"),
        ({"scale": "inf"}, "scale: expected a number; received 'inf'"),
        ({"gated": 1}, "gated: expected a boolean; received 1"),
        ({"norm": 5}, "norm: expected a string; received 5"),
    ],
)
def test_values_of_another_type_or_outside_their_range(values, message):
    with pytest.raises(InputError, match=f"^X config: {message}") as caught:
        read(values)
    assert "\n" not in str(caught.value)


def test_unknown_keys_are_refused_on_request():
    with pytest.raises(
        InputError, match="X config: expected X fields; received 'widht'; did you mean 'width'"
    ):
        read({"widht": 4}, "X fields")
    assert read({"_version": 1}, "X fields") == Config()


@pytest.mark.parametrize("values", [{"width": "8"}, {"width": 3}, {"widht": 4}])
def test_the_file_is_named(tmp_path, values):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: X config"):
        read(read_json(file), "X fields")


def test_heads():
    check_heads("X config", 8, 4)
    with pytest.raises(
        InputError,
        match="X config num_attention_heads: expected a divisor of hidden_size 8; received 3",
    ):
        check_heads("X config", 8, 3)
