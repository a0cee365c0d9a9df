"""`evaluate` measures a run as `finetune` did: the same data, split, window, mask and sample, and figures equal to the last digit."""

import json
import math
from dataclasses import dataclass
from itertools import count

import numpy as np
import oracle
import pytest
from small_tokenizers import BPE, library_wordpiece
from tiny import write_jsonl

import minilora as ml
from minilora.cli import main
from minilora.data import datasets
from minilora.data.examples import Example
from minilora.formats.atomic import read_json, write_json
from minilora.runs import tasks

WORDS = ["a", "man", "eating", "food", "."]


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """`run(*argv)` is the JSON object that a verb prints; `run.err` its standard error."""

    def run(*argv, status=0):
        assert main([*map(str, argv), "--json"]) == status
        out, run.err = capsys.readouterr()
        return json.loads(out) if status == 0 else run.err

    return run


@pytest.fixture
def bert(cwd):
    return oracle.bare_bert(cwd / "bert")


@pytest.fixture
def llama(cwd):
    return oracle.small_llama(cwd / "llama")


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [{"text": " ".join(rng.choice(WORDS, rng.integers(2, 5))) + f" {i}", "label": ["so", "no", "yes"][i % 3]} for i in range(n)]


def pairs(n):
    return [{"prompt": "the cat " * (1 + i % 5) + f"{i}", "completion": " sat" * (1 + i % 3)} for i in range(n)]


FAST = ["--r", 2, "--steps", 3, "--warmup", 0, "--lr", 0.01, "--backend", "numpy", "--threads", 2]
RUNS = {
    "classes": (["--model", "bert", "--data", "films.jsonl", "--task", "classify", "--window", 7], ["lora", "full", "bottleneck", "head"]),
    "classes, few": (["--model", "bert", "--data", "films.jsonl", "--task", "classify", "--window", 11, "--eval-size", 4], ["lora"]),
    "classes, a folder": (["--model", "bert", "--data", "films", "--task", "classify", "--window", 5, "--batch-size", 3], ["lora"]),
    "pairs": (["--model", "llama", "--data", "pairs.jsonl", "--window", 24], ["lora", "full"]),
    "pairs, prompts too": (["--model", "llama", "--data", "pairs.jsonl", "--window", 9, "--no-mask-prompt"], ["lora"]),
    "text": (["--model", "llama", "--data", "poem.txt", "--window", 10, "--eval-bytes", 40], ["lora", "full"]),
    "text, latin-1": (["--model", "llama", "--data", "latin.txt", "--window", 9, "--encoding", "latin-1"], ["lora"]),
    "the standard library": (["--window", 16, "--eval-bytes", 200, "--sample-bytes", 0], ["lora"]),
}


@pytest.fixture
def data(cwd):
    write_jsonl(cwd / "films.jsonl", texts(60))
    write_jsonl(cwd / "films" / "train.jsonl", texts(40))
    write_jsonl(cwd / "films" / "dev.jsonl", texts(10, seed=1))
    write_jsonl(cwd / "pairs.jsonl", pairs(40))
    (cwd / "poem.txt").write_text("the cat sat on the mat; the capital of France is Paris. " * 20)
    (cwd / "latin.txt").write_bytes("the naïve cat sat on the mat ".encode("latin-1") * 30)


@pytest.mark.parametrize(("what", "method", "seed"), [(what, m, seed) for what in RUNS for m in RUNS[what][1] for seed in (0, 3)])
def test_evaluate_equals_finetune_to_the_last_digit(what, method, seed, bert, llama, data, run):
    result = run("finetune", *RUNS[what][0], *FAST, "--method", method, "--seed", seed, "--out", "run")
    assert run("evaluate", "run", "--backend", "numpy") == result["after"]
    assert "differs from the run" not in run.err
    if "--data" in RUNS[what][0]:  # also on a copy of the data under another name
        data = RUNS[what][0][RUNS[what][0].index("--data") + 1]
        if "." in data:
            copy = "copy." + data.split(".")[1]
            (llama.parent / copy).write_bytes((llama.parent / data).read_bytes())
            assert run("evaluate", "run", "--data", copy, "--backend", "numpy", "--threads", 1) == result["after"]


