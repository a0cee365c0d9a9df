"""GGUF files of encoders, written as llama.cpp's converter writes them: hidden states, heads, tokenizers, runs, and broken files."""

import json
from itertools import pairwise

import numpy as np
import oracle
import pytest
import tokenizers
from safetensors.numpy import load_file
from small_tokenizers import CHARSMAP, WORDS, bert_wordpiece, modernbert_bpe, roberta_bpe, write_tokenizer, xlm_roberta_normalized

import minilora as ml
from minilora.cli import main
from minilora.formats.atomic import read_json
from minilora.formats.fetch import model_type_of
from minilora.formats.gguf import read_gguf, read_gguf_tokenizer
from minilora.formats.tokenizer import gguf_tokenizer, load_tokenizer
from minilora.models.registry import ARCHITECTURES

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'minilora[gguf]'")
Type, Control = gguf.GGMLQuantizationType, gguf.TokenType.CONTROL

NAMES = ["dish", "none", "tale"]
IDS, OFFSETS = np.array([5, 9, 13, 6, 7, 40, 11, 5, 8, 30, 31, 32, 33, 34, 35, 36, 37, 12]), [0, 5, 6, 18]
SIZES = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 35, "max_position_embeddings": 17}
ROBERTA = {"max_position_embeddings": 19, "layer_norm_eps": 1e-5, "type_vocab_size": 1}
CONFIGS = {
    "bert": {"pad_token_id": 0},
    "roberta": {**ROBERTA, "pad_token_id": 1},
    "xlm-roberta": {**ROBERTA, "pad_token_id": 1, "type_vocab_size": 2},
    "distilbert": {"pad_token_id": 0},
    "modernbert": {"pad_token_id": 0, "num_hidden_layers": 4, "local_attention": 5, "pooling": "mean", "global_rope_theta": 500.0},
}
_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MARKS = {f"{name}_token": mark for name, mark in zip(("pad", "unk", "cls", "sep", "mask"), _WORDS, strict=True)}
_XLM = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>"}
_XLM["mask_token"] = {"__type": "AddedToken", "content": "<mask>", "lstrip": True}
TOKENIZERS = {
    "bert": (bert_wordpiece, {"tokenizer_class": "BertTokenizer", **_MARKS}, "bert-bge"),
    "roberta": (roberta_bpe, {"tokenizer_class": "RobertaTokenizer", **_XLM}, "roberta-bpe"),
    "xlm-roberta": (xlm_roberta_normalized, {"tokenizer_class": "XLMRobertaTokenizer", **_XLM}, "default"),
    "distilbert": (lambda: bert_wordpiece(False), {"tokenizer_class": "DistilBertTokenizer", "do_lower_case": False, **_MARKS}, "bert-bge"),
    "modernbert": (modernbert_bpe, {"tokenizer_class": "PreTrainedTokenizerFast", **_MARKS}, "modern-bert"),
}


def make(folder, kind, **options):
    """The folder of a random encoder with a classifier, and its tokenizer."""
    library, settings, _ = TOKENIZERS[kind]
    write_tokenizer(folder, library(), settings)
    sizes = SIZES | {"vocab_size": library().get_vocab_size() + 3, "num_labels": 3, "id2label": dict(enumerate(NAMES))}
    config = ARCHITECTURES[kind].config(model_type=kind, **sizes | CONFIGS[kind] | options)
    model, rng = ml.BertClassifier(config, rng=0), np.random.default_rng(1)
    for path, p in model.parameters():
        p.data = (p.data + 0.2 * rng.standard_normal(p.data.shape)).astype("float32")
        if "position" in path and config.counts_from_padding:
            p.data[config.pad_token_id] = 0
    ml.save_model(model, folder)
    return folder


