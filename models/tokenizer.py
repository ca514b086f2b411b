"""Tokenizers: of a Hugging Face directory, or built from a GGUF header."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

FastTokenizer = Any  # transformers.PreTrainedTokenizerFast

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # GGUF's token types
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS = {  # by GGUF's name for how text is cut before merging
    "default": _byte_level(),
    "gpt-2": _byte_level(),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama-bpe": _split(LLAMA3_SPLIT),
    "qwen2": _split(QWEN2_SPLIT),
}


def load_tokenizer(source: str | Path) -> FastTokenizer:
    """The fast tokenizer in a directory, chat template included.

    Raises:
      ValueError: there is none, or it is one that only runs as downloaded Python code.
    """
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"cannot load a tokenizer from {source}: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {source} has no tokenizer.json; only fast tokenizers are supported")
    return tokenizer


def tokenizer_from_gguf(header: Mapping[str, Any]) -> FastTokenizer:
    """The tokenizer that a GGUF header describes, byte-level BPE or SentencePiece's BPE; its control tokens are
    special tokens.

    Raises:
      ValueError: it is of another kind; say which tokenizer to use instead.
    """
    kind, pre = header.get("tokenizer.ggml.model"), header.get("tokenizer.ggml.pre", "default")
    is_sentencepiece = kind == "llama"
    if not is_sentencepiece and (kind != "gpt2" or pre not in _PRE_TOKENIZERS):
        raise ValueError(
            f"the GGUF file's tokenizer ({kind}, {pre}) is not supported: name the model's own with "
            f"tokenizer=<hub id or directory>. Supported are llama (SentencePiece) and gpt2 with: "
            f"{', '.join(_PRE_TOKENIZERS)}"
        )
    tokens = header["tokenizer.ggml.tokens"]
    tokenizer = _sentencepiece(header) if is_sentencepiece else _byte_level_bpe(header, pre)
    tokenizer.add_special_tokens(_tokens_of_type(header, _CONTROL))
    # SentencePiece looks for these in text whose spaces are replaced already, the others in text as it is.
    tokenizer.add_tokens(_tokens_of_type(header, _USER_DEFINED, normalized=is_sentencepiece))
    special = {
        f"{name}_token": tokens[header[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in header
    }
    if header.get("tokenizer.ggml.add_bos_token", is_sentencepiece or pre == "llama-bpe"):
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=header.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level_bpe(header: Mapping[str, Any], pre: str) -> Tokenizer:
    tokenizer = Tokenizer(
        tokenizer_models.BPE(
            vocab={token: index for index, token in enumerate(header["tokenizer.ggml.tokens"])},
            merges=[tuple(merge.split(" ")) for merge in header["tokenizer.ggml.merges"]],
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: spaces become "▁", what is in no piece falls back to bytes, and of all neighbours those are
    merged first that make the piece of the highest score."""
    tokens, scores = header["tokenizer.ggml.tokens"], header["tokenizer.ggml.scores"]
    kinds = header["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    normal = [index for index, kind in enumerate(kinds) if kind == _NORMAL]
    by_score = sorted(normal, key=lambda index: (-scores[index], index))
    merges = [
        (token[:i], token[i:])
        for token in map(tokens.__getitem__, by_score)
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    unknown = tokens[header.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    adds_space = header.get("tokenizer.ggml.add_space_prefix", True)
    replace_spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), replace_spaces]) if adds_space else replace_spaces
    )
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _tokens_of_type(header: Mapping[str, Any], wanted: int, *, normalized: bool = False) -> list[AddedToken]:
    tokens, types = header["tokenizer.ggml.tokens"], header["tokenizer.ggml.token_type"]
    special = wanted == _CONTROL
    return [
        AddedToken(t, normalized=normalized, special=special)
        for t, kind in zip(tokens, types, strict=True)
        if kind == wanted
    ]


def _transformers() -> ModuleType:
    """transformers, without its notice that there is no PyTorch (its tokenizers need none)."""
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    import transformers

    return transformers