def test_training_data_are_evaluated_on_request_only(bert, data, run):
    result = run("finetune", *RUNS["classes"][0], *FAST, "--seed", 3, "--out", "run")["after"]
    assert 3 <= result["sequences"] <= 20  # a tenth of the distinct texts, with their copies
    everything = run("evaluate", "run", "--data", "films.jsonl", "--all")
    assert everything["sequences"] == 60
    assert "all of films.jsonl, of which the run may have learnt all but what it held out" in run.err
    assert run("evaluate", "run", "--split", "train")["sequences"] == 60 - result["sequences"]
    write_jsonl(bert.parent / "others.jsonl", texts(9, seed=5))
    assert run("evaluate", "run", "--data", "others.jsonl")["sequences"] == 9  # new data: all records
    run("finetune", *RUNS["classes, a folder"][0], *FAST, "--out", "run2")
    assert "the run was trained on all of films/train.jsonl" in run("evaluate", "run2", "--data", "films/train.jsonl", status=1)
    assert run("evaluate", "run2", "--data", "films/train.jsonl", "--all")["sequences"] == 40
    assert run("evaluate", "run2", "--data", "films/dev.jsonl") == run("evaluate", "run2", "--data", "films")


def test_a_run_finds_its_data_from_any_folder(bert, data, run, monkeypatch):
    result = run("finetune", *RUNS["classes"][0], *FAST, "--out", "run")
    (bert.parent / "elsewhere").mkdir()
    monkeypatch.chdir(bert.parent / "elsewhere")
    assert run("evaluate", "../run", "--backend", "numpy") == result["after"]


def test_overrides_and_truncations_are_reported(bert, data, run, capsys):
    run("finetune", *RUNS["classes"][0], *FAST, "--seed", 3, "--out", "run")
    longer = run("evaluate", "run", "--window", 11, "--seed", 4)
    assert "differs from the run: window 11 (the run had 7), seed 4 (the run had 3)" in run.err
    assert "window 11, none is cut" in run.err
    assert "a tenth of it held out by seed 4, most of which the run has learnt" in run.err
    assert longer["cut_sequences"] == 0
    cut = run("evaluate", "run")["cut_sequences"]
    assert cut > 0
    assert f"window 7, {cut} are cut" in run.err
    assert "needs a decoder" in run("evaluate", "run", "--task", "lm", status=1)
    assert "a window of 12 is longer than the model's 11 positions" in run("evaluate", "run", "--window", 12, status=1)
    assert "is not a run, which would know its data; give --data" in run("evaluate", "bert", status=1)


def test_another_window_or_mask_uses_the_same_held_out_records(bert, llama, data, run, monkeypatch):
    """Truncated at 4 tokens, many texts are equal and stay in one split; at 11 all differ, and the tenth held out would be another one."""
    made, measured = datasets.example_maker, []

    @dataclass
    class Lined(Example):
        line: int = 0

    def spy(*args):
        make, lines = made(*args), count(1)  # the files have no empty lines
        return lambda record: Lined(**vars(make(record)), line=next(lines))

    monkeypatch.setattr(datasets, "example_maker", spy)
    original = tasks._measured
    monkeypatch.setattr(tasks, "_measured", lambda what, examples, *args: measured.append(examples) or original(what, examples, *args))
    cases = {"classes": (4, ["--window", 11]), "pairs": (9, ["--window", 60]), "pairs, prompts too": (9, ["--mask-prompt", "--window", 20])}
    for n, (what, (window, other)) in enumerate(cases.items()):
        run("finetune", *RUNS[what][0], *FAST, "--window", window, "--seed", 1, "--out", f"run{n}")
        run("evaluate", f"run{n}", *other)
        held, again = ({e.line for e in examples} for examples in measured[-2:])
        assert held == again, what


def test_changed_data_are_not_treated_as_held_out(bert, llama, data, run):
    for n, (what, file) in enumerate([("classes", "films.jsonl"), ("text", "poem.txt")]):
        run("finetune", *RUNS[what][0], *FAST, "--out", f"run{n}")
        with open(file, "a") as f:
            f.write("\n" if what == "text" else json.dumps({"text": "more", "label": "so"}) + "\n")
        for more in ([], ["--split", "valid"], ["--data", file]):
            assert f"{file} is not as the run read it" in run("evaluate", f"run{n}", *more, status=1)
        run("evaluate", f"run{n}", "--all")
        assert "all of " in run.err
        record = read_json(f"run{n}/run.json")
        write_json(f"run{n}/run.json", {name: value for name, value in record.items() if name != "trained_on"})  # an older version
        assert "is not as the run read it" in run("evaluate", f"run{n}", status=1)