def write(path, folder, kinds=(), meta=(), leave_out=(), more=(), renamed=lambda name, value: [(name, value)]):
    """The file that conversion/bert.py of llama.cpp makes of a folder. kinds: {part of a published name: Type}; meta: replaces metadata."""
    c, weights = read_json(folder / "config.json"), load_file(folder / "model.safetensors")
    kind = c["model_type"]
    modern, counts = kind == "modernbert", "roberta" in kind
    a = "modern-bert" if modern else "bert"
    writer, labels = gguf.GGUFWriter(path, a), c.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    labels = None if len(labels) == 2 and labels["0"] == "LABEL_0" else list(labels.values())
    offset = c["pad_token_id"] + 1 if counts else 0
    depth = c.get("num_hidden_layers", c.get("n_layers"))
    values = {
        f"{a}.block_count": depth,
        f"{a}.context_length": c["max_position_embeddings"] - offset,
        f"{a}.embedding_length": c.get("hidden_size", c.get("dim")),
        f"{a}.feed_forward_length": c.get("intermediate_size", c.get("hidden_dim")),
        f"{a}.attention.head_count": c.get("num_attention_heads", c.get("n_heads")),
        f"{a}.attention.layer_norm_rms_epsilon": c.get("norm_eps"),
        f"{a}.attention.layer_norm_epsilon": 1e-12 if kind == "distilbert" else c.get("layer_norm_eps"),
        f"{a}.attention.causal": False,
        f"{a}.pooling_type": None if modern else 1,
        f"{a}.classifier.output_labels": labels,
        f"{a}.attention.sliding_window": c.get("local_attention"),
        f"{a}.rope.freq_base": c.get("global_rope_theta"),
        f"{a}.rope.freq_base_swa": c.get("local_rope_theta"),
        f"{a}.rope.scaling.type": "none" if modern else None,
        f"{a}.vocab_size": c["vocab_size"] if modern else None,
        f"{a}.hidden_activation": "gelu" if modern else None,
        **vocabulary(writer, folder, c["vocab_size"], kind, c.get("type_vocab_size", 1)),
        **dict(meta),
    }
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for name, value in values.items():
        if value is not None and not (isinstance(value, list) and not value):
            add.get(type(value), writer.add_array)(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MODERN_BERT if modern else gguf.MODEL_ARCH.BERT, depth)
    for name, value in [*weights.items(), *dict(more).items()]:
        bare = name.removeprefix(ARCHITECTURES[kind].prefix)
        if name in leave_out or bare.startswith(("pooler.dense", "embeddings.position_ids")):
            continue
        if bare == "embeddings.position_embeddings.weight":
            value = value[offset:]
        if labels and bare in ("classifier.weight", "classifier.bias"):
            bare = bare.replace("classifier", "classifier.out_proj")
        stored = names.get_name(bare, try_suffixes=(".weight", ".bias")) or bare
        quantized = next((t for part, t in dict(kinds).items() if part in name), Type.F32)
        for new, part in renamed(stored, value):
            writer.add_tensor(new, gguf.quantize(np.ascontiguousarray(part), quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(writer, folder, size, kind, token_types):
    """The metadata of the tokenizer in a folder; the special tokens are added to the file."""
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw, added = json.loads(library.to_str()), library.get_added_tokens_decoder()
    tokens = [library.id_to_token(i) or f"[PAD{i}]" for i in range(size)]
    unused = [library.id_to_token(i) is None for i in range(size)]
    types = [5 if unused[i] else 1 if i not in added else 3 if added[i].special else 4 for i in range(size)]
    found = {"pre": TOKENIZERS[kind][2], "token_type": types, "token_type_count": token_types}
    if kind == "xlm-roberta":
        n = len(raw["model"]["vocab"])
        tokens = [token if i < n else f"[PAD{i}]" for i, token in enumerate(tokens)]
        types[:] = [5 if i >= n else 2 if token == "<unk>" else types[i] for i, token in enumerate(tokens)]
        found |= {"model": "t5", "scores": [raw["model"]["vocab"][i][1] if i < n else -1e4 for i in range(size)]}
        found |= {"add_space_prefix": True, "remove_extra_whitespaces": False, "precompiled_charsmap": CHARSMAP}
    elif kind in ("bert", "distilbert"):
        tokens = [token if types[i] == 3 else token[2:] if token.startswith("##") else "\u2581" + token for i, token in enumerate(tokens)]
        found["model"] = "bert"
    else:
        found["model"] = "gpt2"
    found["tokens"] = tokens
    if kind == "modernbert":
        for name in ("bos", "eos", "sep"):
            getattr(writer, f"add_add_{name}_token")(True)
    gguf.SpecialVocab(folder, load_merges=found["model"] == "gpt2", n_vocab=size).add_to_gguf(writer, quiet=True)
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}


def hidden(model):
    return ml.to_numpy(model.body.forward(IDS, keep=False, offsets=OFFSETS)[0])


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_model_is_that_of_its_folder(kind, tmp_path, capsys):
    source = ml.load_model(make(tmp_path / "m", kind), "numpy")
    model = ml.load_model(write(tmp_path / "m.gguf", tmp_path / "m"), "numpy")
    said = capsys.readouterr().err
    assert said == (
        f"{tmp_path}/m.gguf has no bert.pooler.dense: initialised at random, to be trained or loaded.\n" if kind == "bert" else ""
    )
    assert model_type_of(str(tmp_path / "m.gguf")) == kind
    if kind == "modernbert":  # the file has a list, the folder a period
        assert model.config.layer_types == list(map(source.config.kind, range(4)))
        model.config.layer_types = source.config.layer_types
    assert model.config == source.config
    ours = dict(model.parameters())
    for path, p in source.parameters():
        value = p.data.copy()
        if "position_embeddings" in path and source.config.counts_from_padding:
            value[0] = 0  # pad_token_id is 1: row 0 is never read
        if path.startswith("bert.pooler"):
            ours[path].data = value
        np.testing.assert_array_equal(ours[path].data, value, err_msg=path)
    np.testing.assert_array_equal(hidden(model), hidden(source))
    logits = [m.forward(IDS, keep=False, offsets=OFFSETS)[0] for m in (model, source)]
    assert oracle.deviation(*logits) < 2e-6


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("stored", [Type.F32, Type.F16, Type.Q8_0], ids=["F32", "F16", "Q8_0"])
def test_hidden_states_and_logits_are_those_of_transformers(kind, stored, tmp_path):
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"the oracle {package} is not installed: pip install 'minilora[oracle]'")
    import torch
    import transformers

    folder, options = tmp_path / "m", {"hidden_size": 96, "intermediate_size": 64} if stored == Type.Q8_0 else {}
    make(folder, kind, **options)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    kinds = {path: stored for path, p in theirs.named_parameters() if p.ndim == 2 and "position" not in path and "token_type" not in path}
    with torch.no_grad():
        for path, p in theirs.named_parameters():
            if path in kinds:
                p.copy_(torch.tensor(gguf.dequantize(gguf.quantize(p.numpy(), stored), stored)))
    model = ml.load_model(write(tmp_path / "m.gguf", folder, kinds), "numpy")
    for path, p in model.parameters():
        if path.startswith("bert.pooler"):  # not in the file
            p.data = dict(theirs.named_parameters())[path].detach().numpy().T
    expected = []
    with torch.no_grad():
        for first, last in pairwise(OFFSETS):
            ids = torch.tensor(IDS[first:last])[None]
            expected.append((theirs.base_model(ids).last_hidden_state[0].numpy(), theirs(ids).logits.numpy()))
    states, logits = (np.concatenate(parts) for parts in zip(*expected, strict=True))
    assert oracle.deviation(hidden(model), states) < 1e-5
    assert oracle.deviation(model.forward(IDS, keep=False, offsets=OFFSETS)[0], logits) < 1e-5


