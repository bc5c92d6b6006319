"""Tokenizers of text encoders, as transformers reads them from a component directory, checked against their encoder.

A directory whose files did not all come down opens all the same in transformers: with a vocabulary of two words, in
which every prompt is alike. So the files have to be there, and what they make has to fit the encoder behind it.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from marble_jax.errors import InputError
from marble_jax.networks.json_tokenizer import open_json_tokenizer
from marble_jax.storage.file_kinds import kind_of_file
from marble_jax.storage.files import read_json
from marble_jax.validation import Positive, parse_json, short, validated

COMPLETE = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("vocab.txt",),
)
"""Files that make a tokenizer, each set by itself."""
_SMALL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES = {*_SMALL_FILES, *(name for group in COMPLETE for name in group)}
GOLDEN_TEXT = "a red circle"
"""A text that every tokenizer of English gives back."""
_FEWER_WORDS = 50
"""Encoders pad their tables, to 128 words say: up to a 50th of a table may be without a word."""
_LETTERS = 256
"""Words from which on a vocabulary spells English: with a word for every byte, say."""
_BYTE_WORD = re.compile("<0x[0-9A-F]{2}>")
"""A word that stands for a byte, which is made of no others."""
_LEGACY_END = 2
"""`eos_token_id` of CLIP configs from before the field was right: the largest id ends a text."""


def load_tokenizer(directory: pathlib.Path, kind: str | None) -> Any:
    """The tokenizer of a component directory as transformers has it; code in the directory is never run.

    Args:
      directory: holds the tokenizer's files.
      kind: its class in transformers, as model_index.json names it; unknown names are resolved from the files.

    Raises:
      InputError: missing or unreadable directory, files that are missing, or a tokenizer with code of its own.
    """
    _check_files(directory)
    plain = open_json_tokenizer(directory, kind)
    if plain is not None:
        return plain
    import transformers  # slow to import

    kind = _known_class(directory, kind, transformers)
    try:
        # Asked whether to run code that a model brings along, transformers would put the question to the terminal.
        return getattr(transformers, kind).from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    # Whatever a damaged file makes the library raise; the cause stays attached. A panic of its Rust part is no
    # Exception.
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise InputError(
            f"{directory}: expected the files of a {kind}; received {type(error).__name__}"
        ) from error


def check_tokenizer(
    tokenizer: Any, directory: pathlib.Path, vocab_size: int, end_id: int | None = None
) -> None:
    """Checks a tokenizer against the text encoder that reads its ids.

    Args:
      tokenizer: of transformers.
      directory: its own, for messages.
      vocab_size: words of the encoder's table.
      end_id: id that ends a text for the encoder (2: the largest one does); None where it does not ask.

    Raises:
      InputError: another vocabulary, special ids that the encoder does not have, merges that are missing, or a text
        that does not come back.
    """
    words = len(tokenizer)
    fewest = vocab_size - max(vocab_size // _FEWER_WORDS, 32)
    if not fewest <= words <= vocab_size:
        raise InputError(
            f"{directory}: expected a tokenizer of about the text encoder's {vocab_size} words; received "
            f"{words} (are all of its files there?)"
        )
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id"):
        number = _special_id(tokenizer, name, directory)
        if number is not None and not 0 <= number < vocab_size:
            raise InputError(
                f"{directory}: {name}: expected 0 to {vocab_size - 1}; received {number}"
            )
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"{directory}: pad_token: expected one, as prompts are filled up; received none"
        )
    _check_end(tokenizer, directory, words, end_id)
    _check_merges(tokenizer, directory)
    # A toy's alphabet need not have these letters.
    if words >= _LETTERS:
        _check_round_trip(tokenizer, directory)


def _special_id(tokenizer: Any, name: str, directory: pathlib.Path) -> int | None:
    """The id of a special word; None without one. Raises InputError for a word that the library falls over."""
    try:
        return getattr(tokenizer, name, None)
    except (RecursionError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{directory}: {name}: expected that of a word of the vocabulary; received {type(error).__name__}"
        ) from None


def _check_end(tokenizer: Any, directory: pathlib.Path, words: int, end_id: int | None) -> None:
    """Raises InputError unless texts end with the id that the encoder looks for."""
    if end_id is None:
        return
    expected = words - 1 if end_id == _LEGACY_END else end_id
    if tokenizer.eos_token_id != expected:
        raise InputError(
            f"{directory}: eos_token_id: expected the text encoder's {expected}; received "
            f"{tokenizer.eos_token_id}"
        )


def _check_merges(tokenizer: Any, directory: pathlib.Path) -> None:
    """Raises InputError where words of a byte-pair vocabulary are never made: every text would be spelt out instead.

    A download that was cut off leaves the vocabulary whole and the merges not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    content = parse_json(backend.to_str(), f"{directory}: the tokenizer read from it", lenient=True)
    model = content["model"]
    # With ignored merges, or pieces that are written differently inside of a word, they do not say what is made.
    if (
        model["type"] != "BPE"
        or model.get("ignore_merges")
        or model.get("continuing_subword_prefix")
    ):
        return
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    made = {"".join(pair) for pair in merges}
    made |= {word["content"] for word in content.get("added_tokens") or []}
    ending = model.get("end_of_word_suffix") or ""
    lost = []
    for word in model["vocab"]:
        is_letter = len(word.removesuffix(ending)) <= 1 or _BYTE_WORD.fullmatch(word)
        if not is_letter and word not in made and word != model.get("unk_token"):
            lost.append(word)
    count = len(model["vocab"])
    if len(lost) > count // _FEWER_WORDS:
        raise InputError(
            f"{directory}: expected merges that make the words of the vocabulary; received {len(merges)}, without "
            f"which {len(lost)} of {count} words are never used, such as {short(lost[0])} (are all of its files "
            "there?)"
        )


