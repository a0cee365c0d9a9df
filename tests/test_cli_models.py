"""The command line on published kinds of models at small scale: a BERT and a Llama with tokenizers, records, chats, settings files."""

import json
import shutil
import sys

import numpy as np
import oracle
import pytest
from safetensors.numpy import load_file, save_file
from small_tokenizers import CHATML, bert_wordpiece, library_wordpiece, roberta_bpe, write_tokenizer, xlm_roberta
from tiny import write_jsonl

import minilora as ml
from minilora.cli import main
from minilora.formats.atomic import read_json, write_json
from minilora.models.registry import ARCHITECTURES
from minilora.runs.recipe import Recipe

QUICK = ["--steps", 3, "--warmup", 0, "--window", 11, "--threads", 1, "--backend", "numpy"]
FILMS = [
    {"text": text, "label": label} for text, label in (("a man eating", "tale"), ("food", "dish"), ("a man .", "tale"), ("a .", "none"))
]


@pytest.fixture
def run(capsys):
    """`run(*argv)` returns the standard output of a verb; `run(*argv, json=True)` the one JSON object that it prints."""

    def run(*argv, json=False):
        status = main([str(word) for word in argv] + ["--json"] * json)
        out, err = capsys.readouterr()
        assert status == 0, err
        return read(out) if json else out

    def read(out):
        assert len(out.splitlines()) == 1
        return json.loads(out)

    return run


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bert(cwd):
    return oracle.bare_bert(cwd / "bert")


@pytest.fixture(params=["bert", "roberta", "xlm-roberta", "distilbert", "modernbert"])
def encoder(request, cwd):
    """A folder "bert" with an encoder without a head, and its tokenizer; its model_type."""
    kind = request.param
    if kind == "bert":
        oracle.bare_bert(cwd / "bert")
        return kind
    library = {"roberta": roberta_bpe, "xlm-roberta": xlm_roberta}.get(kind, bert_wordpiece)()
    write_tokenizer(cwd / "bert", library)
    sizes = {"vocab_size": library.get_vocab_size(), "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = ARCHITECTURES[kind].config.from_json({"model_type": kind, **sizes, "max_position_embeddings": 13, "pad_token_id": 1})
    ml.save_model(ml.BertClassifier(config, rng=0), cwd / "bert")
    prefix, file = ARCHITECTURES[kind].prefix, cwd / "bert" / "model.safetensors"
    save_file({name.removeprefix(prefix): value for name, value in load_file(file).items() if name.startswith(prefix)}, file)
    raw = read_json(cwd / "bert" / "config.json")
    write_json(cwd / "bert" / "config.json", {**raw, "architectures": [ARCHITECTURES[kind].architectures[1]], "id2label": None})
    return kind


@pytest.fixture
def llama(cwd):
    oracle.small_llama(cwd / "llama")
    (cwd / "llama" / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')  # no chat template
    return cwd / "llama"


def write_films(folder):
    for split in ("train", "valid", "test"):
        write_jsonl(folder / f"{split}.jsonl", FILMS * 3)
    return folder


# ---- classification ------------------------------------------------------------------------------------------------------------------


def test_a_classifier_from_data_to_a_merged_folder(encoder, cwd, run):
    films = write_films(cwd / "films")
    result = run("finetune", *QUICK, "--model", "bert", "--data", "films", "--task", "classify", "--out", "run", json=True)
    assert result["headline"] == "accuracy"
    result = {"run": run("evaluate", "run", "--data", films, json=True)}
    assert {"loss", "tokens", "accuracy", "f1", "f1_macro", "matthews"} < result["run"].keys()
    assert result["run"]["sequences"] == 12
    run("merge", "run", "--out", "merged", json=True)
    assert read_json(cwd / "merged" / "config.json")["id2label"] == {"0": "dish", "1": "none", "2": "tale"}
    result["merged"] = run("evaluate", "merged", "--data", films / "test.jsonl", json=True)  # the names of the classes went along
    shutil.copytree(cwd / "run" / "adapter", cwd / "sent")  # as PEFT's are: no list of names, a head of three rows
    write_jsonl(cwd / "numbered.jsonl", [{"text": r["text"], "label": ["dish", "none", "tale"].index(r["label"])} for r in FILMS * 3])
    result["sent"] = run("evaluate", "sent", "--data", "numbered.jsonl", json=True)
    for name in ("merged", "sent"):
        assert result[name] == pytest.approx(result["run"], abs=1e-5), name


def test_a_head_is_reported_as_random_where_it_remains_so(bert, cwd, capsys):
    """The base has no classifier, the run has one."""
    write_films(cwd / "films")
    verbs = {
        "finetune": ["--model", "bert", "--data", "films", "--task", "classify", "--out", "run", *QUICK],
        "evaluate": ["run"],
        "merge": ["run", "--out", "merged"],
        "export": ["run", "--to", "peft", "--out", "exported"],
        "info": ["run"],
        "compare": ["run", "bert"],
    }
    for verb, words in verbs.items():
        assert main([verb, *map(str, words)]) == 0
        err = capsys.readouterr().err
        assert err.count("bert has no classifier: initialised at random") == (verb in ("finetune", "compare")), verb


def test_full_fine_tuning_keeps_class_names(bert, cwd, run):
    films = write_films(cwd / "films")
    run("finetune", *QUICK, "--model", "bert", "--data", films, "--task", "classify", "--method", "full", "--out", "run")
    assert read_json(cwd / "run" / "model" / "config.json")["id2label"] == {"0": "dish", "1": "none", "2": "tale"}


def test_a_merged_classifier_loads_in_transformers(bert, cwd, run):
    torch = pytest.importorskip("torch", reason="the oracle torch is not installed: pip install 'minilora[oracle]'")
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'")
    run("finetune", *QUICK, "--model", "bert", "--data", write_films(cwd / "films"), "--task", "classify", "--lr", 0.1, "--out", "run")
    run("merge", "run", "--out", "merged")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(cwd / "merged").eval()
    assert theirs.config.id2label == {0: "dish", 1: "none", 2: "tale"}
    ids = library_wordpiece().encode("a man eating").ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    from minilora.runs.run_file import open_model

    np.testing.assert_allclose(open_model("run", "numpy").forward(np.array(ids), keep=False)[0], expected, atol=1e-5)


def test_a_run_works_from_any_folder_and_reports_a_missing_base(bert, cwd, run, capsys, monkeypatch):
    films = write_films(cwd / "films")
    run("finetune", *QUICK, "--model", "bert", "--data", "films", "--task", "classify", "--out", "run")
    (cwd / "elsewhere").mkdir()
    monkeypatch.chdir(cwd / "elsewhere")
    before = run("evaluate", "../run", "--data", films, json=True)
    bert.rename(cwd / "moved")
    assert main(["evaluate", "../run", "--data", str(films)]) == 1
    assert "the base model of ../run is not where it was" in capsys.readouterr().err
    assert run("evaluate", "../moved", "--adapter", "../run", "--data", films, json=True) == before


# ---- text ----------------------------------------------------------------------------------------------------------------------------

CHATS = [{"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": answer}]} for answer in ("sat", "is", "of")]