# -- what files may have besides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_fused_queries_keys_and_values(kind, tmp_path):
    """Earlier converters write them so, and llama.cpp reads both."""
    make(tmp_path / "m", kind)
    parts = {}

    def fused(name, value):
        if not any(f"attn_{x}." in name for x in "qkv"):
            return [(name, value)]
        parts[name] = value
        names = [name.replace(f"attn_{x}.", f"attn_{y}.") for y in "qkv" for x in "qkv" if f"attn_{x}." in name]
        whole = [parts[each] for each in names if each in parts]
        return [(names[0].replace("attn_q", "attn_qkv"), np.concatenate(whole))] if len(whole) == 3 else []

    _, apart = read_gguf(write(tmp_path / "a.gguf", tmp_path / "m"))
    _, together = read_gguf(write(tmp_path / "b.gguf", tmp_path / "m", renamed=fused))
    assert apart.keys() == together.keys()
    for name, value in apart.items():
        np.testing.assert_array_equal(value, together[name], err_msg=name)


def test_heads_that_a_file_may_have(tmp_path, capsys):
    """None; one without names of its classes, which is called cls; dense layers beside it, from other converters; a regression."""
    make(tmp_path / "m", "bert", num_labels=2, id2label=None)
    source, weights = ml.load_model(tmp_path / "m", "numpy"), load_file(tmp_path / "m" / "model.safetensors")
    dense = {f"cls.{x}": weights[f"bert.pooler.dense.{x}"] for x in ("weight", "bias")}
    out = {f"cls.output.{x}": weights[f"classifier.{x}"] for x in ("weight", "bias")}
    classes = [f"classifier.{x}" for x in ("weight", "bias")]
    model = ml.load_model(write(tmp_path / "a.gguf", tmp_path / "m"), "numpy")
    assert model.origin.drawn == ("bert.pooler.dense",)
    np.testing.assert_array_equal(model.classifier.weight.data, source.classifier.weight.data)
    model = ml.load_model(write(tmp_path / "b.gguf", tmp_path / "m", leave_out=classes, more=dense | out), "numpy")
    assert not model.origin.drawn
    assert oracle.deviation(*(m.forward(IDS, keep=False, offsets=OFFSETS)[0] for m in (model, source))) < 2e-6
    capsys.readouterr()
    model = ml.load_model(write(tmp_path / "c.gguf", tmp_path / "m", leave_out=classes), "numpy", labels=["x", "y", "z"])
    assert "c.gguf has no bert.pooler.dense and no classifier: initialised at random" in capsys.readouterr().err
    assert model.config.class_names == ["x", "y", "z"]
    make(tmp_path / "r", "roberta", num_labels=1, id2label={0: "LABEL_0"})
    model = ml.load_model(write(tmp_path / "r.gguf", tmp_path / "r"), "numpy")
    assert model.config.regression
    assert not model.origin.drawn