def _check_round_trip(tokenizer: Any, directory: pathlib.Path) -> None:
    ids = tokenizer(GOLDEN_TEXT).input_ids
    unknown = getattr(tokenizer, "unk_token_id", None)
    ends = [getattr(tokenizer, name, None) for name in ("eos_token_id", "bos_token_id")]
    # CLIP's unknown word is the one that ends a text, too.
    if unknown in ids and unknown not in ends:
        raise InputError(
            f"{directory}: expected a tokenizer that knows all of {GOLDEN_TEXT!r}; received its unknown word in "
            f"{short(list(ids))}"
        )
    text = tokenizer.decode(ids, skip_special_tokens=True)
    # The ends of words are spaces to some, `</w>`, `##` or a bar to others.
    letters = re.sub(r"</w>|[^a-z]", "", text.lower())
    if letters != GOLDEN_TEXT.replace(" ", ""):
        raise InputError(
            f"{directory}: expected a tokenizer that gives {GOLDEN_TEXT!r} back; received {short(text)}"
        )


def max_length(config: Mapping[str, Any], default: int, what: object) -> int:
    """The most tokens of a text by a tokenizer_config.json; many say a number beyond any text.

    Args:
      config: its contents.
      default: where it says nothing.
      what: names the file in the error.

    Raises:
      InputError: no number of at least 1.
    """
    length = config.get("model_max_length")
    if length is None:
        return default
    number = validated(Positive, length, f"{what}: model_max_length")
    if number < 1:
        raise InputError(f"{what}: model_max_length: expected at least 1; received {short(length)}")
    return int(number)


def _check_files(directory: pathlib.Path) -> None:
    """Raises InputError unless a directory holds a tokenizer's files, whole."""
    if not directory.is_dir():
        raise InputError(f"{directory}: expected a tokenizer directory; received no such directory")
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    if not any(set(group) <= set(names) for group in COMPLETE):
        expected = ", or ".join(" with ".join(group) for group in COMPLETE)
        raise InputError(
            f"{directory}: expected {expected}; received {', '.join(names) or 'an empty directory'}"
        )
    for name in names:
        # Weights may lie beside them, in formats of their own.
        if name not in _FILES:
            continue
        other = kind_of_file(directory / name)
        if other:
            raise InputError(
                f"{directory / name}: expected a file of a tokenizer; received {other}"
            )
        if name in _SMALL_FILES:
            read_json(directory / name)


def _known_class(directory: pathlib.Path, kind: str | None, transformers: Any) -> str:
    """A class of transformers for a directory's files: the one that is named, where transformers has it."""
    if _is_tokenizer_class(transformers, kind):
        assert kind is not None
        return kind
    if (directory / "tokenizer.json").is_file():
        return "PreTrainedTokenizerFast"
    config: dict[str, Any] = {}
    if (directory / "tokenizer_config.json").is_file():
        config = read_json(directory / "tokenizer_config.json")
    if "auto_map" in config:
        raise InputError(
            f"{directory}: expected a tokenizer class of transformers; received {short(kind)} with code of "
            "its own, which is not run"
        )
    return "AutoTokenizer"


def _is_tokenizer_class(transformers: Any, kind: Any) -> bool:
    if not isinstance(kind, str) or "Tokenizer" not in kind:
        return False
    return isinstance(getattr(transformers, kind, None), type)
