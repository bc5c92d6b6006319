"""Tokenizers that a `tokenizer.json` says in full, read without transformers, whose import takes seconds.

transformers' fast tokenizers are the `tokenizers` library with settings of a few small files around it. Where these
settings are ones that are known to change nothing, the library alone gives the same ids; anything else is left to
transformers. CLIP's class builds its own normaliser and splitting whatever the file says, so that the file has to say
the same.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from marble_jax.errors import InputError
from marble_jax.storage.files import read_json

AS_IT_STANDS = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that take the file as it is; None stands for the first."""
_CLIP = ("CLIPTokenizer", "CLIPTokenizerFast")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_NEUTRAL = {
    *_SPECIAL,
    "backend",
    "clean_up_tokenization_spaces",
    "is_local",
    "local_files_only",
    "model_max_length",
    "name_or_path",
    "processor_class",
    "tokenizer_class",
}
"""Keys of tokenizer_config.json that do not change the ids of a text that is cut and padded to a stated length."""
_FILES = {"tokenizer.json", "tokenizer_config.json"}
_OTHER_FILES = {"special_tokens_map.json", "added_tokens.json"}
# Source: `CLIPTokenizer` of transformers 5.24.
_CLIP_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ],
}
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
_CLIP_PIECES = {
    "normalizer": _CLIP_NORMALIZER,
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": _CLIP_WORDS},
                "behavior": "Removed",
                "invert": True,
            },
            _BYTE_LEVEL | {"add_prefix_space": False},
        ],
    },
    "decoder": _BYTE_LEVEL | {"add_prefix_space": True},
}
_CLIP_MODEL = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "</w>",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Texts as ids.

    Attributes:
      input_ids: ids of a text, or of each of several.
      attention_mask: 1 for each id that is not padding.
    """

    input_ids: list[Any]
    attention_mask: list[Any]


class JsonTokenizer:
    """The part of a transformers tokenizer that encoders ask for, over the `tokenizers` library.

    Attributes:
      bos_token_id: id that begins a text; None where there is none.
      eos_token_id: id that ends it.
      unk_token_id: id of what the vocabulary does not have.
      pad_token_id: id that fills a text up.
    """

    def __init__(self, backend: Any, special: dict[str, str]):
        """Wraps a tokenizer.

        Args:
          backend: a `tokenizers.Tokenizer`.
          special: words by role, such as "pad_token".
        """
        self._backend = backend
        self._pad_token = special.get("pad_token")
        ids = {role: backend.token_to_id(word) for role, word in special.items()}
        self.bos_token_id = ids.get("bos_token")
        self.eos_token_id = ids.get("eos_token")
        self.unk_token_id = ids.get("unk_token")
        self.pad_token_id = ids.get("pad_token")

    @property
    def backend_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`, by the name that transformers has for it."""
        return self._backend

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __call__(
        self,
        texts: str | Sequence[str],
        padding: str = "",
        max_length: int | None = None,
        truncation: bool = False,
        return_attention_mask: bool = True,
    ) -> Encoded:
        """Encodes texts.

        Args:
          texts: one or several.
          padding: "max_length" fills up to `max_length`; empty: not.
          max_length: ids of a text at most, with the special ones.
          truncation: whether longer texts are cut.
          return_attention_mask: taken for the sake of its name; the mask always comes.
        """
        if truncation:
            self._backend.enable_truncation(max_length)
        else:
            self._backend.no_truncation()
        if padding:
            self._backend.enable_padding(
                length=max_length, pad_id=self.pad_token_id, pad_token=self._pad_token
            )
        else:
            self._backend.no_padding()
        if isinstance(texts, str):
            one = self._backend.encode(texts)
            return Encoded(one.ids, one.attention_mask)
        several = self._backend.encode_batch(list(texts))
        return Encoded([one.ids for one in several], [one.attention_mask for one in several])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of ids."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def add_tokens(self, words: Sequence[str], special_tokens: bool = False) -> int:
        """Adds words to the vocabulary; returns how many are new."""
        if special_tokens:
            return self._backend.add_special_tokens(list(words))
        return self._backend.add_tokens(list(words))


def open_json_tokenizer(directory: pathlib.Path, kind: str | None) -> JsonTokenizer | None:
    """Returns the tokenizer of a directory; None where transformers would read more than its `tokenizer.json`.

    Args:
      directory: a component directory.
      kind: class of the tokenizer in transformers; None takes the file as it is.
    """
    if kind not in (*AS_IT_STANDS, *_CLIP) or not (directory / "tokenizer.json").is_file():
        return None
    if any((directory / name).exists() for name in _OTHER_FILES):
        return None
    try:
        content = read_json(directory / "tokenizer.json")
        config: dict[str, Any] = {}
        if (directory / "tokenizer_config.json").is_file():
            config = read_json(directory / "tokenizer_config.json")
    except InputError:
        # transformers' own reading says what is wrong.
        return None
    if not _is_readable(content):
        return None
    special = {role: config[role] for role in _SPECIAL if config.get(role) is not None}
    if not set(config) <= _NEUTRAL or not _are_words_of(special, content):
        return None
    if kind in _CLIP and not _is_clip(content, special):
        return None
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    # A panic of the library's Rust part is no Exception.
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return None
    return JsonTokenizer(backend, special)


def _is_readable(content: dict[str, Any]) -> bool:
    """Whether what is looked at here has the form that it has in every file; transformers says what is wrong."""
    added, model = content.get("added_tokens") or [], content.get("model")
    if not isinstance(added, list) or not isinstance(model, dict):
        return False
    for word in added:
        if not isinstance(word, dict) or not isinstance(word.get("content"), str):
            return False
    return isinstance(model.get("vocab"), (dict, list))


def _are_words_of(special: dict[str, Any], content: dict[str, Any]) -> bool:
    """Whether special words are among a file's own, with the flags that transformers would add them with."""
    own = set()
    for word in content.get("added_tokens") or []:
        plain = not (word.get("single_word") or word.get("lstrip") or word.get("rstrip"))
        if plain and word.get("special") and not word.get("normalized"):
            own.add(word.get("content"))
    return all(isinstance(word, str) and word in own for word in special.values())


def _is_clip(content: dict[str, Any], special: dict[str, str]) -> bool:
    """Whether a file says what CLIP's class builds from a vocabulary and merges."""
    if any(content.get(name) != piece for name, piece in _CLIP_PIECES.items()):
        return False
    model = content.get("model") or {}
    if any(model.get(name) != value for name, value in _CLIP_MODEL.items()):
        return False
    vocabulary = model.get("vocab") or {}
    if not isinstance(vocabulary, dict):
        return False
    start, end = special.get("bos_token"), special.get("eos_token")
    ends = {
        "type": "RobertaProcessing",
        "sep": [end, vocabulary.get(end)],
        "cls": [start, vocabulary.get(start)],
        "trim_offsets": False,
        "add_prefix_space": False,
    }
    return content.get("post_processor") == ends and model.get("unk_token") == special.get(
        "unk_token"
    )