@pytest.mark.parametrize(
    ("meta", "layers", "window"),
    [
        ({}, "GLLG", 3),
        ({"attention.sliding_window_pattern": 2}, "GLGL", 3),
        ({"attention.sliding_window_pattern": [True, False, False, True]}, "LGGL", 3),
        ({"attention.sliding_window_pattern": 1}, "GGGG", 3),
        ({"attention.sliding_window_pattern": 0, "attention.sliding_window": 8}, "LLLL", 5),
        ({"attention.sliding_window": None}, "GGGG", 65),
        ({"rope.freq_base": None, "rope.freq_base_swa": None}, "GLLG", 3),
    ],
)
def test_local_layers_are_those_of_llama_cpp(meta, layers, window, tmp_path):
    path = write(tmp_path / "m.gguf", make(tmp_path / "m", "modernbert"), meta={f"modern-bert.{name}": x for name, x in meta.items()})
    c = ml.load_model(path, "numpy").config
    assert c.pooling == "mean"
    assert "".join("L" if "sliding" in c.kind(i) else "G" for i in range(c.num_hidden_layers)) == layers
    assert c.local_attention // 2 + 1 == window
    assert (c.global_rope_theta, c.local_rope_theta) == (10000.0 if "rope.freq_base" in meta else 500.0, 10000.0)


def test_a_head_reads_what_newer_files_say(tmp_path):
    meta = {"modern-bert.classifier.pooling_type": 2}
    model = ml.load_model(write(tmp_path / "m.gguf", make(tmp_path / "m", "modernbert", pooling="cls"), meta=meta), "numpy")
    source = ml.load_model(tmp_path / "m", "numpy")
    np.testing.assert_array_equal(*(m.forward(IDS, keep=False, offsets=OFFSETS)[0] for m in (model, source)))


# -- tokenizers ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_token_ids_are_those_of_the_folder_and_of_transformers(kind, tmp_path):
    path = write(tmp_path / "m.gguf", make(tmp_path / "m", kind))
    ml.save_model(ml.load_model(path, "numpy"), tmp_path / "saved")
    readers = [load_tokenizer(where, None) for where in (path, tmp_path / "m", tmp_path / "saved")]
    rng, marks = np.random.default_rng(0), [*_MARKS.values(), "<s>", "</s>", "<unk>", "<pad>", "<mask>", " <mask>", " [MASK] "]
    letters = [*"the catsnmo,ïHW☃日本 \n\t.'12ＡﬁÀ", "e\u0301", "\u3000", "\xa0", "…", "##", "\u2581", "   ", *marks, "the ", "World"]
    texts = ["".join(rng.choice(letters, n)) for n in rng.integers(0, 40, 400)] + [*WORDS[:2], *marks, "", " ", "x" * 120]
    expected = [readers[1].encode(text).tolist() for text in texts]
    for reader in readers:
        assert [reader.encode(text).tolist() for text in texts] == expected
        assert [reader.encode(text, add_special=False).tolist() for text in texts] == [ids[1:-1] for ids in expected]
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'")
    for folder in ("m", "saved"):
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / folder)(texts)["input_ids"] == expected, folder
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token == readers[1].special_tokens["pad_token"]


