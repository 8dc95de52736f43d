"""A SentencePiece BPE vocabulary out of a GGUF file, as tokenizer.json.

SentencePiece joins, again and again, the two neighbours that make the token of the highest score. BPE with ranked
merges does the same when every way to split a token is a merge and merges are ranked by that score. Tokens that the
vocabulary's makers defined are found in the text first and join with nothing, and a character without a token is
written as its bytes.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from engine.errors import LoadError
from engine.models.gguf.source import Source

_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = "\u2581"
_TURN_ENDS = ("<end_of_turn>",)


def read_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer; with special tokens it begins a text with bos where the file says so.

    Raises:
        LoadError: another kind of vocabulary, or lists of different lengths.
    """
    model = source.get(f"{_KEY}model", str)
    if model != "llama" or source.get(f"{_KEY}add_space_prefix", bool, False):
        raise LoadError(
            f"{source.path}: tokenizer {model!r} is not converted; Gemma's is 'llama' without a space prefix"
        )
    tokens, kinds = source.get(f"{_KEY}tokens", list), source.get(f"{_KEY}token_type", list)
    scores = source.get(f"{_KEY}scores", list)
    if not len(tokens) == len(kinds) == len(scores):
        raise LoadError(f"{source.path}: {_KEY}tokens, scores and token_type differ in length; fetch the file again")
    # llama.cpp writes the runs of spaces among them as such, the others as SentencePiece does.
    tokens = [t.replace(" ", _SPACE) if k == _USER_DEFINED else t for t, k in zip(tokens, kinds, strict=True)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise LoadError(f"{source.path}: {_KEY}tokens names a token twice; fetch the file again")
    apart = {_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE}
    ranked = {t: s for t, k, s in zip(tokens, kinds, scores, strict=True) if k not in apart}
    unknown = _token(source, tokens, "unknown", 3)
    tokenizer = Tokenizer(
        BPE(vocabulary, _merges(ranked, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    both = list(zip(tokens, kinds, strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in both if k == _CONTROL])
    # Sought in the normalised text: there a run of spaces is the token that the vocabulary holds.
    tokenizer.add_tokens([AddedToken(t, normalized=True, special=False) for t, k in both if k == _USER_DEFINED])
    if source.get(f"{_KEY}add_bos_token", bool, True):
        bos = _token(source, tokens, "bos", 2)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, vocabulary[bos])]
        )
    return tokenizer


def tokenizer_config(source: Source) -> dict[str, Any]:
    """tokenizer_config.json."""
    tokens = source.get(f"{_KEY}tokens", list)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.get(f"{source.get('general.architecture', str)}.context_length", int),
        "add_bos_token": source.get(f"{_KEY}add_bos_token", bool, True),
        "clean_up_tokenization_spaces": False,
    }
    names = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    for (name, key), usual in zip(names, (2, 1, 3, 0), strict=True):
        config[f"{name}_token"] = _token(source, tokens, key, usual)
    if "tokenizer.chat_template" in source:
        config["chat_template"] = source.get("tokenizer.chat_template", str)
    return config


def generation_config(source: Source) -> dict[str, Any]:
    """generation_config.json: what ends a text, and how to sample where the file says so."""
    tokens = source.get(f"{_KEY}tokens", list)
    ends = [source.get(f"{_KEY}eos_token_id", int)]
    if f"{_KEY}eot_token_id" in source:
        ends.append(source.get(f"{_KEY}eot_token_id", int))
    if "tokenizer.chat_template" in source:
        ends += [tokens.index(token) for token in _TURN_ENDS if token in tokens]
    config: dict[str, Any] = {
        "bos_token_id": source.get(f"{_KEY}bos_token_id", int),
        "eos_token_id": list(dict.fromkeys(ends)),
    }
    for name, key, kind in (("temperature", "temp", float), ("top_k", "top_k", int), ("top_p", "top_p", float)):
        if f"general.sampling.{key}" in source:
            config["do_sample"] = True
            config[name] = source.get(f"general.sampling.{key}", kind)
    return config


def _token(source: Source, tokens: list[str], key: str, usual: int) -> str:
    index = source.get(f"{_KEY}{key}_token_id", int, usual)
    if not 0 <= index < len(tokens):
        raise LoadError(f"{source.path}: {_KEY}{key}_token_id {index} is not in the vocabulary of {len(tokens)}")
    return tokens[index]


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a scored token of two others, the best token first; of one token, the oldest parts first."""
    merges: list[tuple[str, str]] = []
    for token in sorted(scores, key=lambda t: -scores[t]):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in halves if left in scores and right in scores]
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges
