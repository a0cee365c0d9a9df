"""Few-sample fine-tuning and studies: effects of the options, results kept, and resuming an interrupted study."""

import json
import math

import numpy as np
import pytest
from small_tokenizers import library_wordpiece

import minilora as ml
from minilora.cli import main
from minilora.data.datasets import few
from minilora.data.examples import Example
from minilora.formats.fetch import Origin
from minilora.layers import Parameter
from minilora.runs import study as study_module
from minilora.runs.recipe import Recipe
from minilora.runs.study import ROWS, rows_named, study, summarise
from minilora.training.reinitialise import reinitialise

BERT = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}


@pytest.fixture
def model_folder(tmp_path):
    model = ml.BertClassifier(ml.BertConfig(**BERT, max_position_embeddings=16), rng=0)
    ml.save_model(model, tmp_path / "model")
    library_wordpiece().save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    """Sentences with or without the word "man"."""
    rng = np.random.default_rng(0)
    words = np.array(["a", "eating", "food", "."])
    lines = []
    for i in range(80):
        chosen = list(rng.choice(words, 5))
        chosen[int(rng.integers(5))] = "man" if i % 2 else "food"
        lines.append(json.dumps({"text": " ".join(chosen), "label": ["no", "yes"][i % 2]}))
    (tmp_path / "data.jsonl").write_text("\n".join(dict.fromkeys(lines)))
    return tmp_path / "data.jsonl"


@pytest.fixture
def recipe(model_folder, data):
    return Recipe(
        model=str(model_folder), data=str(data), task="classify", steps=6, lr=0.02, threads=1, backend="numpy", window=16, new_head=True
    )


def quiet(*_):
    pass


# -- the remedies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_only_the_pooler_and_the_top_blocks_are_reinitialised(blocks, backend):
    model = ml.BertClassifier(ml.BertConfig(**{**BERT, "hidden_size": 40}), rng=0).to(backend)
    for _, p in model.parameters():
        p.data = p.data + 1
    before = {path: ml.to_numpy(p.data).copy() for path, p in model.parameters()}
    shared = model.replica()
    reinitialise(model, blocks, rng=0)
    after = {path: ml.to_numpy(p.data) for path, p in model.parameters()}
    tops = tuple(f"bert.encoder.layer.{i}." for i in range(3 - blocks, 3))
    new = {path for path in after if path.startswith((*tops, "bert.pooler."))}
    assert {path for path in after if not np.array_equal(after[path], before[path])} == new
    for path in new:
        if path.endswith("bias"):
            assert not after[path].any()
        elif "LayerNorm" in path:
            assert (after[path] == 1).all()
    initial_weights = np.concatenate([after[path].ravel() for path in new if after[path].ndim == 2])
    assert initial_weights.std() == pytest.approx(0.02, rel=0.05)
    assert abs(initial_weights.mean()) < 0.002
    for path, p in shared.parameters():
        np.testing.assert_array_equal(ml.to_numpy(p.data), before[path])


def test_reinitialising_more_blocks_than_exist_is_refused():
    with pytest.raises(ValueError, match="has 3 blocks, not 4"):
        reinitialise(ml.BertClassifier(ml.BertConfig(**BERT), rng=0), 4)


def test_l2_sp_returns_weights_to_their_initial_values(on):
    start, away = np.array([1.0, -2.0, 0.5]), np.array([3.0, 3.0, -4.0])
    p = Parameter(on(start))
    optimizer = ml.AdamW([p], lr=0.1, l2_sp=2.0)
    p.data[...] = on(away)
    for _ in range(3):
        p.add_grad(on(np.zeros(3)))
        optimizer.step()
        optimizer.zero_grad()
    np.testing.assert_allclose(ml.to_numpy(p.data), start + (1 - 0.1 * 2.0) ** 3 * (away - start), rtol=1e-12)


def test_few_examples_are_a_subset_and_every_class_must_occur():
    examples = [Example(np.array([i]), np.array([int(i >= 38)]), per_sequence=True) for i in range(40)]
    small, large = ([int(e.ids[0]) for e in few(examples, n, ["common", "rare"], seed=1)] for n in (20, 30))
    assert large[:20] == small
    assert len(set(large)) == 30
    with pytest.raises(ValueError, match="among the 5 examples drawn there is none of class 'rare'"):
        few(examples, 5, ["common", "rare"], seed=1)
    assert len(few(examples, 50, ["common", "rare"])) == 40


def test_warm_up_as_a_share_of_the_run():
    for warmup, steps in ((0.1, 4), (7, 7), (0, 0), (None, 10)):
        assert Recipe(steps=40, warmup=warmup).resolve(lambda *_: None).warmup == steps


