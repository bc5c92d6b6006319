"""Tokenizers of tiny pipelines: of the published kinds, with a few words."""

from __future__ import annotations

import json

import pytest

CLIP_LENGTH = 16


def clip_tokenizer(directory, pad: str):
    """Byte-level BPE with a few merges; "!" has id 0, so that it can be the pad token as in the second encoder."""
    transformers, tokenizers = (
        pytest.importorskip("transformers"),
        pytest.importorskip("tokenizers"),
    )
    directory.mkdir()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>"), ("o", "n</w>")]
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (directory / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n"
    )
    return transformers.CLIPTokenizer.from_pretrained(
        str(directory), pad_token=pad, model_max_length=CLIP_LENGTH
    )


def t5_tokenizer():
    """Unigram over words and characters, pad 0, end of sequence 1, unknown 2."""
    transformers, tokenizers = (
        pytest.importorskip("transformers"),
        pytest.importorskip("tokenizers"),
    )
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -20.0),
        ("▁red", -2.0),
        ("▁cat", -2.0),
        ("▁a", -2.0),
    ]
    pieces += [("▁", -6.0)]
    pieces += [(c, -8.0) for c in 'abcdefghijklmnopqrstuvwxyzAB!"']
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )
