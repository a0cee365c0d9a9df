"""What a config.json may say. Every field is honoured, fixed, neutral or unknown, and none is ignored in silence.

honoured   a field of the configuration's dataclass, of the type that is annotated there
fixed      has one meaning here: FIXED and what a model adds to it. Another value raises ValueError
neutral    cannot change what is computed: NEUTRAL, by reason, and what a model adds to it
unknown    anything else: named on standard error
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "per_layer_config": ({}, None),
    "quantization_config": (None,),  # NF4 is taken out before: formats/checkpoint.py
}
NEUTRAL = {
    "origin, and what formats/checkpoint.py has looked at": """_name_or_path name_or_path _commit_hash transformers_version model_type
        architectures auto_map tokenizer_class transformers.js_config unsloth_version unsloth_fixed finetuning_task is_llama_config
        sentence_transformers""",
    "the dtype of the tensors, which are read as they are": "dtype torch_dtype use_bfloat16",
    "the way to the same result, and what is returned beside it": """use_cache return_dict output_attentions output_hidden_states
        output_scores return_dict_in_generate torchscript gradient_checkpointing attn_implementation _attn_implementation
        _attn_implementation_autoset chunk_size_feed_forward tie_last_hidden_states output_past""",
    "initial values, which the tensors replace": "initializer_range initializer_factor",
    "rates of dropout, which the run chooses": """attention_dropout attention_probs_dropout_prob hidden_dropout_prob classifier_dropout
        resid_pdrop embd_pdrop attn_pdrop summary_first_dropout""",
    "heads for other tasks, and what a head's outputs are called": """summary_type summary_use_proj summary_activation
        summary_proj_to_labels id2label label2id num_labels _num_labels problem_type tf_legacy_loss task_specific_params""",
    "tokens, which the tokenizer and `generate` look at": """bos_token_id eos_token_id sep_token_id decoder_start_token_id prefix
        eos_token_ids predict_special_tokens n_special forced_bos_token_id forced_eos_token_id bad_words_ids suppress_tokens
        begin_suppress_tokens""",
    "how text is drawn, which `generate` takes as arguments": """do_sample early_stopping max_length min_length num_beams num_beam_groups
        num_return_sequences diversity_penalty temperature top_k top_p typical_p epsilon_cutoff eta_cutoff repetition_penalty
        length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty remove_invalid_values
        exponential_decay_length_penalty assistant_confidence_threshold assistant_lookbehind target_lookbehind num_assistant_tokens
        num_assistant_tokens_schedule""",
}
OWN = {"dropout"}  # fields of the dataclasses that no file has
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", NoneType: "null", dict: "a table"}


def read_fields(
    raw: dict[str, Any], where: str, kind: Any, fixed: Mapping[str, tuple[Any, ...]], neutral: str = "", aliases: Mapping[str, str] = {}
) -> dict[str, Any]:
    """{field: value} of what the dataclass `kind` honours. `aliases`: {another name: field}, as transformers' attribute_map.

    Raises ValueError, naming the file `where`, for a fixed field with another value, or two names of one field that differ.
    """
    raw = dict(raw)
    for alias, name in aliases.items():
        value = raw.pop(alias, None)
        if value is not None and raw.setdefault(name, value) != value:
            raise ValueError(f"{where}: {alias} is {value!r:.40}, but {name}, another name of the same, is {raw[name]!r:.40}.")
    for name, allowed in {**FIXED, **fixed}.items():
        if name in raw and raw[name] not in allowed:
            raise ValueError(f"{where} asks for {name} {raw[name]!r:.80}; supported: {' or '.join(map(str, allowed))}.")
    honoured = {field.name for field in fields(kind)} - OWN
    known = honoured | FIXED.keys() | fixed.keys() | set(" ".join([*NEUTRAL.values(), neutral]).split())
    if unknown := sorted(raw.keys() - known):
        print(f"{where}: not known here, and without effect: {', '.join(unknown):.300}.", file=sys.stderr)
    return {name: value for name, value in raw.items() if name in honoured}


def made(kind: Any, values: dict[str, Any], where: str) -> Any:
    """kind(**values), whose ValueError names the file `where`."""
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_types(kind: Any, values: Mapping[str, Any], where: str, positive: str = "") -> None:
    """Raise ValueError, naming `where` and the field, for a value that is not of the type that `kind` annotates.

    A number is finite, an integer below 2^31, and neither a truth value. `positive` names fields that must be above 0.
    """
    hints = _hints(kind)
    for name, value in values.items():
        above = name in positive.split() and value is not None
        if not fits(value, hints[name]) or (above and not value > 0):
            words = _in_words(hints[name])
            if above:
                words = words.replace("an integer", "a positive integer").replace("a number", "a positive number")
            raise ValueError(f"{where}: {name} must be {words}, got {value!r:.80}.")


def fits(value: Any, hint: Any) -> bool:
    """Is the value of this type, as JSON has types?"""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if origin in (list, Sequence):
        return isinstance(value, (list, tuple)) and all(fits(item, args[0]) for item in value)
    if hint in (int, float):
        number = isinstance(value, (int, hint)) and not isinstance(value, bool)
        return number and abs(value) < (2**31 if hint is int else 3e38)
    return hint is Any or isinstance(value, hint)


def _in_words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, args))
    return f"a list of which each is {_in_words(args[0])}" if origin in (list, Sequence) else _WORDS.get(origin or hint, str(hint))


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def check_pad(pad: int | None, vocab_size: int) -> None:
    """Raise ValueError for a pad_token_id that is no row of the embeddings; a negative one counts from the end, as in torch."""
    if pad is not None and not -vocab_size <= pad < vocab_size:
        raise ValueError(f"pad_token_id {pad} is no row of the embeddings, of which there are {vocab_size}.")