def test_chats_from_csv_or_folder_to_a_generated_answer(llama, cwd, run):
    write_jsonl(cwd / "chats.jsonl", CHATS * 4)
    (cwd / "pairs.csv").write_text('completion,prompt\n" mat",the cat sat on the\n"Paris",the capital is\n')
    learn = [*QUICK, "--window", 64, "--model", "llama", "--lr", 0.05, "--r", 2]
    (llama / "chat_template.jinja").write_text(CHATML)
    run("finetune", *learn, "--data", "chats.jsonl", "--steps", 20, "--out", "chat")
    prompt = ["--prompt", "the cat", "--temperature", 0, "--tokens", 3]
    result = run("generate", "chat", "--chat", *prompt, json=True)
    assert result["prompt"] == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert result["tokens"] == 3
    assert run("generate", "chat", "--chat", *prompt) == result["text"] + "\n"
    run("merge", "chat", "--out", "merged")
    assert run("generate", "merged", "--chat", *prompt, json=True) == result
    losses = [run("evaluate", "llama", "--data", "pairs.csv", *more, json=True) for more in ([], ["--no-mask-prompt"])]
    assert losses[0]["labelled_tokens"] < losses[1]["labelled_tokens"]
    assert {"loss", "tokens", "perplexity"} < losses[0].keys()


def test_a_text_beyond_the_positions_is_reported(llama, cwd, run, capsys):
    for words, total in ((["--tokens", 94], 96), (["--tokens", 150], 152), (["--tokens", 1, "--prompt", "the cat" * 60], None)):
        assert main(["generate", "llama", "--prompt", "the cat", "--temperature", "0", "--backend", "numpy", *map(str, words)]) == 0
        err = capsys.readouterr().err
        assert (f"warning: the text has {total or ''}" in err) == (total != 96)
        assert ("and the model reads 96" in err) == (total != 96)


