"""The fields of a config.json. Each one is honoured, fixed, neutral or unknown, and none is ignored silently.

honoured   a field of the model's ModelConfig, with the type annotated there
fixed      only one value is supported: FIXED, and `fixed` of the model. Another value raises ValueError
neutral    cannot change what is computed: NEUTRAL, by reason, and `neutral` of the model
unknown    any other: named on standard error
"""

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config", bound="ModelConfig")
FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False, None),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "per_layer_config": ({}, None),
    "quantization_config": (None,),  # formats/checkpoint.py removes that of NF4 before
}
NEUTRAL = {
    "origin, and what formats/checkpoint.py reads": """_name_or_path name_or_path _commit_hash transformers_version model_type
        architectures auto_map tokenizer_class transformers.js_config unsloth_version unsloth_fixed finetuning_task is_llama_config
        sentence_transformers""",
    "the dtype of the tensors, which the tensors state themselves": "dtype torch_dtype use_bfloat16",
    "other ways to the same result, and further outputs": """use_cache return_dict output_attentions output_hidden_states
        output_scores return_dict_in_generate torchscript gradient_checkpointing attn_implementation _attn_implementation
        _attn_implementation_autoset chunk_size_feed_forward tie_last_hidden_states output_past""",
    "initial values, which the tensors replace": "initializer_range initializer_factor",
    "dropout rates, which the run chooses": """attention_dropout attention_probs_dropout_prob hidden_dropout_prob classifier_dropout
        resid_pdrop embd_pdrop attn_pdrop summary_first_dropout""",
    "heads for other tasks, and the names of a head's outputs": """summary_type summary_use_proj summary_activation
        summary_proj_to_labels id2label label2id num_labels _num_labels problem_type tf_legacy_loss task_specific_params""",
    "tokens, which the tokenizer and `generate` read": """bos_token_id eos_token_id sep_token_id decoder_start_token_id prefix
        eos_token_ids predict_special_tokens n_special forced_bos_token_id forced_eos_token_id bad_words_ids suppress_tokens
        begin_suppress_tokens""",
    "sampling, which `generate` takes as arguments": """do_sample early_stopping max_length min_length num_beams num_beam_groups
        num_return_sequences diversity_penalty temperature top_k top_p typical_p epsilon_cutoff eta_cutoff repetition_penalty
        length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty remove_invalid_values
        exponential_decay_length_penalty assistant_confidence_threshold assistant_lookbehind target_lookbehind num_assistant_tokens
        num_assistant_tokens_schedule""",
}
OWN = {"dropout"}  # fields of a ModelConfig that no file has
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", NoneType: "null", dict: "a table"}


@dataclass
class ModelConfig:
    """Base of a model's configuration: a dataclass whose fields have the names in its config.json.

    It has max_position_embeddings and vocab_size, as a field or a property. The rest of config.json, beside the fields:
    fixed: {name: supported values}, none for a field that has another name in these files. neutral: names without effect.
    aliases: {another name: field}, as transformers' attribute_map.
    choices: {field: supported values}.
    """

    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    neutral: ClassVar[str] = ""
    aliases: ClassVar[Mapping[str, str]] = {}

    @property
    def longest_sequence(self) -> int:
        """The number of tokens that a sequence may have."""
        return self.max_position_embeddings  # type: ignore[attr-defined]

    @classmethod
    def from_json(cls: type[Config], raw: dict[str, Any], where: str = "config.json") -> Config:
        """The configuration in a config.json; `where` is its name for messages. Raises ValueError for what is not supported."""
        return made(cls, cls.read(raw, where), where)

    @classmethod
    def read(cls, raw: dict[str, Any], where: str) -> dict[str, Any]:
        """{field: value} of the fields in a config.json.

        Raises ValueError, naming the file `where`, for a fixed field with another value, or two names of one field that differ.
        """
        raw = dict(raw)
        for name, allowed in {**FIXED, **cls.fixed}.items():
            if name in raw and raw[name] not in allowed:
                raise ValueError(f"{where} has {name} {raw[name]!r:.80}; supported: {' or '.join(map(str, allowed or ['no such field']))}.")
        for alias, name in cls.aliases.items():
            value = raw.pop(alias, None)
            if value is not None and raw.setdefault(name, value) != value:
                raise ValueError(f"{where}: {alias} is {value!r:.40}, but {name}, another name of the same, is {raw[name]!r:.40}.")
        honoured = {field.name for field in fields(cls)} - OWN
        known = honoured | FIXED.keys() | cls.fixed.keys() | set(" ".join([*NEUTRAL.values(), cls.neutral]).split())
        if unknown := sorted(raw.keys() - known):
            print(f"{where}: unknown, and without effect: {', '.join(unknown):.300}.", file=sys.stderr)
        return {name: value for name, value in raw.items() if name in honoured}

    def to_json(self) -> dict[str, Any]:
        """The fields as config.json keeps them."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in OWN}

    def check(self) -> None:
        """Raise ValueError for a value of another type or not among the choices, and for a number, but an id or a rate, not above 0."""
        where = type(self).__name__
        check_types(type(self), vars(self), where, [name for name in vars(self) if name not in OWN and not name.endswith("_id")])
        for name, allowed in self.choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{where}: {name} is {getattr(self, name)!r}; supported: {', '.join(map(str, allowed))}.")
        pad, rows = getattr(self, "pad_token_id", None), getattr(self, "vocab_size", 0)
        if pad is not None and not -rows <= pad < rows:  # a negative one counts from the end, as in torch
            raise ValueError(f"pad_token_id {pad} is no row of the embeddings, of which there are {rows}.")

    def check_multiple(self, name: str, divisor: str) -> None:
        """Raise ValueError unless the field `name` is a multiple of the field `divisor`."""
        n, d = getattr(self, name), getattr(self, divisor)
        if n % d:
            raise ValueError(f"{type(self).__name__}: {name} {n} is not a multiple of {divisor} {d}.")


def made(kind: Any, values: dict[str, Any], where: str) -> Any:
    """kind(**values); its ValueError names the file `where`."""
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_types(kind: Any, values: Mapping[str, Any], where: str, positive: Collection[str] = ()) -> None:
    """Raise ValueError, naming `where` and the field, for a value that does not have the type that `kind` annotates.

    A number is finite, an integer below 2^31, and neither is a truth value. `positive`: fields in which a number must be above 0.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{where}: {name!r:.80} is unknown.")
        is_low = name in positive and fits(value, float) and value <= 0
        if is_low or not fits(value, hints[name]):
            words = _in_words(hints[name])
            if name in positive:
                words = re.sub("an? (integer|number)", r"a positive \1", words)
            raise ValueError(f"{where}: {name} must be {words}, got {value!r:.80}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether the value has this type, as JSON has types."""
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