def test_explicit_sizes_apply_to_any_data(bert, llama, data, run):
    run("finetune", *RUNS["classes, few"][0], *FAST, "--out", "run")
    write_jsonl(bert.parent / "others.jsonl", texts(30, seed=5))
    assert run("evaluate", "run", "--data", "others.jsonl")["sequences"] == 30
    assert run("evaluate", "run", "--data", "others.jsonl", "--eval-size", 7)["sequences"] == 7
    assert run("evaluate", "run", "--split", "train", "--eval-size", 7)["sequences"] == 7
    assert run("evaluate", "llama", "--data", "poem.txt", "--window", 10, "--eval-bytes", 30)["labelled_tokens"] == 30
    assert "films.jsonl holds records" in run("evaluate", "run", "--eval-bytes", 30, status=1)


@pytest.mark.parametrize("folder", ["model", "."])
def test_the_settings_of_a_run_come_from_the_folder_of_the_model(folder, bert, data, run, monkeypatch):
    result = run("finetune", *RUNS["classes"][0], *FAST, "--method", "full", "--out", "run")["after"]
    monkeypatch.chdir(bert.parent / "run" / ("model" if folder == "." else ""))
    assert run("evaluate", folder, "--backend", "numpy") == result
    monkeypatch.chdir(bert.parent / "run")  # the bundled model is not part of this run
    assert "bits_per_byte" in run("evaluate", "--data", "../poem.txt", "--window", 16)


@pytest.mark.parametrize("record", [{}, {"configuration": []}, {"configuration": {"model": 3}}, {"labels": ["a", "b", "c", "d"]}])
def test_a_damaged_run_json_is_reported_or_ignored(record, bert, data, run):
    result = run("finetune", *RUNS["classes"][0], *FAST, "--method", "full", "--out", "run")["after"]
    write_json("run/run.json", read_json("run/run.json") | record if "labels" in record else record)
    if "labels" in record:  # the model has its own class names: the head is not replaced
        assert run("evaluate", "run", "--backend", "numpy") == result
    else:
        assert run("extract", "run", "--out", "x", status=1)
        assert not (bert.parent / "x").exists()


def test_a_quantized_base_with_a_head_is_evaluated(bert, data, run):
    result = run("finetune", *RUNS["classes"][0], *FAST, "--init", "loftq", "--out", "run")["after"]
    assert run("evaluate", "run", "--backend", "numpy") == result


def test_run_json_holds_null_for_nan(cwd, run):
    model = ml.BertClassifier(ml.BertConfig(vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=1), rng=0)
    ml.save_model(model, cwd / "scorer")
    library_wordpiece().save(str(cwd / "scorer" / "tokenizer.json"))
    write_jsonl(cwd / "x.jsonl", [{"text": row["text"], "label": 0.5} for row in texts(9)])  # correlation with a constant is undefined
    how = ["--model", "scorer", "--data", "x.jsonl", "--task", "classify", "--window", 11, *FAST]
    assert run("finetune", *how, "--out", "run")["after"]["pearson"] is None
    assert "NaN" not in (cwd / "run" / "run.json").read_text()
    rows = run("study", *how, "--rows", "head", "--seeds", 1, "--out", "study")["rows"]
    assert (rows[0]["mean"], rows[0]["failed"]) == (None, 1)
    assert "NaN" not in (cwd / "study" / "runs.jsonl").read_text()


def test_the_perplexity_of_a_text_counts_every_token_once(llama, run):
    text = "the cat sat on the mat; the capital of France is Paris 2024"
    (llama.parent / "t.txt").write_text(text)
    ids = BPE.encode(text)
    for window in (5, 7, len(ids) - 1, 50):
        result = run("evaluate", "llama", "--data", "t.txt", "--window", window)
        model, loss = ml.load_model("llama", "numpy"), 0.0
        for a in range(0, len(ids) - 1, window):
            piece = ids[a : a + window + 1]
            z = model.forward(piece[:-1], keep=False)[0].astype(np.float64)
            loss += (np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(piece) - 1), piece[1:]]).sum()
        assert result["labelled_tokens"] == result["total_tokens"] == len(ids) - 1
        assert result["loss"] == pytest.approx(loss / (len(ids) - 1), rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(loss / (len(ids) - 1)), rel=1e-5)
        assert f"{len(ids) - 1} of {len(ids) - 1} tokens" in run.err


