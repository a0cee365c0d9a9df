"""The configuration of Llama and of its relatives, and what each of them has that the others do not: one table."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from minilora.models.config_file import ModelConfig
from minilora.models.rope import check_scaling, frequencies

FULL, SLIDING = "full_attention", "sliding_attention"  # of layer_types


class Variant(NamedTuple):
    """A model_type. What differs between layers is in the configuration; what no field of it says is here."""

    classes: str  # in transformers, without ForCausalLM
    fields: str  # those of LlamaConfig that not every model_type has
    defaults: dict[str, Any]  # transformers', where they differ from LlamaConfig's
    qkv_bias: bool = False  # biases on q, k and v, whatever attention_bias says
    head_norms: bool = False  # an RMS norm of each head of q and k before they are rotated
    gemma: bool = False  # norms by 1 + weight, also after each part; gate with tanh GELU; embeddings times sqrt(hidden_size)


_WINDOWED = "use_sliding_window sliding_window layer_types"
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
_SMOLLM3 = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_theta": 2e6,
    "no_rope_layer_interval": 4,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
}
_GEMMA = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}

VARIANTS = {
    "llama": Variant("Llama", "attention_bias mlp_bias", _ENDS),
    "mistral": Variant("Mistral", "sliding_window", _MISTRAL | _ENDS),
    "qwen2": Variant("Qwen2", f"{_WINDOWED} max_window_layers", _QWEN, qkv_bias=True),
    "qwen3": Variant("Qwen3", f"attention_bias {_WINDOWED} max_window_layers", _QWEN | {"head_dim": 128}, head_norms=True),
    "smollm3": Variant("SmolLM3", f"attention_bias mlp_bias {_WINDOWED} no_rope_layers no_rope_layer_interval", _SMOLLM3),
    "gemma3_text": Variant(
        "Gemma3",
        "attention_bias sliding_window layer_types sliding_window_pattern query_pre_attn_scalar rope_local_base_freq",
        _GEMMA,
        head_norms=True,
        gemma=True,
    ),
}
_SPECIAL = set(" ".join(variant.fields for variant in VARIANTS.values()).split())


@dataclass
class LlamaConfig(ModelConfig):
    """Field names as in the config.json of a published Llama, Mistral, Qwen2, Qwen3, SmolLM3 or Gemma 3 (`model_type` says which).

    num_key_value_heads None is num_attention_heads; head_dim None is hidden_size / num_attention_heads. rope_scaling: models/rope.py.
    Which layers have a window, `window`, and which are rotated by which frequencies, `rotary`, follows from the fields as in transformers.
    Raises ValueError for sizes that do not fit, and fields that the model_type does not have.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_local_base_freq: float | None = None  # the base in Gemma's layers with a window
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool | None = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    max_window_layers: int | None = None  # the layers below have no window
    sliding_window_pattern: int | None = None  # every so many layers there is one without a window
    no_rope_layers: list[int] | None = None  # 0 for a layer that is not rotated
    no_rope_layer_interval: int | None = None  # every so many layers there is one that is not rotated
    query_pre_attn_scalar: int | None = None  # q is divided by its square root, not by that of head_dim
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    choices: ClassVar[Any] = {"model_type": tuple(VARIANTS)}
    fixed: ClassVar[Any] = {
        **choices,
        "hidden_act": ("silu", "swish"),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "is_causal": (True,),
        "partial_rotary_factor": (1, None),
        "rope_interleaved": (False,),
        "use_mrope": (False,),
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    }
    neutral: ClassVar[Any] = """is_decoder pretraining_tp rope_parameters original_max_position_embeddings _sliding_window_pattern
        cache_implementation"""

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.check()
        if self.head_dim is None:
            self.check_multiple("hidden_size", "num_attention_heads")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"LlamaConfig: head_dim must be a positive even number, got {self.head_dim}.")
        self.check_multiple("num_attention_heads", "num_key_value_heads")
        own = self.variant.fields.split()
        for name in sorted(_SPECIAL - set(own)):
            if getattr(self, name) not in (None, False):
                raise ValueError(f"LlamaConfig: a {self.model_type} has no {name}; got {getattr(self, name)!r:.80}.")
        for name in own:
            if getattr(self, name) is None and name in self.variant.defaults and name != "sliding_window":
                setattr(self, name, self.variant.defaults[name])
        if "use_sliding_window" in own and not self.use_sliding_window:
            self.sliding_window = None
        self._check_layers()
        if self.rope_scaling is not None:
            words = f"LlamaConfig: rope_scaling is {self.rope_scaling!r:.80}"
            self.rope_scaling = check_scaling(self.rope_scaling, words, self.max_position_embeddings)
            frequencies(min(self.head_dim, 2**16), self.rope_theta, self.rope_scaling)

    def _check_layers(self) -> None:
        """Raise ValueError for lists that do not fit the number of layers, or a window without a size."""
        n, types, rotated = self.num_hidden_layers, self.layer_types, self.no_rope_layers
        if types is not None and (len(types) != n or not set(types) <= {FULL, SLIDING}):
            raise ValueError(f"LlamaConfig: layer_types must be a list of {n}, each {FULL} or {SLIDING}; got {types!r:.80}.")
        slides = (self.sliding_window_pattern or 1) > 1 if types is None else SLIDING in types
        if slides and self.sliding_window is None:
            raise ValueError(
                f"LlamaConfig: some layers are of type {SLIDING}, but there is no sliding_window, or use_sliding_window is false."
            )
        if rotated is not None and len(rotated) < n:
            raise ValueError(f"LlamaConfig: no_rope_layers has {len(rotated)} numbers for {n} layers.")

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.model_type]

    def window(self, i: int) -> int | None:
        """The window of layer i in tokens; None without one."""
        if self.layer_types is not None:
            slides = self.layer_types[i] == SLIDING
        elif self.sliding_window_pattern:
            slides = (i + 1) % self.sliding_window_pattern != 0
        elif self.no_rope_layer_interval:
            slides = self.rotary(i) is None
        else:
            slides = i >= (self.max_window_layers or 0)
        return self.sliding_window if slides else None

    def rotary(self, i: int) -> str | None:
        """The kind of frequencies of layer i, a key of `frequencies`; None where it is not rotated."""
        if self.no_rope_layers is not None:
            rotated = bool(self.no_rope_layers[i])
        else:
            rotated = not self.no_rope_layer_interval or (i + 1) % self.no_rope_layer_interval != 0
        local = self.rope_local_base_freq is not None and self.window(i) is not None
        return (SLIDING if local else FULL) if rotated else None

    def frequencies(self, kind: str) -> Any:
        """The rotary frequencies (head_dim / 2,) of a kind of layer, and the factor of cos and sin."""
        settings = (self.rope_theta, self.rope_scaling) if kind == FULL else (self.rope_local_base_freq, None)
        return frequencies(self.head_dim, *settings)  # type: ignore[arg-type]

    @classmethod
    def read(cls, raw: dict[str, Any], where: str) -> dict[str, Any]:
        """The fields in a config.json as transformers 4 or 5 writes it, whose rotary settings have other names in each."""
        variant = VARIANTS.get(str(raw.get("model_type", "llama")), VARIANTS["llama"])
        raw = {**variant.defaults, **raw}
        if variant.gemma:  # which reads hidden_activation; Gemma 2 and some conversions of Gemma 3 have both
            raw.pop("hidden_act", None)
        if "layer_types" not in variant.fields:  # transformers does not read it
            kinds = raw.pop("layer_types", None) or []
            usual = SLIDING if "sliding_window" in variant.fields and raw.get("sliding_window") else FULL
            if not isinstance(kinds, list) or any(kind != usual for kind in kinds):
                raise ValueError(f"{where} has layer_types {kinds!r:.80}; supported: {usual}.")
        for name in {"sliding_window", "max_window_layers"} - set(variant.fields.split()):  # nor these
            raw.pop(name, None)
        values = super().read(raw, where)
        scaling, parameters = (_table(raw.get(name)) for name in ("rope_scaling", "rope_parameters"))  # in transformers 4 and 5
        name = "rope_scaling" if scaling else "rope_parameters"
        rope, words = scaling or parameters, f"{where} has {name} {raw.get(name)!r:.80}"
        if variant.gemma and parameters:
            local, rope = _table(parameters.get(SLIDING)), _table(parameters.get(FULL)) | scaling
            values["rope_local_base_freq"] = local.pop("rope_theta", values["rope_local_base_freq"])
            if parameters.keys() - {FULL, SLIDING} or check_scaling(local, words, 1):
                raise ValueError(f"{where} has rope_parameters {parameters!r:.200}; supported: {FULL}, and {SLIDING} without scaling.")
        theta = rope.pop("rope_theta", None)
        length = raw.get("original_max_position_embeddings")
        if length is not None and (rope.get("rope_type") or rope.get("type")) in ("llama3", "yarn", "longrope"):
            rope["original_max_position_embeddings"] = length
        limit = values.get("max_position_embeddings", cls.max_position_embeddings)
        values["rope_scaling"] = check_scaling(rope, words, limit if type(limit) is int and 0 < limit < 2**31 else 1)  # else refused later
        return values | ({} if theta is None else {"rope_theta": theta})

    def to_json(self) -> dict[str, Any]:
        """The config.json of this model, which transformers 4 and 5 both read."""
        names = vars(self).keys() - (_SPECIAL - set(self.variant.fields.split()))
        kept = {name for name in names if name.endswith("_id") or name == "sliding_window"}  # None has a meaning
        raw = {name: value for name, value in super().to_json().items() if name in kept or (name in names and value is not None)}
        raw |= {} if self.rope_scaling is None else {"rope_scaling": dict(self.rope_scaling)}  # its own: transformers writes into it
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": "default", **(self.rope_scaling or {})}
        if self.variant.gemma:
            rope = {FULL: rope, SLIDING: {"rope_theta": self.rope_local_base_freq, "rope_type": "default"}}
        act = {"hidden_activation": "gelu_pytorch_tanh"} if self.variant.gemma else {"hidden_act": "silu"}
        return {"architectures": [f"{self.variant.classes}ForCausalLM"], **act, "rope_parameters": rope, **raw}


def _table(value: Any) -> dict[str, Any]:
    """A table of rotary settings; what is none names a type that does not exist."""
    return dict(value or {}) if isinstance(value or {}, dict) else {"rope_type": value}
