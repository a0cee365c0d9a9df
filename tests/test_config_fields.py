"""config.json: every field of transformers' classes is honoured, fixed or neutral; wrong values are refused by file and field."""

import json
import time
from dataclasses import fields

import numpy as np
import oracle
import pytest
from golden import make_models

import minilora as ml
from minilora.formats.atomic import read_json, write_json
from minilora.models.bert import BertConfig
from minilora.models.config_file import NEUTRAL, OWN
from minilora.models.llama_config import FULL, SLIDING, VARIANTS, LlamaConfig
from minilora.models.registry import ARCHITECTURES

CLASSES = {kind: architecture.config for kind, architecture in ARCHITECTURES.items()}
SMALL = {
    "gpt2": {"vocab_size": 11, "n_embd": 6, "n_layer": 2, "n_head": 2, "n_positions": 8},
    "bert": {
        **{"vocab_size": 11, "hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 10},
        **{"max_position_embeddings": 8, "pad_token_id": None},
    },
}
SMALL["roberta"] = SMALL["xlm-roberta"] = {**SMALL["bert"], "pad_token_id": 1}
SMALL["distilbert"] = {
    **{"vocab_size": 11, "dim": 6, "n_layers": 2, "n_heads": 2, "hidden_dim": 10, "max_position_embeddings": 8, "pad_token_id": None},
}
SMALL["modernbert"] = {**SMALL["bert"], "hidden_size": 8}
SMALL |= {kind: {**SMALL["bert"], "hidden_size": 8, "num_key_value_heads": 1} for kind in VARIANTS}
SMALL |= {kind: {**SMALL[kind], "head_dim": 4} for kind in ("qwen3", "gemma3_text")}
IDS = np.array([3, 1, 4, 1, 5, 9])
_QWEN = [{}, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 4}]
_QWEN += [{"use_sliding_window": True, "sliding_window": 3, "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, FULL, SLIDING]}]
LAYERS = {
    "mistral": [{}, {"sliding_window": None}, {"sliding_window": 5}],
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "smollm3": [
        {},
        {"no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 3},
        {"no_rope_layers": [0, 1, 1, 0, 1, 0, 1], "use_sliding_window": True, "sliding_window": 3},
        {"no_rope_layers": [0, 1, 1, 0, 1, 0, 1], "use_sliding_window": False, "sliding_window": 3},
        _QWEN[2],
    ],
    "gemma3_text": [
        {},
        {"sliding_window_pattern": 2, "sliding_window": 3},
        {"rope_local_base_freq": 5e3, "rope_theta": 7e5},
        {"layer_types": _QWEN[2]["layer_types"], "rope_parameters": {FULL: {"rope_theta": 3e5, "rope_type": "default"}}},
    ],
}


# -- live: the fields of transformers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def transformers():
    pytest.importorskip("torch", reason="the live comparison needs torch: pip install 'minilora[oracle]'")
    return pytest.importorskip("transformers", reason="the live comparison needs transformers: pip install 'minilora[oracle]'")


def filled_config(transformers, kind, **changes):
    """A filled configuration of transformers."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoConfig.for_model(kind, **{**SMALL[kind], **changes})


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_of_transformers_is_known(kind, transformers, capsys):
    """Fields of the class, inherited fields, aliases, and those of generation: at their defaults they change nothing silently."""
    config = filled_config(transformers, kind)
    raw = json.loads(config.to_json_string(use_diff=False))
    raw |= {alias: raw[name] for alias, name in config.attribute_map.items()}
    for name in transformers.GenerationConfig._get_default_generation_params():
        raw.setdefault(name, None)
    raw |= {field.name: getattr(config, field.name) for field in fields(config) if field.name not in raw}
    assert len(raw) > 50
    capsys.readouterr()  # output of transformers
    made = CLASSES[kind].from_json(raw, "config.json")
    assert capsys.readouterr() == ("", "")
    for name, value in SMALL[kind].items():
        assert getattr(made, made.aliases.get(name, name)) == value


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_are_those_of_the_architecture(kind, transformers):
    """An empty config.json gives transformers' default model, in all honoured fields."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = type(filled_config(transformers, kind))()
    made = CLASSES[kind].from_json({"model_type": kind}, "config.json")
    for field in fields(made):
        left_out = "dropout", "pooling", "id2label", "rope_theta", "rope_scaling", "layer_types", "no_rope_layers"
        if field.name not in left_out and hasattr(config, field.name):
            assert getattr(made, field.name) == getattr(config, field.name), field.name


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind in VARIANTS for change in LAYERS.get(kind, [{}])], ids=str)
def test_the_kinds_of_layers_are_those_of_transformers(kind, change, transformers):
    """Windows, rotation and bases of every layer, from the fields that a file has, and from those that it leaves out."""
    config = filled_config(transformers, kind, **{**change, "num_hidden_layers": 7})
    made = CLASSES[kind].from_json({"model_type": kind, **SMALL[kind], **change, "num_hidden_layers": 7}, "config.json")
    types = getattr(config, "layer_types", None) or [SLIDING if getattr(config, "sliding_window", None) else FULL] * 7
    types = [FULL] * 7 if kind == "llama" else types
    rotated = getattr(config, "no_rope_layers", None) or [1] * 7
    kinds = types if kind == "gemma3_text" else [FULL] * 7
    assert [made.window(i) for i in range(7)] == [config.sliding_window if kind == SLIDING else None for kind in types]
    assert [made.rotary(i) for i in range(7)] == [kind if yes else None for kind, yes in zip(kinds, rotated, strict=True)]
    rope = config.rope_parameters
    assert made.frequencies(FULL)[0][1] == pytest.approx(rope.get(FULL, rope)["rope_theta"] ** -0.5)
    if kind == "gemma3_text":
        assert made.frequencies(SLIDING)[0][1] == pytest.approx(rope[SLIDING]["rope_theta"] ** -0.5)


def other_value(value):
    """Another value of the same type, or None."""
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 0.5 if isinstance(value, float) else None


@pytest.mark.parametrize("kind", CLASSES)
def test_neutral_fields_are_neutral_in_transformers(kind, transformers):
    """Every neutral field of transformers at another value gives the same logits from the same weights."""
    import torch

    def logits(weights, **changes):
        torch.manual_seed(0)
        model = getattr(transformers, ARCHITECTURES[kind].architectures[0])(filled_config(transformers, kind, **changes)).eval()
        model.load_state_dict(weights or model.state_dict())
        with torch.no_grad():
            return model.state_dict(), model(torch.tensor(IDS[None]), return_dict=True).logits.numpy()

    weights, usual = logits(None)
    neutral = set(" ".join(NEUTRAL.values()).split()) | {"pretraining_tp", "_sliding_window_pattern", "reorder_and_upcast_attn"}
    neutral |= {*CLASSES[kind].neutral.split()} if kind not in VARIANTS else set()
    ours = {field.name for field in fields(CLASSES[kind])} - OWN
    tried = 0
    for name, value in filled_config(transformers, kind).to_dict().items():
        if name in neutral - ours - {"return_dict"} and other_value(value) is not None:  # without return_dict, transformers' models fail
            np.testing.assert_allclose(logits(weights, **{name: other_value(value)})[1], usual, atol=1e-6, err_msg=name)
            tried += 1
    assert tried >= 5


@pytest.mark.parametrize("kind", CLASSES)
def test_honoured_and_fixed_fields_mean_what_they_do_in_transformers(kind, transformers, tmp_path):
    """Every other one of transformers' fields at other values: the logits are transformers', or the folder is refused."""
    import torch

    cls, usual, compared, refused = CLASSES[kind], filled_config(transformers, kind), set(), set()
    named = {name: alias for alias, name in cls.aliases.items()}
    for field in sorted({field.name for field in fields(cls)} - OWN | cls.fixed.keys()):
        value = getattr(usual, name := named.get(field, field), ...)
        others = [3 * value] if isinstance(value, float) else [2 * value, value + 1] if type(value) is int else [not value]
        others = [choice for choice in cls.choices.get(field, others) if choice != value and value not in (None, ...)]
        for other in others:
            torch.manual_seed(0)
            try:
                theirs = getattr(transformers, ARCHITECTURES[kind].architectures[0])(filled_config(transformers, kind, **{name: other}))
                for p in theirs.parameters():
                    p.data += 0.3 * torch.randn_like(p)
                with torch.no_grad():
                    expected = theirs.eval()(torch.tensor(IDS[None])).logits.numpy()
            except Exception:  # not a configuration of transformers
                continue
            theirs.save_pretrained(tmp_path)
            try:
                logits = ml.load_model(tmp_path, "numpy").forward(IDS, keep=False)[0]
            except ValueError:
                refused.add(name)
                continue
            assert abs(logits - expected.reshape(logits.shape)).max() < 1e-5 * abs(expected).max(), (name, other)
            compared.add(name)
    assert len(compared) > 5
    assert refused - compared <= cls.fixed.keys()


# -- published files --------------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "gpt2": """activation_function=gelu_new architectures attn_pdrop=0.1 bos_token_id=50256 embd_pdrop=0.1 eos_token_id=50256
        initializer_range=0.02 layer_norm_epsilon=1e-05 model_type=gpt2 n_ctx=1024 n_embd=768 n_head=12 n_layer=12 n_positions=1024
        resid_pdrop=0.1 summary_activation=null summary_first_dropout=0.1 summary_proj_to_labels=true summary_type=cls_index
        summary_use_proj=true task_specific_params={} vocab_size=50257""",
    "bert-base-multilingual-cased": """architectures attention_probs_dropout_prob=0.1 directionality=bidi hidden_act=gelu
        hidden_dropout_prob=0.1 hidden_size=768 initializer_range=0.02 intermediate_size=3072 layer_norm_eps=1e-12
        max_position_embeddings=512 model_type=bert num_attention_heads=12 num_hidden_layers=12 pad_token_id=0 pooler_fc_size=768
        pooler_num_attention_heads=12 pooler_num_fc_layers=3 pooler_size_per_head=128 pooler_type=first_token_transform
        position_embedding_type=absolute transformers_version=4.6.0.dev0 type_vocab_size=2 use_cache=true vocab_size=119547
        gradient_checkpointing=false classifier_dropout=null torch_dtype=float32 _name_or_path=x""",
    "roberta-base": """architectures attention_probs_dropout_prob=0.1 bos_token_id=0 eos_token_id=2 hidden_act=gelu
        hidden_dropout_prob=0.1 hidden_size=768 initializer_range=0.02 intermediate_size=3072 layer_norm_eps=1e-05
        max_position_embeddings=514 model_type=roberta num_attention_heads=12 num_hidden_layers=12 pad_token_id=1
        type_vocab_size=1 vocab_size=50265""",
    "xlm-roberta-base": """architectures attention_probs_dropout_prob=0.1 bos_token_id=0 eos_token_id=2 hidden_act=gelu
        hidden_dropout_prob=0.1 hidden_size=768 initializer_range=0.02 intermediate_size=3072 layer_norm_eps=1e-05
        max_position_embeddings=514 model_type=xlm-roberta num_attention_heads=12 num_hidden_layers=12 output_past=true pad_token_id=1
        position_embedding_type=absolute transformers_version=4.17.0.dev0 type_vocab_size=1 use_cache=true vocab_size=250002""",
    "distilbert-base-uncased-finetuned-sst-2-english": """activation=gelu architectures attention_dropout=0.1 dim=768 dropout=0.1
        finetuning_task=sst-2 hidden_dim=3072 initializer_range=0.02 max_position_embeddings=512 model_type=distilbert n_heads=12
        n_layers=6 output_past=true pad_token_id=0 qa_dropout=0.1 seq_classif_dropout=0.2 sinusoidal_pos_embds=false tie_weights_=true
        vocab_size=30522""",
    "ModernBERT-base": """architectures attention_bias=false attention_dropout=0.0 bos_token_id=50281 classifier_activation=gelu
        classifier_bias=false classifier_dropout=0.0 classifier_pooling=mean cls_token_id=50281 decoder_bias=true
        deterministic_flash_attn=false embedding_dropout=0.0 eos_token_id=50282 global_attn_every_n_layers=3 global_rope_theta=160000.0
        gradient_checkpointing=false hidden_activation=gelu hidden_size=768 initializer_cutoff_factor=2.0 initializer_range=0.02
        intermediate_size=1152 layer_norm_eps=1e-05 local_attention=128 local_rope_theta=10000.0 max_position_embeddings=8192
        mlp_bias=false mlp_dropout=0.0 model_type=modernbert norm_bias=false norm_eps=1e-05 num_attention_heads=12 num_hidden_layers=22
        pad_token_id=50283 position_embedding_type=absolute sep_token_id=50282 tie_word_embeddings=true torch_dtype=float32
        transformers_version=4.47.0.dev0 vocab_size=50368""",
    "TinyLlama-1.1B-Chat": """architectures attention_bias=false bos_token_id=1 eos_token_id=2 hidden_act=silu hidden_size=2048
        initializer_range=0.02 intermediate_size=5632 max_position_embeddings=2048 model_type=llama num_attention_heads=32
        num_hidden_layers=22 num_key_value_heads=4 pretraining_tp=1 rms_norm_eps=1e-05 rope_scaling=null rope_theta=10000.0
        tie_word_embeddings=false torch_dtype=bfloat16 transformers_version=4.35.0 use_cache=true vocab_size=32000""",
    "SmolLM2-135M": """architectures attention_bias=false attention_dropout=0.0 bos_token_id=0 eos_token_id=0 hidden_act=silu
        hidden_size=576 initializer_range=0.041666666666666664 intermediate_size=1536 is_llama_config=true
        max_position_embeddings=8192 mlp_bias=false model_type=llama num_attention_heads=9 num_hidden_layers=30
        num_key_value_heads=3 pretraining_tp=1 rms_norm_eps=1e-05 rope_interleaved=false rope_scaling=null rope_theta=100000
        tie_word_embeddings=true torch_dtype=bfloat16 transformers_version=4.40.1 use_cache=true vocab_size=49152""",
    "Qwen2.5-0.5B": """architectures attention_dropout=0.0 bos_token_id=151643 eos_token_id=151643 hidden_act=silu hidden_size=896
        initializer_range=0.02 intermediate_size=4864 max_position_embeddings=32768 max_window_layers=24 model_type=qwen2
        num_attention_heads=14 num_hidden_layers=24 num_key_value_heads=2 rms_norm_eps=1e-06 rope_theta=1000000.0 sliding_window=32768
        tie_word_embeddings=true torch_dtype=bfloat16 transformers_version=4.40.1 use_cache=true use_mrope=false
        use_sliding_window=false vocab_size=151936""",
    "Llama-3.2-1B": """architectures attention_bias=false attention_dropout=0.0 bos_token_id=128000 eos_token_id=128001 head_dim=64
        hidden_act=silu hidden_size=2048 initializer_range=0.02 intermediate_size=8192 max_position_embeddings=131072 mlp_bias=false
        model_type=llama num_attention_heads=32 num_hidden_layers=16 num_key_value_heads=8 pretraining_tp=1 rms_norm_eps=1e-05
        rope_scaling={"factor":32.0,"high_freq_factor":4.0,"low_freq_factor":1.0,"original_max_position_embeddings":8192,"rope_type":"llama3"}
        rope_theta=500000.0 tie_word_embeddings=true torch_dtype=bfloat16 transformers_version=4.45.0.dev0 use_cache=true
        vocab_size=128256""",
    "Qwen3-0.6B": """architectures attention_bias=false attention_dropout=0.0 bos_token_id=151643 eos_token_id=151645 head_dim=128
        hidden_act=silu hidden_size=1024 initializer_range=0.02 intermediate_size=3072 max_position_embeddings=40960
        max_window_layers=28 model_type=qwen3 num_attention_heads=16 num_hidden_layers=28 num_key_value_heads=8 rms_norm_eps=1e-06
        rope_scaling=null rope_theta=1000000 sliding_window=null tie_word_embeddings=true torch_dtype=bfloat16
        transformers_version=4.51.0 use_cache=true use_sliding_window=false vocab_size=151936""",
    "Mistral-7B-v0.1": """architectures bos_token_id=1 eos_token_id=2 hidden_act=silu hidden_size=4096 initializer_range=0.02
        intermediate_size=14336 max_position_embeddings=32768 model_type=mistral num_attention_heads=32 num_hidden_layers=32
        num_key_value_heads=8 rms_norm_eps=1e-05 rope_theta=10000.0 sliding_window=4096 tie_word_embeddings=false
        torch_dtype=bfloat16 transformers_version=4.34.0.dev0 use_cache=true vocab_size=32000""",
    "SmolLM3-3B": """architectures attention_bias=false attention_dropout=0.0 bos_token_id=128000 eos_token_id=128012 hidden_act=silu
        hidden_size=2048 initializer_range=0.02 intermediate_size=11008 max_position_embeddings=65536 max_window_layers=28
        mlp_bias=false model_type=smollm3 no_rope_layer_interval=4 no_rope_layers=[1,1,1,0] num_attention_heads=16 num_hidden_layers=4
        num_key_value_heads=4 pad_token_id=128004 pretraining_tp=2 rms_norm_eps=1e-06 rope_scaling=null rope_theta=5000000.0
        sliding_window=null torch_dtype=bfloat16 transformers_version=4.54.0.dev0 use_cache=false use_sliding_window=false
        vocab_size=128256 layer_types=["full_attention","full_attention","full_attention","full_attention"]""",
    "gemma-3-270m": """_sliding_window_pattern=6 architectures attention_bias=false attention_dropout=0.0 attn_logit_softcapping=null
        bos_token_id=2 eos_token_id=1 final_logit_softcapping=null head_dim=256 hidden_activation=gelu_pytorch_tanh hidden_size=640
        initializer_range=0.02 intermediate_size=2048 layer_types=["sliding_attention","full_attention"] max_position_embeddings=32768
        model_type=gemma3_text num_attention_heads=4 num_hidden_layers=2 num_key_value_heads=1 pad_token_id=0
        query_pre_attn_scalar=256 rms_norm_eps=1e-06 rope_local_base_freq=10000.0 rope_scaling=null rope_theta=1000000.0
        sliding_window=512 torch_dtype=bfloat16 transformers_version=4.55.0.dev0 use_bidirectional_attention=false use_cache=true
        vocab_size=262144""",
    "gemma-3-1b-it": """architectures attention_bias=false attention_dropout=0.0 attn_logit_softcapping=null bos_token_id=2
        cache_implementation=hybrid eos_token_id=[1,106] final_logit_softcapping=null head_dim=256 hidden_activation=gelu_pytorch_tanh
        hidden_size=1152 initializer_range=0.02 intermediate_size=6912 max_position_embeddings=32768 model_type=gemma3_text
        num_attention_heads=4 num_hidden_layers=26 num_key_value_heads=1 pad_token_id=0 query_pre_attn_scalar=256 rms_norm_eps=1e-06
        rope_local_base_freq=10000 rope_scaling=null rope_theta=1000000 sliding_window=512 sliding_window_pattern=6
        torch_dtype=bfloat16 transformers_version=4.50.0.dev0 use_cache=true vocab_size=262144""",
}


def parsed(text):
    raw = {}
    for item in text.split():
        name, _, value = item.partition("=")
        try:
            raw[name] = json.loads(value or "null")
        except json.JSONDecodeError:
            raw[name] = value
    return raw


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_accepted_silently(name, capsys):
    raw = parsed(PUBLISHED[name])
    CLASSES[raw["model_type"]].from_json(raw, "config.json")
    assert capsys.readouterr() == ("", "")


def test_an_unknown_field_is_named_in_one_line(capsys):
    BertConfig.from_json({"use_magic": 3, "layer_scale": [1]}, "here.json")
    assert capsys.readouterr().err == "here.json: unknown, and without effect: layer_scale, use_magic.\n"


def _longrope(short, long):
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gpt2", {"is_causal": False}, "is_causal False"),
        ("llama", {"is_causal": False}, "is_causal False"),
        ("qwen2", {"is_causal": None}, "is_causal None"),
        ("gpt2", {"n_head": 2, "num_attention_heads": 3}, "num_attention_heads is 3, but n_head, .* is 2"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("bert", {"is_decoder": True}, "is_decoder True"),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("bert", {"problem_type": "multi_label_classification"}, "problem_type"),
        ("bert", {"pad_token_id": 30522}, "pad_token_id 30522 is no row"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved True"),
        ("roberta", {"is_decoder": True}, "is_decoder True"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types must be 22 of"),
        ("modernbert", {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, "layer_types must be 1 of"),
        ("modernbert", {"global_attn_every_n_layers": 0}, "global_attn_every_n_layers must be a positive integer"),
        ("modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rotary settings .*linear"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rotary settings .*yarn"),
        ("modernbert", {"rope_parameters": {"rope_type": "default"}}, "rotary settings"),
        ("modernbert", {"classifier_pooling": "max"}, "pooling is 'max'; supported: cls, mean"),
        ("modernbert", {"hidden_activation": "silu"}, "hidden_act is 'silu'"),
        ("modernbert", {"hidden_size": 36}, "a head has 3 features"),
        ("roberta", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("distilbert", {"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05; supported: no such field"),
        ("distilbert", {"n_heads": 2, "num_attention_heads": 3}, "num_attention_heads"),
        ("llama", {"no_rope_layers": [1]}, "a llama has no no_rope_layers"),
        ("mistral", {"attention_bias": True}, "a mistral has no attention_bias"),
        ("mistral", {"layer_types": [FULL, SLIDING]}, "layer_types .* supported: sliding_attention"),
        ("qwen3", {"layer_types": [SLIDING] * 32}, "some layers are of type sliding_attention, but there is no sliding_window"),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 32}, "a list of 32, each full_attention or"),
        ("qwen3", {"layer_types": [FULL] * 31}, "a list of 32"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 numbers for 36 layers"),
        ("smollm3", {"mlp_bias": 1}, "mlp_bias must be true or false"),
        ("gemma3_text", {"sliding_window": None}, "no sliding_window"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters .*supported: full_attention"),
        ("gemma3_text", {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}}, "without scaling"),
        ("llama", {"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, "rope_scaling .*mrope.*supported: rope_type default, linear"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "alpha": 3}}, "type linear does not have alpha"),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "type yarn lacks factor"),
        ("llama", {"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "gives no finite frequencies"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}, "must be above"),
        ("llama", {"rope_scaling": _longrope([1.0, 2.0], [1.0, 3.0])}, "longrope is supported where short_factor and long_factor"),
        ("llama", {"rope_scaling": _longrope([1.0, 2.0], [1.0, 2.0])}, "short_factor has 2 numbers; a head of 128 features needs 64"),
        ("llama", {"rope_scaling": _longrope(2.0, 2.0)}, "short_factor is 2.0, which does not fit"),
    ],
)
def test_fields_that_would_change_the_result_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=f"here.json.*{message}"):
        CLASSES[kind].from_json({"model_type": kind, **change}, "here.json")


def test_gpt2_accepts_the_aliases_of_transformers(tmp_path):
    folder = oracle.write_checkpoint("gpt2", tmp_path / "m")
    ids, _, offsets = oracle.batch("gpt2")
    expected = ml.load_model(folder, "numpy").forward(ids, keep=False, offsets=offsets)[0]
    raw = read_json(folder / "config.json")
    for name, field in (("hidden_size", "n_embd"), ("num_attention_heads", "n_head"), ("num_hidden_layers", "n_layer")):
        raw[name] = raw.pop(field)
    write_json(folder / "config.json", raw)
    np.testing.assert_array_equal(ml.load_model(folder, "numpy").forward(ids, keep=False, offsets=offsets)[0], expected)


# -- bad values -------------------------------------------------------------------------------------------------------------------

VALUES = [None, True, -1, 0, 1.5, 1e30, "x", [], {}, [1], {"a": [{"b": 1}]}, 10**30, float("nan")]


def folder_of(kind, folder):
    if kind in VARIANTS:
        config = LlamaConfig(model_type=kind, sliding_window=3 if kind in ("mistral", "gemma3_text") else None, **SMALL[kind])
        ml.save_model(ml.Llama(config, rng=0), folder)
        write_json(folder / "config.json", {**read_json(folder / "config.json"), "attention_dropout": 0.0, "rope_scaling": None})
        return folder
    if kind in ("roberta", "distilbert", "modernbert"):
        config = CLASSES[kind].from_json({"model_type": kind, **SMALL[kind], "pad_token_id": 1, "num_labels": 3})
        ml.save_model(ml.BertClassifier(config, rng=0), folder)
        return folder
    return oracle.write_checkpoint(kind, folder, "float32", num_labels=3) if kind == "bert" else oracle.write_checkpoint(kind, folder)


def is_refused(load, folder, what):
    """Whether loading fails with one line that names the file; otherwise the logits must be finite."""
    try:
        model = load()
    except ValueError as error:
        error_text = str(error)
    else:
        assert np.isfinite(model.forward(IDS[:4] % 5, keep=False)[0]).all(), what
        return False
    assert str(folder) in error_text, what
    assert "\n" not in error_text, what
    return True


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "qwen3", "smollm3", "gemma3_text", "roberta", "distilbert", "modernbert"])
def test_any_value_of_any_field_is_refused_or_runs(kind, tmp_path):
    folder = folder_of(kind, tmp_path / "m")
    raw = read_json(folder / "config.json")
    extra = {"is_causal", "layer_types", "rope_parameters", "num_labels", "pad_token_id", "n_inner", "quantization_config", "head_dim"}
    refused = 0
    for name in sorted(raw.keys() | extra):
        for value in VALUES:
            (folder / "config.json").write_text(json.dumps({**raw, name: value}))
            refused += is_refused(lambda: ml.load_model(folder, "numpy"), folder, (name, value))
    assert refused > 100


@pytest.mark.parametrize("kind", CLASSES)
def test_any_value_in_a_file_with_few_fields_is_refused_or_read_at_once(kind):
    """What one field says may decide the default of another, such as a list with an item for each layer."""
    refused, began = [], time.process_time()
    for field in fields(CLASSES[kind]):
        for value in [*VALUES, 2**30]:
            try:
                CLASSES[kind].from_json({"model_type": kind, **SMALL[kind], field.name: value}, "here.json")
            except ValueError as error:
                refused.append(str(error))
    assert len(refused) > 50
    assert [text for text in refused if not text.startswith("here.json")] == []
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_any_value_of_any_rotary_setting_is_refused_or_finite(kind, name):
    length = {"original_max_position_embeddings": 512}
    settings = {
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **length},
        "yarn": {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": True, **length},
        "longrope": {"short_factor": [1.0] * 2, "long_factor": [1.0] * 2, "factor": 2.0, **length},
    }
    refused = 0
    for rope_type, options in settings.items():
        for key in ("rope_theta", "rope_type", "type", "attention_factor", *options):
            for value in (*VALUES, 1e-30, 1, 5, [0.5, 2.0], [1.0, "a"], 0.5):
                rope = {"rope_type": rope_type, **options, key: value}
                rope = {FULL: rope} if kind == "gemma3_text" and name == "rope_parameters" else rope
                raw = {"model_type": kind, **SMALL[kind], "sliding_window": 3, "head_dim": 4, name: rope}
                message = ""
                try:
                    config = LlamaConfig.from_json(raw, "here.json")
                except ValueError as error:
                    message = str(error)
                if message:
                    assert message.startswith("here.json")
                    refused += 1
                    continue
                frequencies, factor = config.frequencies(FULL)
                assert np.isfinite(frequencies).all(), raw
                assert np.isfinite(factor), raw
    assert refused > 100


@pytest.mark.parametrize("what", ["lora", "dora", "vera", "bottleneck", "partial"])
def test_any_value_of_any_field_of_an_adapter_is_refused_or_runs(what, tmp_path):
    config = {
        "lora": ml.LoraConfig(r=2, target_modules=["c_attn"], rank_pattern={"h.0.attn.c_attn": 1}, task_type="CAUSAL_LM"),
        "dora": ml.LoraConfig(r=2, use_dora=True),
        "vera": ml.VeraConfig(r=4),
        "bottleneck": ml.BottleneckConfig(reduction_factor=3),
        "partial": ml.PartialConfig(train=["norm"], modules_to_save=["ln_f"]),
    }[what]
    small = ml.GPT2Config(**SMALL["gpt2"])
    model = ml.GPT2(small, rng=0)
    ml.inject(model, config, rng=0)
    ml.save_adapter(model, tmp_path)
    raw = read_json(tmp_path / "adapter_config.json")
    extra = {"lora_dropout", "layers_to_transform", "layers_pattern", "exclude_modules", "alpha_pattern", "use_rslora", "init_lora_weights"}
    refused = 0
    for name in sorted(raw.keys() | extra):
        for value in VALUES:
            if (name, value) in (("lora_alpha", 1e30), ("lora_alpha", 10**30)):
                continue  # these values are valid
            (tmp_path / "adapter_config.json").write_text(json.dumps({**raw, name: value}))
            model = ml.GPT2(small, rng=0)
            refused += is_refused(lambda model=model: (ml.load_adapter(model, tmp_path), model)[1], tmp_path, (name, value))
    assert refused > 50


def test_a_missing_alpha_is_an_error(tmp_path):
    model = ml.GPT2(ml.GPT2Config(**SMALL["gpt2"]), rng=0)
    ml.inject(model, ml.LoraConfig(r=2), rng=0)
    ml.save_adapter(model, tmp_path)
    write_json(tmp_path / "adapter_config.json", {**read_json(tmp_path / "adapter_config.json"), "lora_alpha": None})
    with pytest.raises(ValueError, match=r"adapter_config.json: lora_alpha must be a number, got None"):
        ml.load_adapter(ml.GPT2(ml.GPT2Config(**SMALL["gpt2"]), rng=0), tmp_path)


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "n_inner", "vocab_size", "n_head"])
def test_sizes_beyond_the_file_are_refused_before_building(name, tmp_path):
    folder = oracle.write_checkpoint("gpt2", tmp_path / "m")
    size = make_models.CONFIGS["gpt2"]["n_head"] * 10**8
    write_json(folder / "config.json", {**read_json(folder / "config.json"), name: size})
    began = time.perf_counter()
    with pytest.raises(ValueError, match=rf"config.json.*{name} (is )?{size}"):
        ml.load_model(folder, "numpy")
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    "content",
    [b'{"a": ' + b"1" * 4301 + b"}", b"[" * 10**5 + b"]" * 10**5, b'"\xff"', b"\xef\xbb\xbf{}", b"", b"3"],
    ids=["digits", "nested", "not UTF-8", "with a mark", "empty", "a number"],
)
def test_invalid_json_is_refused_by_name(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json (is not valid JSON|must hold a JSON object)") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)