def test_the_first_token_has_another_name_in_older_files(tmp_path):
    rows, vocabulary = read_gguf_tokenizer(write(tmp_path / "m.gguf", make(tmp_path / "m", "bert")))
    newer = gguf_tokenizer(vocabulary, rows)
    vocabulary["cls_token_id"] = vocabulary.pop("bos_token_id")
    assert gguf_tokenizer(vocabulary, rows).encode("the cat").tolist() == newer.encode("the cat").tolist()


@pytest.mark.parametrize(("lowercase", "accents"), [(True, None), (False, True), (True, False)])
def test_what_newer_files_say_of_wordpiece(lowercase, accents, tmp_path):
    make(tmp_path / "m", "distilbert")  # of which the vocabulary has capitals
    said = {"tokenizer.ggml.normalizer.lowercase": lowercase, "tokenizer.ggml.normalizer.strip_accents": accents}
    path, settings = write(tmp_path / "m.gguf", tmp_path / "m", meta=said), read_json(tmp_path / "m" / "tokenizer_config.json")
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps({**settings, "do_lower_case": lowercase, "strip_accents": accents}))
    for text in ("The Cat", "naïve HÉLLO World"):
        assert load_tokenizer(path, None).encode(text).tolist() == load_tokenizer(tmp_path / "m", None).encode(text).tolist()


def test_a_mask_that_the_converter_leaves_out(tmp_path):
    """sentencepiece.bpe.model has none: its id is unused in the file, and named as the token of masks."""
    make(tmp_path / "m", "xlm-roberta")
    vocab = tokenizers.Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json")).get_vocab()
    tokens = [*sorted(vocab, key=vocab.get), "[PAD1]", "[PAD2]", "[PAD3]"]
    mask = tokens.index("<mask>")
    types = [3, 3, 3, 2, *[1] * (mask - 4), *[5] * (len(tokens) - mask)]
    meta = {"tokenizer.ggml.tokens": [*tokens[:mask], "[PAD0]", *tokens[mask + 1 :]], "tokenizer.ggml.token_type": types}
    read = load_tokenizer(write(tmp_path / "m.gguf", tmp_path / "m", meta=meta), None)
    assert read.encode("the <mask> cat").tolist() == load_tokenizer(tmp_path / "m", None).encode("the <mask> cat").tolist()


# -- runs ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    """`run(*argv)` returns the JSON object that a verb prints, `run(*argv, fails=True)` its error."""

    def run(*argv, fails=False):
        status = main([*argv, "--json"])
        out, err = capsys.readouterr()
        assert (status != 0) == fails, err
        return err if fails else json.loads(out)

    return run