BAD_RECIPES = {
    "reinit": ({"reinit": 1}, "reinit changes weights that method lora leaves frozen"),
    "train size": ({"train_size": 5}, "train_size counts texts with a class; it needs task classify"),
    "no train size": ({"train_size": 0}, "train_size must be at least 1"),
    "L2-SP": ({"l2_sp": -1}, "l2_sp must be at least 0"),
    "warm-up": ({"warmup": -0.5}, "warmup must be at least 0"),
    "endless warm-up": ({"warmup": math.inf}, "warmup must be at least 0 and finite"),
    "endless epochs": ({"epochs": 1e300}, "epochs must be above 0 and at most 100,000"),
    "no data": ({"data": ""}, "data is empty"),
    "threads": ({"threads": -1}, "threads must be at least 0"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipes(case):
    change, message = BAD_RECIPES[case]
    with pytest.raises(ValueError, match=message):
        Recipe(**change)


# -- the study ------------------------------------------------------------------------------------------------------------------


def test_a_study_resumes_and_equal_seeds_give_equal_runs(recipe, tmp_path, monkeypatch):
    rows = rows_named(["lora", "re-init", "uncorrected", "head"])
    whole = study(recipe, rows, 2, tmp_path / "whole", quiet)
    lines = (tmp_path / "whole" / "runs.jsonl").read_text().splitlines()
    assert [(r["row"], r["seed"]) for r in map(json.loads, lines)] == [(row, seed) for seed in (0, 1) for row in rows]
    assert (tmp_path / "whole" / "study.png").read_bytes().startswith(b"\x89PNG")

    run, left = study_module._run, [3]

    def interrupted(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(study_module, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(recipe, rows, 2, tmp_path / "parts", quiet)
    assert len((tmp_path / "parts" / "runs.jsonl").read_text().splitlines()) == 3
    left[0] = 5
    parts = study(recipe, rows, 2, tmp_path / "parts", quiet)
    assert left[0] == 0  # only the other five

    def without_times(table):
        return [{**vars(line), "seconds": 0} for line in table]

    assert without_times(parts) == without_times(whole)
    assert {line.row: line.trained for line in whole}["head"] == 2 * 8 + 2
    values = {(r["row"], r["seed"]): r["value"] for r in map(json.loads, lines)}
    losses = {(r["row"], r["seed"]): r["measured"]["loss"] for r in map(json.loads, lines)}
    assert len(set(losses.values())) == 8  # the seed changes the run, and its row
    assert whole[0].mean == pytest.approx((values["lora", 0] + values["lora", 1]) / 2)

    left[0] = 4
    assert study(recipe, rows, 3, tmp_path / "parts", quiet)[0].runs == 3  # one more seed
    assert left[0] == 0


def test_the_shared_model_is_unchanged(recipe, tmp_path, monkeypatch):
    opened = study_module.open_recipe(recipe)
    before = {path: p.data.copy() for path, p in opened[0].parameters()}
    monkeypatch.setattr(study_module, "open_recipe", lambda recipe: opened)
    study(recipe, rows_named(["full", "both", "bottleneck", "l2-sp"]), 1, tmp_path / "s", quiet)
    for path, p in opened[0].parameters():
        np.testing.assert_array_equal(p.data, before[path])
        assert not p.trainable


def test_the_figures_of_a_row():
    records = [{"value": v, "failed": v is None or v < 0.6, "trained": 7, "steps": 3, "seconds": 2.0} for v in (0.5, 0.9, None, 0.7)]
    line = summarise("x", records, "accuracy")
    assert (line.runs, line.failed, line.worst, line.best) == (4, 2, 0.5, 0.9)
    assert line.mean == pytest.approx(0.7)
    assert line.std == pytest.approx(0.2)
    assert summarise("x", records, "perplexity").worst == 0.9  # for losses, less is better
    assert math.isnan(summarise("x", records[2:3], "accuracy").mean)


def test_a_run_that_diverges_or_learns_nothing_counts_as_failed(recipe, tmp_path):
    rows = {"wild": {"method": "full", "lr": 1e30, "schedule": "constant"}, "still": {"method": "full", "lr": 0.0}}
    wild, still = study(recipe, rows, 2, tmp_path / "s", quiet)
    assert (wild.failed, wild.runs) == (2, 2)
    assert math.isnan(wild.mean)
    assert still.failed > 0
    records = [json.loads(line) for line in (tmp_path / "s" / "runs.jsonl").read_text().splitlines()]
    assert "not finite" in next(r for r in records if r["row"] == "wild")["why"]
    assert "2/2" in (tmp_path / "s" / "table.txt").read_text()


def test_the_command_prints_a_table(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--model", recipe.model, "--data", recipe.data, "--task", "classify", "--backend", "numpy", "--threads", "1"]
    common += ["--window", "16", "--quick", "--new-head", "--rows", "few-sample", "--epochs", "0.5"]
    assert main(["study", *common, "--json"]) == 0
    out = capsys.readouterr()
    result = json.loads(out.out)
    assert [line["row"] for line in result["rows"]] == ["standard", "re-init", "longer", "both", "uncorrected"]
    steps = {line["row"]: line["steps"] for line in result["rows"]}
    assert steps["longer"] == steps["both"] == 60 * steps["standard"]
    assert result["folder"] == "studies/few-sample-quick"
    assert "standard, seed 1" in out.err
    assert main(["study", *common]) == 0
    out = capsys.readouterr()
    assert "10 runs were there already" in out.out
    assert out.out.splitlines()[2].split() == "accuracy mean std worst best failed trained steps seconds".split()


def damage_file(d, text):
    (d / "runs.jsonl").write_text(text)


RECORD = '{"row": "head", "seed": 0, "value": 0.5, "failed": true, "trained": 1, "steps": 1, "seconds": 1.0}\n'
BAD_STUDIES = {
    "another version": (lambda d: (d / "study.json").write_text('{"version": 2}'), {}, "is of version 2, this minilora writes 1"),
    "no recipe": (lambda d: (d / "study.json").write_text('{"version": 1}'), {}, "is damaged: it has no recipe"),
    "no JSON": (lambda d: damage_file(d, RECORD + '{"row": "head", "se'), {}, "runs.jsonl, line 2: this is not JSON"),
    "a field missing": (
        lambda d: damage_file(d, '{"row": "head", "seed": 0}\n'),
        {},
        "line 1: its value is not valid; remove the line to repeat the run",
    ),
    "no record": (lambda d: damage_file(d, "[1]\n"), {}, "line 1: expected a JSON object, got int"),
    "twice": (lambda d: damage_file(d, RECORD * 2), {}, "line 2: 'head' with seed 0 is there twice"),
    "another recipe": (lambda d: None, {"lr": 0.5}, "holds a study with lr 0.02, not 0.5"),
    "other data": (lambda d: None, {"train_size": 9}, "holds a study with train_size None, not 9"),
}


@pytest.mark.parametrize("case", BAD_STUDIES)
def test_bad_folders(case, recipe, tmp_path):
    damage, change, message = BAD_STUDIES[case]
    study(recipe, rows_named(["head"]), 1, tmp_path / "s", quiet)
    damage(tmp_path / "s")
    with pytest.raises(ValueError, match=message):
        study(Recipe(**{**vars(recipe), **change}), rows_named(["head"]), 1, tmp_path / "s", quiet)


def test_changed_data_are_refused_and_a_study_that_cannot_start_writes_nothing(recipe, data, tmp_path):
    study(recipe, rows_named(["head"]), 1, tmp_path / "s", quiet)
    with data.open("a") as f:
        f.write('\n{"text": "a man eating", "label": "yes"}')
    with pytest.raises(ValueError, match=r"data\.jsonl has changed since the runs in .*s; name another --out"):
        study(recipe, rows_named(["head"]), 2, tmp_path / "s", quiet)
    (tmp_path / "poem.txt").write_text("a man eating food " * 50)
    for change in (
        {"model": str(tmp_path / "nowhere")},
        {"model": "pydoc", "task": "lm", "new_head": False, "data": str(tmp_path / "poem.txt")},
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=r"there is no model|which have no epochs; give steps"):
            study(Recipe(**{**vars(recipe), **change}), rows_named(["longer"]), 1, tmp_path / "t", quiet)
        assert not (tmp_path / "t").exists()


def test_each_seed_draws_the_weights_that_no_file_holds(recipe, tmp_path, monkeypatch):
    """A bare encoder without a pooler: pooler and classifier are initialised at random and differ between seeds."""
    opened, pooled = study_module.open_recipe(recipe), []
    opened[0].origin = Origin(drawn=("bert.pooler.dense", "classifier"))
    monkeypatch.setattr(study_module, "open_recipe", lambda recipe: opened)
    prepare = study_module.prepare

    def spy(model, *args):
        layers = dict(model.modules())
        pooled.append([layers[path].weight.data.copy() for path in model.origin.drawn])
        return prepare(model, *args)

    monkeypatch.setattr(study_module, "prepare", spy)
    study(recipe, rows_named(["head"]), 2, tmp_path / "s", quiet)
    assert all(abs(a - b).min() > 0 for a, b in zip(*pooled, strict=True))


def test_bad_requests(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"there is no row 'heads'; choose from methods, few-sample"):
        rows_named(["heads"])
    with pytest.raises(ValueError, match="row 'x' changes data, which all rows of a study share"):
        study(recipe, {"x": {"data": "y"}}, 1, tmp_path / "s", quiet)
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        study(recipe, ROWS, 0, tmp_path / "s", quiet)
    with pytest.raises(FileExistsError, match="is in use, and holds no study"):
        study(recipe, ROWS, 1, tmp_path, quiet)
    study(recipe, {"x": {"lr": 0.1}}, 1, tmp_path / "s", quiet)
    with pytest.raises(ValueError, match=r"with row x \{'lr': 0.1\}, not \{'lr': 0.2\}"):
        study(recipe, {"x": {"lr": 0.2}}, 1, tmp_path / "s", quiet)