def test_a_template_that_leaves_the_sandbox_writes_nothing(llama, cwd, capsys):
    (llama / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    write_jsonl(cwd / "chats.jsonl", CHATS)
    for argv in (["finetune", "--model", "llama", "--data", "chats.jsonl", "--out", "new"], ["generate", "llama", "--chat"]):
        assert main([*argv, "--backend", "numpy"]) == 1
        assert "the chat template tries to leave the sandbox" in capsys.readouterr().err
    assert not (cwd / "new").exists()


def test_plain_text_uses_the_learning_rate_of_published_models():
    """The rates of the bundled model, 0.8 M parameters, are far too high for others."""
    rates = {}
    for model, task in (("pydoc", "lm"), ("llama", "lm")):
        rates[model] = Recipe(model=model, task=task).resolve(lambda *_: None).lr
    assert rates == {"pydoc": 8e-3, "llama": 5e-4}


# ---- settings ------------------------------------------------------------------------------------------------------------------------


def test_flags_override_settings_files(bert, cwd, run):
    write_films(cwd / "films")
    (cwd / "a.toml").write_text(
        'model = "bert"\ndata = "films"\ntask = "classify"\nthreads = 1\nsteps = 2\nwarmup = 0\nrank = 2\nalpha = 3\nlr = 1\n'
        "max-length = 11\n"
        'backend = "numpy"\ntarget-modules = ["query", "value"]\nlayers_to_transform = [1]\njson = true\nout = "run"\n'
    )
    assert json.loads(run("finetune", "--config", "a.toml", "--lr", 0.001))["steps"] == 2
    result = read_json(cwd / "run" / "run.json")["configuration"]
    expected = {"r": 2, "lora_alpha": 3, "lr": 0.001, "window": 11, "target_modules": ["query", "value"], "layers_to_transform": [1]}
    assert {name: result[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank = 2\nr = 3", "rank and r are the same setting"),
        ('task = "guess"', "task is 'guess'; choose lm, classify"),
        ("learning-rate = 1", "there is no setting 'learning-rate'"),
        ("no-mask-prompt = true", "there is no setting 'no-mask-prompt'; did you mean mask_prompt"),
    ],
)
def test_bad_settings(text, message, cwd, capsys):
    (cwd / "a.toml").write_text(text)
    assert main(["finetune", "--config", "a.toml"]) == 1
    assert message in capsys.readouterr().err


def test_verbs_without_a_model_print_one_object(run, cwd, monkeypatch):
    layer = ("Linear", ml.Linear(3, 2, rng=0, dtype="float64"), np.ones((4, 3)), {})
    monkeypatch.setattr("minilora.checking.catalogue.catalogue", lambda: [layer])
    assert run("gradcheck", "--backend", "numpy", json=True)["checked"] == 1
    assert run("info", json=True)["parameters"] == 858880
    assert run("generate", "--tokens", 2, "--backend", "numpy", json=True)["tokens"] == 2


# ---- inconsistent input --------------------------------------------------------------------------------------------------------------


def other_adapter(cwd):
    model = ml.load_model("llama", "numpy")
    for _, p in model.parameters():
        p.data = p.data + np.float32(0.01)
    ml.inject(model, ml.LoraConfig(r=2))
    ml.save_adapter(model, cwd / "other")
    return ["evaluate", "llama", "--adapter", "other", "--data", "films/test.jsonl"]


def unknown_architecture(cwd):
    write_json(cwd / "bert" / "config.json", {**read_json(cwd / "bert" / "config.json"), "model_type": "albert"})
    return ["finetune", "--model", "bert", "--data", "films", "--task", "classify"]


def larger_vocabulary(cwd):
    library = library_wordpiece()
    library.add_tokens([f"w{i}" for i in range(60)])
    library.save(str(cwd / "bert" / "tokenizer.json"))
    return ["finetune", "--model", "bert", "--data", "films", "--task", "classify"]


def no_template(cwd):
    write_jsonl(cwd / "chats.jsonl", CHATS)
    return ["finetune", "--model", "llama", "--data", "chats.jsonl"]


BAD = {
    "chats for a model that has no template": (no_template, "chats.jsonl, line 1: this model has no chat template"),
    "a task that the model is not for": (["evaluate", "llama", "--data", "films", "--task", "classify"], "task classify needs a BERT"),
    "text for a classifier": (["evaluate", "bert", "--data", "films", "--task", "lm"], "task lm needs a decoder"),
    "training a classifier on text": (["finetune", "--model", "bert", "--data", "films"], "Is --task classify meant?"),
    "classes for a decoder": (["finetune", "--model", "llama", "--data", "films", "--task", "classify"], "this model is not a classifier"),
    "writing with a classifier": (["generate", "bert"], "does not generate text"),
    "classes that nobody named": (
        ["evaluate", "bert", "--data", "films/test.jsonl"],
        "the label 'tale' is none of the classes: LABEL_0",
    ),
    "more positions than there are": (
        ["finetune", "--model", "bert", "--data", "films", "--task", "classify", "--window", "12"],
        "a window of 12 is longer than the model's 11 positions",
    ),
    "an adapter of other weights": (other_adapter, "made for a base model with other weights"),
    "an unknown architecture": (unknown_architecture, "is of model_type 'albert'; supported: gpt2, bert"),
    "a tokenizer of another model": (larger_vocabulary, "ids up to 69, but the model's embedding has 61 rows"),
    "a name that is no path": (["info", "nobody/nothing"], "there is no folder nobody/nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_inconsistent_input_is_one_sentence_and_writes_nothing(case, bert, llama, cwd, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    write_films(cwd / "films")
    argv, message = BAD[case]
    argv = argv(cwd) if callable(argv) else argv
    before = set(cwd.rglob("*"))
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (result,) = [line for line in err.splitlines() if line.startswith("minilora: error:")]
    assert message in result
    assert set(cwd.rglob("*")) == before