FILMS = [("The soup was salty.", "dish"), ("He left the town at night.", "tale"), ("12 12 12", "none"), ("the cat sat on the mat", "tale")]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("headless", [False, True], ids=["its head", "a new head"])
def test_a_classifier_is_trained_measured_and_merged(kind, headless, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = load_file(make(tmp_path / "m", kind) / "model.safetensors")
    names = [name for name in weights if headless and name.startswith(("classifier.", "pre_classifier.", "head."))]
    write(tmp_path / "m.gguf", tmp_path / "m", leave_out=names, meta={f"{'modern-' * (kind == 'modernbert')}bert.pooling_type": 2})
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in FILMS * 8))
    options = ["--rank", "2", "--steps", "2", "--backend", "numpy", "--window", "16"]
    result = run("finetune", "--model", "m.gguf", "--data", "d.jsonl", "--task", "classify", *options, "--out", "run")
    assert result["headline"] == "accuracy"
    measured = run("evaluate", "run", "--data", "d.jsonl", "--all")
    run("merge", "run", "--out", "merged")
    assert sorted(read_json(tmp_path / "merged" / "config.json")["id2label"].values()) == NAMES
    again = run("evaluate", "merged", "--data", "d.jsonl", "--all", "--window", "16")
    assert again["loss"] == pytest.approx(measured["loss"], abs=1e-5)
    assert run("info", "m.gguf")["model_type"] == kind


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_move_between_a_file_and_its_folder(kind, tmp_path):
    """The head is in the adapter, and so is BERT's pooler, which was drawn at random, where the file was the base. The folder's is not."""
    path = write(tmp_path / "m.gguf", make(tmp_path / "m", kind), kinds={"Wqkv": Type.F16, "query": Type.F16})
    for first, second in ((path, tmp_path / "m"), (tmp_path / "m", path)):
        model = ml.load_model(first, "numpy")
        ml.inject(model, ml.LoraConfig(r=2, init_lora_weights=False, task_type="SEQ_CLS", target_modules=".*(query|q_lin|Wqkv)"), rng=0)
        ml.save_adapter(model, tmp_path / "adapter")
        other = ml.load_model(second, "numpy")
        if kind == "bert" and second == path:
            with pytest.raises(ValueError, match="was made for a base model with other weights"):
                ml.load_adapter(other, tmp_path / "adapter")
            continue
        ml.load_adapter(other, tmp_path / "adapter")
        assert oracle.deviation(*(m.forward(IDS, keep=False, offsets=OFFSETS)[0] for m in (other, model))) < 5e-3


def test_encoders_do_not_generate(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "m.gguf", make(tmp_path / "m", "roberta"))
    (tmp_path / "d.txt").write_text("the cat sat on the mat\n" * 100)
    for verb in (["generate", "m.gguf", "--prompt", "the"], ["finetune", "--model", "m.gguf", "--data", "d.txt", "--out", "run"]):
        assert "m.gguf (BertClassifier)" in (error := run(*verb, fails=True))
        assert "is not a decoder" in error


# -- broken and unsupported files ---------------------------------------------------------------------------------------------------------


def _odd_qkv(name, value):
    return [] if "attn_k." in name or "attn_v." in name else [(name.replace("attn_q.", "attn_qkv."), value[:35])]