@pytest.mark.parametrize(("n", "size", "accumulate"), [(40, 8, 1), (40, 8, 3), (44, 8, 4), (9, 8, 8), (41, 8, 2)])
@pytest.mark.parametrize("epochs", [1, 2, 1.5, 2.1])
def test_epochs_read_every_text_and_take_the_steps_of_transformers(n, size, accumulate, epochs, bert, run):
    write_jsonl(bert.parent / "x" / "train.jsonl", [{"text": "a man eating", "label": i % 2} for i in range(n)])
    write_jsonl(bert.parent / "x" / "valid.jsonl", [{"text": "food", "label": 0}, {"text": "a", "label": 1}])
    how = ["--batch-size", size, "--accumulate", accumulate, "--epochs", epochs, "--warmup", 0, "--backend", "numpy", "--no-cache"]
    run("finetune", "--model", "bert", "--data", "x", "--task", "classify", "--window", 9, *how, "--out", "run")
    steps = [json.loads(line) for line in (bert.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    each = math.ceil(math.ceil(n / size) / accumulate)  # transformers: ceil(batches per epoch / accumulate) times the epochs, rounded up
    assert len(steps) == math.ceil(epochs * each)
    per_text = len(library_wordpiece().encode("a man eating").ids)
    assert sum(step["tokens"] for step in steps[:each]) == n * per_text


def test_a_setting_without_effect_on_the_data_is_named(bert, llama, data, run):
    run("finetune", *RUNS["classes"][0], *FAST, "--out", "run", "--eval-bytes", 100, "--mask-prompt")
    assert "--eval-bytes has no effect on texts with a class.\n--mask-prompt has no effect on texts with a class.\n" in run.err
    run("finetune", *RUNS["pairs"][0], *FAST, "--out", "run2", "--batch-size", 4)
    assert "--batch-size has no effect on records to continue.\n" in run.err


# ---- heads ---------------------------------------------------------------------------------------------------------------------------


def classifier(folder, names=None, n=3, **config):
    oracle.write_checkpoint("bert", folder, "float32", **({"id2label": {str(i): name for i, name in enumerate(names)}} if names else {}))
    raw = read_json(folder / "config.json")
    if names is None:
        del raw["id2label"]
    write_json(folder / "config.json", raw | config)
    library_wordpiece().save(str(folder / "tokenizer.json"))
    return folder


def test_a_published_head_keeps_the_order_of_its_classes(cwd, data, run):
    """The model itself labels the data: the accuracy is 1 by construction, before training and with every verb."""
    model = ml.load_model(classifier(cwd / "named", ["yes", "so", "no"]), "numpy")
    rows = texts(60)
    for row in rows:
        logits = model.forward(np.array(library_wordpiece().encode(row["text"]).ids), keep=False)[0]
        row["label"] = ["yes", "so", "no"][int(logits.argmax())]
    write_jsonl(cwd / "own.jsonl", rows)
    tiny = ["--task", "classify", "--window", 11, "--steps", 1, "--r", 2, "--lr", 1e-12, "--backend", "numpy"]
    result = run("finetune", "--model", "named", "--data", "own.jsonl", *tiny, "--out", "run")
    assert result["before"]["accuracy"] == result["after"]["accuracy"] == 1.0
    assert read_json(cwd / "run" / "run.json")["labels"] == ["yes", "so", "no"]
    for more in (["run"], ["named", "--adapter", "run"], ["named", "--task", "classify"]):
        assert run("evaluate", *more, "--data", "own.jsonl", "--all")["accuracy"] == 1.0, more
    run("merge", "run", "--out", "merged")
    assert read_json(cwd / "merged" / "config.json")["id2label"] == {"0": "yes", "1": "so", "2": "no"}
    assert run("evaluate", "merged", "--data", "own.jsonl")["accuracy"] == 1.0


def test_a_head_for_other_classes_is_replaced_on_request_only(cwd, run):
    classifier(cwd / "named", ["good", "bad", "ugly"])
    write_jsonl(cwd / "x.jsonl", texts(30))
    tiny = ["--task", "classify", "--window", 11, *FAST]
    err = run("finetune", "--model", "named", "--data", "x.jsonl", *tiny, "--out", "run", status=1)
    assert "none of the classes: good, bad, ugly. The data have no, so, yes" in err
    assert not (cwd / "run").exists()
    result = run("finetune", "--model", "named", "--data", "x.jsonl", *tiny, "--out", "run", "--new-head")
    assert "the head for good, bad, ugly is replaced by one for no, so, yes" in run.err
    assert read_json(cwd / "run" / "run.json")["labels"] == ["no", "so", "yes"]
    assert run("evaluate", "run", "--backend", "numpy") == result["after"]
    write_jsonl(cwd / "two.jsonl", [row | {"label": i % 2} for i, row in enumerate(texts(30))])  # and for another number of classes
    result = run("finetune", "--model", "named", "--data", "two.jsonl", *tiny, "--out", "run2", "--new-head")
    assert run("evaluate", "run2", "--backend", "numpy") == result["after"]


def test_a_head_without_class_names_takes_those_of_the_data_and_reports_it(cwd, run):
    classifier(cwd / "plain", num_labels=3)
    write_jsonl(cwd / "x.jsonl", texts(30))
    result = run("finetune", "--model", "plain", "--data", "x.jsonl", "--task", "classify", "--window", 11, *FAST, "--out", "run")
    assert "plain does not name its 3 classes; they are assumed to be no, so, yes, in this order" in run.err
    assert run("evaluate", "run", "--backend", "numpy") == result["after"]
    assert "none of the classes: LABEL_0, LABEL_1, LABEL_2" in run("evaluate", "plain", "--data", "x.jsonl", status=1)


def test_scores_are_predicted_by_a_model_with_one_output(cwd, run):
    model = ml.BertClassifier(ml.BertConfig(vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=1), rng=0)
    ml.save_model(model, cwd / "scorer")
    library_wordpiece().save(str(cwd / "scorer" / "tokenizer.json"))
    write_jsonl(cwd / "x.jsonl", [{"text": row["text"], "label": len(row["text"]) / 7} for row in texts(30)])
    result = run("finetune", "--model", "scorer", "--data", "x.jsonl", "--task", "classify", "--window", 11, *FAST, "--out", "run")
    assert result["headline"] == "pearson"
    assert run("evaluate", "run", "--backend", "numpy") == result["after"]
    values = np.array([len(row["text"]) / 7 for row in texts(30)])
    model = ml.load_model("scorer", "numpy")
    ours = np.array([float(model.forward(np.array(library_wordpiece().encode(row["text"]).ids), keep=False)[0][0, 0]) for row in texts(30)])
    figures = run("evaluate", "scorer", "--data", "x.jsonl")
    assert figures["pearson"] == pytest.approx(np.corrcoef(ours, values)[0, 1], rel=1e-4)
    assert figures["loss"] == pytest.approx(np.mean((ours - values) ** 2), rel=1e-5)


def test_the_seed_reaches_the_head(bert, data, cwd, run):
    heads = []
    for seed in (0, 1):
        result = run("finetune", *RUNS["classes"][0], *FAST, "--lr", 1e-12, "--method", "full", "--seed", seed, "--out", f"run{seed}")
        heads.append(ml.load_model(cwd / f"run{seed}" / "model", "numpy").classifier.weight.data)
        assert result["before"]["loss"] > 0
    assert np.abs(heads[0] - heads[1]).max() > 1e-3


# ---- damaged runs, and runs that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"configuration": []}, "run.json: configuration must be a table"),
        ({"labels": 1.5}, "run.json: labels must be a list of which each is a text"),
        ({"labels": [1, 2, 3]}, "run.json: labels must be a list of which each is a text"),
        ({"configuration": {"dtype": "x"}}, "run.json: unknown dtype 'x'; choose float32"),
        ({"configuration": {"quantize": 1}}, "run.json: quantize must be a text"),
        ({"configuration": {"window": "7"}}, "window must be an integer"),
        ({"configuration": {"window": -7}}, "window must be at least 1"),
        ({"configuration": {"seed": None}}, "seed must be an integer"),
        ({"results": {"after": {}}}, "run.json, results: headline must be a text"),
        ({"results": {"after": [], "before": 3, "headline": "loss"}}, "run.json, results: before must be a table"),
        ({"trained_on": "x"}, "run.json: trained_on must be a table"),
    ],
)
def test_a_damaged_run_json_is_named_with_its_field(change, message, bert, data, cwd, run):
    run("finetune", *RUNS["classes"][0], *FAST, "--out", "run")
    write_json(cwd / "run" / "run.json", read_json(cwd / "run" / "run.json") | change)
    assert message in run("evaluate", "run", "--data", "films.jsonl", status=1)
    assert main(["info", "run"]) in (0, 1)


@pytest.mark.parametrize("rate", [1e10, 1e38])
def test_a_run_with_a_non_finite_loss_fails(rate, cwd, run):
    err = run("finetune", "--steps", 1, "--warmup", 0, "--window", 24, "--eval-bytes", 200, "--lr", rate, "--out", "run", status=1)
    assert "not finite after the last update (step 1)" in err
    record = json.loads((cwd / "run" / "run.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert record["results"] == {"stopped_after_step": 0}
    assert run("evaluate", "run", "--eval-bytes", 200)["loss"] < 3
