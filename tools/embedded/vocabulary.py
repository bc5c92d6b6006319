"""Builds the embedded pipeline's three tokenizers: one token a word of the world, one a letter of a sign.

CLIP's two are byte-pair encoders over lower-cased text; every word of the world merges to one token, while the
letters of signs stay apart, so that unseen signs are made of seen tokens. T5's is a unigram model with the same aim.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import world
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

CLIP_LENGTH = 14
T5_LENGTH = 12


def words() -> list[str]:
    """Every word of the world's prompts, lower case, sign texts left out."""
    plain = "a photo of and on in sign saying left right above below two three".split()
    shapes = [s for shape in world.SHAPES for s in (shape, world.plural(shape, 2))]
    return plain + shapes + list(world.INKS) + list(world.BACKGROUNDS)


def _bytes_to_unicode() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _merges() -> list[tuple[str, str]]:
    """Left-to-right merges, in an order under which every word becomes one token."""
    vocabulary = [w for w in words() if len(w) > 1]
    for seed in range(1000):
        random.Random(seed).shuffle(vocabulary)
        merges: list[tuple[str, str]] = []
        for word in vocabulary:
            pieces = [*word[:-1], word[-1] + "</w>"]
            left = pieces[0]
            for piece in pieces[1:]:
                if (left, piece) not in merges:
                    merges.append((left, piece))
                left += piece
        model = _clip_model(merges)
        if all(len(model.tokenize(w)) == 1 for w in vocabulary):
            return merges
    raise RuntimeError("no merge order keeps every word whole")


def _clip_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    alphabet = _bytes_to_unicode()
    pieces = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges]
    pieces = list(dict.fromkeys(pieces)) + ["<|startoftext|>", "<|endoftext|>"]
    return {piece: i for i, piece in enumerate(pieces)}


def _clip_model(merges: list[tuple[str, str]]) -> models.BPE:
    return models.BPE(
        vocab=_clip_vocabulary(merges),
        merges=merges,
        unk_token="<|endoftext|>",
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
    )


def write_clip(directory: Path, pad: str) -> CLIPTokenizer:
    """Writes vocab.json, merges.txt and the rest for a CLIP tokenizer that pads with `pad`."""
    directory.mkdir(parents=True, exist_ok=True)
    merges = _merges()
    (directory / "vocab.json").write_text(json.dumps(_clip_vocabulary(merges), ensure_ascii=False))
    (directory / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n"
    )
    tokenizer = CLIPTokenizer.from_pretrained(
        str(directory), pad_token=pad, model_max_length=CLIP_LENGTH
    )
    tokenizer.save_pretrained(str(directory))
    return CLIPTokenizer.from_pretrained(str(directory))


def write_t5(
    directory: Path,
    vocabulary: Sequence[str] = (),
    letters: str = world.LETTERS,
    length: int = T5_LENGTH,
) -> PreTrainedTokenizerFast:
    """Writes a unigram tokenizer in T5's conventions: pad 0, end of sequence 1, unknown 2.

    Args:
      directory: where.
      vocabulary: whole words; those of the image world where there are none.
      letters: of signs.
      length: most tokens of a prompt.
    """
    vocabulary = list(dict.fromkeys(vocabulary or words()))
    directory.mkdir(parents=True, exist_ok=True)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [("▁" + w, -3.0) for w in vocabulary]
    characters = sorted(set("".join(vocabulary)) | set(letters) | set('0123456789",.▁'))
    pieces += [('▁"', -3.0)] + [(c, -10.0) for c in characters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )
    fast.save_pretrained(str(directory))
    return fast