_NO_TYPES = ["bert.embeddings.token_type_embeddings.weight"]
BAD = [
    (
        "bert",
        {"leave_out": ["bert.encoder.layer.1.output.dense.bias"]},
        r"lacks 'bert\.encoder\.layer\.1\.output\.dense\.bias' \(1 tensors",
    ),
    ("bert", {"leave_out": ["bert.embeddings.position_embeddings.weight"]}, r"lacks 'bert\.embeddings\.position_embeddings\.weight'"),
    ("roberta", {"leave_out": ["roberta.embeddings.token_type_embeddings.weight"]}, r"lacks 'roberta\.embeddings\.token_type"),
    ("bert", {"leave_out": ["bert.embeddings.word_embeddings.weight"]}, r"lacks the tensor 'token_embd\.weight'"),
    ("bert", {"leave_out": _NO_TYPES, "meta": {"bert.attention.layer_norm_epsilon": 1e-5}}, "it has no token types, as a DistilBERT"),
    ("bert", {"more": {"dense_2.weight": np.ones((4, 36), "f4")}}, r"has a tensor 'dense_2\.weight', which is not part"),
    ("bert", {"more": {"blk.0.attn_qkv.weight": np.ones((108, 36), "f4")}}, r"has a tensor 'blk\.0\.attn_qkv\.weight', which is not"),
    ("bert", {"renamed": _odd_qkv}, r"attn_qkv\.\w+ has 35 rows, not a multiple of 3"),
    ("bert", {"meta": {"bert.block_count": 3}}, r"lacks 'bert\.encoder\.layer\.2\..* \(16 tensors"),
    ("bert", {"meta": {"bert.block_count": 2**31}}, "block_count is 2147483648, but there are 39 tensors"),
    ("bert", {"meta": {"bert.block_count": "two"}}, "block_count is two, but"),
    ("bert", {"meta": {"bert.block_count": 1}}, r"has a tensor 'blk\.1\.\S+', which is not part"),
    ("bert", {"meta": {"bert.embedding_length": 48}}, r"embedding_length is 48, but token_embd\.weight has 36 columns"),
    ("bert", {"meta": {"bert.attention.head_count": 5}}, "hidden_size 36 is not a multiple of num_attention_heads 5"),
    ("bert", {"meta": {"bert.attention.head_count_kv": 1}}, r"there are 3 heads, but attention\.head_count_kv differs"),
    ("bert", {"meta": {"bert.feed_forward_length": 34}}, r"has shape \(36, 35\)|has shape \(35, 36\)|has shape \(35,\)"),
    ("bert", {"meta": {"bert.context_length": 18}}, r"position_embeddings\.weight has shape \(17, 36\), the model expects \(18, 36\)"),
    ("roberta", {"meta": {"bert.context_length": 18}}, r"position_embd\.weight has shape \(17, 36\); the metadata say \(18, 36\)"),
    ("roberta", {"meta": {"tokenizer.ggml.padding_token_id": 10**9}}, "pad_token_id 1000000000 is no row of the embeddings"),
    ("bert", {"meta": {"bert.attention.layer_norm_epsilon": None}}, r"attention\.layer_norm_epsilon is missing"),
    ("bert", {"meta": {"bert.attention.causal": True}}, r"bert\.attention\.causal is True, which is not supported"),
    ("bert", {"meta": {"bert.pooling_type": 3}}, "pooling_type 3 is not supported"),
    ("bert", {"meta": {"bert.pooling_type": 7}}, "pooling_type 7 is not supported"),
    ("bert", {"meta": {"bert.classifier.pooling_type": 1}}, r"classifier\.pooling_type 1 is not supported"),
    ("bert", {"meta": {"bert.classifier.output_labels": ["a", "b"]}}, "id2label must name the labels 0 to 2"),
    ("bert", {"meta": {"bert.classifier.output_labels": [1, 2, 3]}}, r"classifier\.output_labels is no list of names"),
    ("bert", {"meta": {"bert.expert_count": 8}}, r"bert\.expert_count is 8"),
    ("bert", {"meta": {"tokenizer.ggml.tokens": None}}, "has no tokenizer"),
    ("modernbert", {"meta": {"modern-bert.hidden_activation": "silu"}}, "hidden_act is 'silu'; supported"),
    ("modernbert", {"meta": {"modern-bert.attention.sliding_window_pattern": "x"}}, "layer_types must be a list"),
    ("modernbert", {"meta": {"modern-bert.attention.sliding_window_pattern": [True]}}, "layer_types must be 4 of"),
    ("modernbert", {"meta": {"modern-bert.rope.scaling.type": "yarn"}}, r"rope\.scaling\.type is yarn, which is not supported"),
    ("modernbert", {"leave_out": ["model.layers.3.attn.Wqkv.weight"]}, r"lacks 'model\.layers\.3\.attn\.Wqkv\.weight'"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), BAD, ids=range(len(BAD)))
def test_a_contradiction_is_one_sentence(kind, changes, message, tmp_path):
    path = write(tmp_path / "m.gguf", make(tmp_path / "m", kind), **changes)
    with pytest.raises(ValueError, match=rf"m\.gguf.*{message}") as caught:
        ml.load_model(path, "numpy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("bert", "bos_token_id", 10**6, r"bos is token 1000000, but there are \d+ tokens"),
        ("bert", "token_type", [1, 2], "needs a type for each of"),
        ("xlm-roberta", "scores", None, "needs a type for each of .* all scores"),
        ("xlm-roberta", "scores", ["a"], "the scores of its tokenizer must be a list of numbers"),
        ("xlm-roberta", "precompiled_charsmap", [255] * 6, "the precompiled_charsmap of its normalizer is invalid"),
        ("xlm-roberta", "precompiled_charsmap", ["a"], "the precompiled_charsmap of its tokenizer must be a list of numbers"),
        ("roberta", "pre", "falcon", "splits text as 'falcon'; supported"),
        ("roberta", "model", "rwkv", "of model 'rwkv'"),
    ],
)
def test_a_broken_tokenizer_is_one_sentence(kind, name, value, message, tmp_path):
    path = write(tmp_path / "m.gguf", make(tmp_path / "m", kind), meta={f"tokenizer.ggml.{name}": value})
    with pytest.raises(ValueError, match=rf"m\.gguf: .*{message}"):
        load_tokenizer(path, None)
