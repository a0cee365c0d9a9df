"""`minilora report`: its figures against NumPy's own, pages with missing or damaged files, and pages in a browser."""

import html
import json
import math
import re
import shutil
from itertools import chain

import numpy as np
import oracle
import pytest
from browser import chromium
from sklearn.metrics import confusion_matrix
from test_evaluate import texts
from test_training import some_batch, tiny
from tiny import write_jsonl

import minilora as ml
from minilora.cli import main
from minilora.lora import disabled, lora_layers
from minilora.report.changes import change_of, effective_rank, similarity
from minilora.report.page import report_run, ticks
from minilora.runs.evaluate import task_of
from minilora.runs.finetune import finetune
from minilora.runs.recipe import Recipe
from minilora.runs.run_file import open_model
from minilora.training.loop import train

QUICK = {"batch_size": 2, "window": 32, "eval_bytes": 256, "sample_bytes": 8, "backend": "numpy", "warmup": 1, "threads": 1}
TEXT = "the quick brown <b>fox</b> jumps over the lazy dog; "


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of finished runs: of the bundled model, and of a small BERT with classes."""
    root = tmp_path_factory.mktemp("runs")
    (root / "poem.txt").write_text(TEXT * 200)
    (root / "bert").mkdir()
    oracle.bare_bert(root / "bert")
    write_jsonl(root / "films.jsonl", [{**record, "label": f"<{record['label']}>"} for record in texts(60)])
    quiet = {"say": lambda text: None}
    for name, changed in (
        ("r4", {"r": 4, "steps": 6}),
        ("r2", {"r": 2, "steps": 5, "seed": 1}),
        ("full", {"method": "full", "steps": 2}),
        ("bitfit", {"method": "bitfit", "steps": 2}),
        ("dora", {"r": 2, "use_dora": True, "steps": 2}),
    ):
        finetune(Recipe(data=str(root / "poem.txt"), **QUICK, **changed), root / name, **quiet)
    classify = {"model": str(root / "bert"), "data": str(root / "films.jsonl"), "task": "classify", "window": 7, "eval_size": 6}
    for name, changed in (("classes", {"r": 2}), ("classes-full", {"method": "full"})):
        settings = {"steps": 4, "lr": 0.01, "warmup": 0, "backend": "numpy", "threads": 2}
        finetune(Recipe(**classify, **settings, **changed), root / name, **quiet)
    return root


@pytest.fixture
def copy(made, tmp_path):
    """`copy(name)` is a copy of a run, to be damaged."""
    return lambda name: shutil.copytree(made / name, tmp_path / name)


@pytest.fixture
def page(tmp_path):
    """`page(run, ...)` is the HTML of its report; page.missing what it says to be missing."""

    def page(*runs):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.html"
        page.missing = list(chain(*report_run(*runs, out=file)["missing"].values()))
        return file.read_text(encoding="utf-8")

    return page


def rows(text, caption):
    """{first cell: the other cells} of the table with this caption."""
    table = text[text.index(f'aria-label="Table: {html.escape(caption)}"') :]
    found = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table[: table.index("</table>")], re.DOTALL)
    return {html.unescape(name): re.findall("<td>(.*?)</td>", cells) for name, cells in found}


# ---- figures -------------------------------------------------------------------------------------------------------------------------


def test_singular_values_effective_rank_and_amplification_are_numpys(made, page):
    text = page(made / "r4")
    table, spectra = rows(text, "every change"), rows(text, "Singular values of dW")
    model = open_model(made / "r4", "numpy")
    assert list(table) == [path for path, _ in lora_layers(model)]
    for path, layer in lora_layers(model):
        W = layer.weight.data.astype(np.float64)
        dW = 32 / 4 * layer.lora_A.data.astype(np.float64) @ layer.lora_B.data.astype(np.float64)
        U, S, Vt = np.linalg.svd(dW)
        p = S[:4] / S[:4].sum()
        inside = np.linalg.norm(U[:, :4].T @ W @ Vt[:4].T)
        norm, size, (m, n) = np.linalg.norm(W), np.linalg.norm(dW), W.shape
        expected = [4, norm, size, size / norm, math.exp(-(p * np.log(p)).sum()), inside, 4 * norm / math.sqrt(m * n), size / inside]
        assert table[path][0] == f"{m} × {n}"
        np.testing.assert_allclose([float(x) for x in table[path][1:]], expected, rtol=2e-3)
        np.testing.assert_allclose([float(x) for x in spectra[path.removeprefix("transformer.h.")]], S[:4], rtol=2e-3)


@pytest.mark.parametrize("shape", [(7, 5, 3), (3, 9, 4), (5, 4, 6)])
def test_a_product_is_decomposed_without_being_formed(shape):
    m, n, r = shape
    rng = np.random.default_rng(0)
    A, B, W = rng.normal(size=(m, r)), rng.normal(size=(r, n)), rng.normal(size=(m, n))
    short, whole = change_of((A, B), W), change_of(A @ B, W)
    k = min(shape)
    np.testing.assert_allclose(short.S[:k], np.linalg.svd(A @ B)[1][:k])
    assert short.shape == whole.shape == (m, n)
    assert short.norm == pytest.approx(np.linalg.norm(A @ B))
    assert short.weight == pytest.approx(np.linalg.norm(W))
    U, _, Vt = np.linalg.svd(A @ B)
    assert short.within == pytest.approx(np.linalg.norm(U[:, :k].T @ W @ Vt[:k].T))
    projector = short.directions @ short.directions.T  # the span of A's directions is that of A
    np.testing.assert_allclose(projector @ A, A, atol=1e-12)
    np.testing.assert_allclose(abs(np.linalg.svd(A)[0][:, 0] @ short.directions[:, 0]), 1)


def test_effective_rank_of_known_spectra():
    assert effective_rank(np.array([2.0, 2, 2, 0])) == pytest.approx(3)
    assert effective_rank(np.array([5.0, 0])) == pytest.approx(1)
    assert effective_rank(np.zeros(3)) == 0
    assert effective_rank(np.array([3.0, 1])) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))


def test_similarity_is_that_of_equation_4():
    rng = np.random.default_rng(1)
    U, V = (np.linalg.qr(rng.normal(size=(12, k)))[0] for k in (3, 5))
    phi = similarity(U, V)
    for i in range(3):
        for j in range(5):
            assert phi[i, j] == pytest.approx(np.linalg.norm(U[:, : i + 1].T @ V[:, : j + 1]) ** 2 / min(i + 1, j + 1))
    np.testing.assert_allclose(similarity(V, V)[4, 4], 1)


def test_the_page_of_two_runs_has_the_similarity_of_their_adapters(made, page):
    text = page(made / "r4", made / "r2")
    first, second = (dict(lora_layers(open_model(made / name, "numpy"))) for name in ("r4", "r2"))
    phi = []
    for path, layer in first.items():
        U, V = (np.linalg.svd(x.lora_A.data.astype(np.float64), full_matrices=False)[0] for x in (layer, second[path]))
        phi.append([[np.linalg.norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j) for j in (1, 2)] for i in (1, 2, 3, 4)])
    shown = [[float(x) for x in row] for row in rows(text, "φ(i, j), median of 16 layers").values()]
    np.testing.assert_allclose(shown, np.median(phi, axis=0), rtol=1e-3)
    equal = [[float(x) for x in row] for row in rows(text, "φ(k, k) of every layer").values()]
    np.testing.assert_allclose(equal, [np.diag(p) for p in np.array(phi)[:, :2]], rtol=1e-3)
    assert "The rank r" not in text
    assert '<tr class="differs"><th scope="row">r</th><td>4</td><td>2</td></tr>' in text
    assert '<tr><th scope="row">batch_size</th><td>2</td><td>2</td></tr>' in text


def test_the_change_of_a_fully_trained_model_is_tuned_less_base(made, page):
    table = rows(page(made / "full"), "every change")
    base, tuned = ml.load_model("pydoc", "numpy"), ml.load_model(made / "full" / "model", "numpy")
    before, after = dict(base.parameters()), dict(tuned.parameters())
    assert len(table) == 16
    for path, cells in table.items():
        W, dW = (
            x.astype(np.float64) for x in (before[f"{path}.weight"].data, after[f"{path}.weight"].data - before[f"{path}.weight"].data)
        )
        U, S, Vt = np.linalg.svd(dW)
        inside = np.linalg.norm(U[:, :8].T @ W @ Vt[:8].T)
        np.testing.assert_allclose(float(cells[3]), np.linalg.norm(dW), rtol=2e-3)
        np.testing.assert_allclose(float(cells[8]), np.linalg.norm(S[:8]) / inside, rtol=5e-3)


def test_the_change_of_dora_is_what_it_adds_to_the_weight(made, page):
    table = rows(page(made / "dora"), "every change")
    for path, layer in lora_layers(open_model(made / "dora", "numpy")):
        np.testing.assert_allclose(float(table[path][3]), np.linalg.norm(layer.delta()), rtol=2e-3)


def test_a_head_drawn_at_random_is_no_change_of_the_base(made, page):
    table = rows(page(made / "classes-full"), "every change")
    assert table
    assert "classifier" not in table


# ---- what is recorded ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1e3, 1e-3])
def test_norms_are_those_before_clipping_and_before_the_update(clip, backend):
    batches, expected = [some_batch([6, 5, 8], seed) for seed in range(7)], []
    model = tiny().to(backend)
    optimizer = ml.AdamW(model.parameters(), 1e-2)
    other = tiny()
    for step, s in enumerate(train(model, optimizer, iter(batches), 7, lambda step: 1.0, clip=clip, norms_every=3, check_every=1), start=1):
        batch = batches[step - 1]
        other.loss_backward(other.loss(batch.ids, batch.labels, batch.offsets)[1])
        own = [p for _, p in other.parameters() if p.trainable]
        expected = [[np.linalg.norm(p.grad) for p in own], [np.linalg.norm(p.data) for p in own]]
        assert (s.norms is not None) == (step in (1, 4, 7))
        if s.norms is not None:
            np.testing.assert_allclose(s.norms, expected, rtol=1e-5, atol=1e-12)
            np.testing.assert_allclose(np.linalg.norm(s.norms[0]), s.grad_norm, rtol=1e-6)
        for p in own:
            p.grad = None
        for (_, p), (_, q) in zip(other.parameters(), model.parameters(), strict=True):
            p.data = ml.to_numpy(q.data).copy()


def test_a_run_keeps_its_norms_and_the_page_shows_them(made, page):
    first, *lines = [json.loads(line) for line in (made / "r4" / "norms.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (made / "r4" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, step in zip(lines, metrics, strict=True):
        assert np.linalg.norm(line["grad_norms"]) == pytest.approx(step["grad_norm"], rel=1e-5)
    names = first["parameters"]
    at = {name: i for i, name in enumerate(names)}
    text = page(made / "r4")
    heat = rows(text, "Gradient norm by layer")
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    assert list(heat) == [layer.removeprefix("transformer.") for layer in layers]
    for layer in layers:
        own = [i for name, i in at.items() if name.rpartition(".")[0] == layer]
        expected = [math.sqrt(sum(line["grad_norms"][i] ** 2 for i in own)) for line in lines]
        np.testing.assert_allclose([float(x) for x in heat[layer.removeprefix("transformer.")]], expected, rtol=1e-3)
    for caption, kind, letters in (("Norms of the gradients dA and dB", "grad_norms", "AB"), ("Norms of A and B", "norms", "AB")):
        for line, cells in zip(lines, rows(text, caption).values(), strict=True):
            own = [[line[kind][i] for name, i in at.items() if name.endswith(f"lora_{x}")] for x in letters]
            expected = [value for x in own for value in (min(x), np.median(x), max(x))]
            np.testing.assert_allclose([float(x) for x in cells], expected, rtol=1e-3)


def test_the_loss_is_shown_in_the_unit_of_the_headline(made, page):
    metrics = [json.loads(line) for line in (made / "r4" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] / math.log(2) for step in metrics]
    shown = rows(page(made / "r4"), "Loss")
    np.testing.assert_allclose([float(cells[0]) for cells in shown.values()], losses, rtol=1e-3)
    np.testing.assert_allclose(
        [float(cells[1]) for cells in shown.values()], [np.mean(losses[max(0, i - 4) : i + 1]) for i in range(6)], rtol=1e-3
    )
    classes = [json.loads(line)["loss"] for line in (made / "classes" / "metrics.jsonl").read_text().splitlines()]
    shown = rows(page(made / "classes"), "Loss")
    np.testing.assert_allclose([float(cells[0]) for cells in shown.values()], classes, rtol=1e-3)


def test_confusion_matrices_are_scikit_learns(made, page):
    stored = json.loads((made / "classes" / "confusion.json").read_text())
    model = open_model(made / "classes", "numpy")
    task = task_of(model, str(made / "classes"), None, tokenizer_source=str(made / "classes"), split=None, say=lambda text: None)
    labels = np.concatenate([b.labels for b in task.held_out])

    def predicted():
        return np.concatenate([model.forward(b.ids, keep=False, offsets=b.offsets)[0].argmax(axis=1) for b in task.held_out])

    for when in ("before", "after"):
        if when == "before":
            with disabled(model):
                guess = predicted()
        else:
            guess = predicted()
        k = max(labels.max(), guess.max()) + 1
        if when == "after":
            np.testing.assert_array_equal(stored[when], confusion_matrix(labels, guess, labels=range(k)))
        assert np.sum(stored[when]) == len(labels)
    results = json.loads((made / "classes" / "run.json").read_text())["results"]
    for when in ("before", "after"):
        C = np.array(stored[when])
        assert np.trace(C) / C.sum() == pytest.approx(results[when]["accuracy"])
    text = page(made / "classes")
    assert text.count('<td class="heat') == 2 * 9  # three classes, also those that do not occur
    assert "&lt;yes&gt;" in text
    assert "<yes>" not in text


def test_a_long_run_is_averaged_to_a_thousand_points(copy, page):
    folder = copy("r4")
    lines = [{"step": i, "loss": 0.001 * i, "lr": 1.0, "grad_norm": None, "tokens": 1} for i in range(1, 2501)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = rows(page(folder), "Loss")
    assert len(shown) == 834  # means of three
    assert list(shown)[:2] == ["2", "5"]
    assert [float(cells[0]) for cells in shown.values()][:2] == pytest.approx([0.002 / math.log(2), 0.005 / math.log(2)], rel=1e-3)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.1, 2.9), (-3e-9, 5e-9), (1e6, 7e6), (5, 5), (0, 0), (1e-300, 2e-300)])
def test_ticks_are_round_and_enclose_the_numbers(low, high):
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high * (1 - 1e-12)
    assert len(found) <= 9
    steps = np.diff(found)
    if len(steps):
        np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
        assert f"{steps[0]:.0e}"[0] in "125"


# ---- bad input -----------------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_one_sentence(made, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere", made / "r4" / "adapter"):
        assert main(["report", str(folder)]) == 1
        assert f"{folder} is not the folder of a run" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 1
    assert "run.json is not valid JSON" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "run.json"]


def test_runs_of_different_models_are_not_compared(made, tmp_path, capsys):
    assert main(["report", str(made / "r4"), str(made / "classes"), "--out", str(tmp_path / "x.html")]) == 1
    error = capsys.readouterr().err
    assert "adapt no layer of the same name and shape, so they cannot be compared (pydoc and " in error
    assert error.splitlines()[-1].startswith("minilora: error: ")
    assert not (tmp_path / "x.html").exists()


def test_a_file_that_exists_is_not_overwritten_but_the_default_is(copy, capsys):
    folder = copy("r4")
    for _ in range(2):
        assert main(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"file": str(folder / "report.html"), "missing": {"r4": []}}
    (folder / "mine.html").write_text("mine")
    assert main(["report", str(folder), "--out", str(folder / "mine.html")]) == 1
    assert "mine.html is in use; name another file with --out" in capsys.readouterr().err
    assert (folder / "mine.html").read_text() == "mine"


def test_an_unfinished_run_says_so(copy, page):
    folder = copy("r4")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"results": {"stopped_after_step": 3}}))
    assert "The run did not finish" in page(folder)
    assert len(page.missing) == 1
    for name in ("metrics.jsonl", "norms.jsonl", "samples.txt"):
        (folder / name).unlink()
    shutil.rmtree(folder / "adapter")
    text = page(folder)
    assert page.missing == [
        "metrics.jsonl cannot be read: it is not there.",
        "norms.jsonl, with the norms by layer, cannot be read: it is not there.",
        "The run did not finish, so there are no figures, samples or predictions of held-out data.",
        "No change of a weight matrix is known, so there are no singular values.",
    ]
    assert "There are no steps to show." in text
    (folder / "run.json").write_text("{}")
    assert "unknown model" in page(folder)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2, "lo', "metrics.jsonl cannot be read: line 2 is not valid JSON"),
        ("metrics.jsonl", "", "metrics.jsonl cannot be read: it is empty."),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl cannot be read: line 1 must hold a JSON object, not list."),
        (
            "metrics.jsonl",
            '{"step": 1, "loss": "x"}\n{"step": 2, "loss": NaN}\n',
            "The loss of 2 of 2 steps is not finite, first at step 1.",
        ),
        ("metrics.jsonl", '{"step": 1, "loss": null, "grad_norm": Infinity}\n{"step": 2, "loss": 1}\n', "The loss of 1 of 2 steps"),
        (
            "norms.jsonl",
            '{"parameters": ["a", "b"]}\n{"step": 1, "grad_norms": [1], "norms": [1]}\n',
            "it has not two numbers for each parameter",
        ),
        (
            "norms.jsonl",
            '{"parameters": ["a"]}\n{"step": 1, "grad_norms": [1], "norms": [1]}\n{"step"',
            "cannot be read: line 3 is not valid JSON",
        ),
        ("norms.jsonl", '{"step": 1}\n', "norms.jsonl, with the norms by layer, cannot be read"),
        ("norms.jsonl", b"\xff\xfe", "cannot be read: line 1 is not valid JSON"),
        ("samples.txt", "# prompt\nx\n", "samples.txt cannot be read: it has no prompt, before and after."),
        ("samples.txt", b"\xff", "samples.txt cannot be read"),
        ("adapter/adapter_config.json", "{", "The adapter cannot be read"),
        ("adapter/adapter_model.safetensors", "x", "The adapter cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(name, content, sentence, copy, page):
    folder = copy("r4")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    text = page(folder)
    assert any(sentence in found for found in page.missing)
    assert html.escape(sentence) in html.unescape(text) or sentence in html.unescape(text)
    assert "2.7" in text  # the held-out figures


@pytest.mark.parametrize("content", ["{}", '{"before": [[1]], "after": [1]}', '{"before": [[1, 2]], "after": [[1]]}', "[", '{"before": 3}'])
def test_a_damaged_confusion_matrix_is_named(content, copy, page):
    folder = copy("classes")
    (folder / "confusion.json").write_text(content)
    assert "The run has no samples and no confusion matrix." in page(folder)
    assert page.missing[0].startswith("confusion.json cannot be read")


def test_figures_of_another_type_are_dashes(copy, page):
    folder = copy("r4")
    record = json.loads((folder / "run.json").read_text())
    record["results"] |= {"seconds": "long", "saved_bytes": None, "trainable_parameters": [], "tokens_per_second": 0}
    (folder / "run.json").write_text(json.dumps(record))
    assert "– s" in page(folder)


def test_without_the_base_model_only_the_amplification_is_missing(copy, page):
    folder = copy("classes")
    with_base = rows(page(folder), "every change")
    model = json.loads((folder / "run.json").read_text())["configuration"]["model"]
    for file in ("run.json", "adapter/adapter_config.json"):
        (folder / file).write_text((folder / file).read_text().replace(model, "gone"))
    without = rows(page(folder), "every change")
    assert page.missing[0].startswith("The base model, which the amplification needs, cannot be read")
    assert len(page.missing) == 1
    assert without.keys() == with_base.keys()
    for path, cells in without.items():
        known = {0, 1, 3, 5}  # shape, rank, ||dW||, effective rank
        assert [cells[i] for i in known] == [with_base[path][i] for i in known]
        assert {cells[i] for i in range(9) if i not in known} == {"–"}


def test_a_method_without_matrices_has_no_singular_values(made, page):
    text = page(made / "bitfit")
    assert page.missing == ["No change of a weight matrix is known, so there are no singular values."]
    assert "Gradient norm by layer" in text


def test_without_jinja2_the_error_names_the_extra(made, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    assert main(["report", str(made / "r4")]) == 1
    assert "minilora report needs jinja2: pip install 'minilora[html]'" in capsys.readouterr().err


# ---- the page ------------------------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_without_references(made, page):
    for runs in (["r4"], ["classes"], ["r4", "r2"]):
        text = page(*(made / name for name in runs))
        assert not re.search(r"<(script|link(?! rel=\"icon\" href=\"data:,\")|img|iframe|object)\b|@import|url\(", text)
        assert {link for link in re.findall(r'(?:href|src)="([^"]*)"', text) if link[0] != "#"} == {"data:,"}
        ids = re.findall(r'\bid="([^"]*)"', text)
        assert len(ids) == len(set(ids))
        assert {link[1:] for link in re.findall(r'href="(#[^"]*)"', text)} <= set(ids)
        pictures = re.findall(r'<svg [^>]*role="img".*?</svg>', text, re.DOTALL)
        assert len(pictures) >= 10
        assert all("<title" in p and "<desc" in p for p in pictures)
        assert text.count('role="img"') == text.count("<summary>Numbers") - ("everything that was measured" in text) - len(runs)


def test_a_page_that_leaves_itself_is_found_out(tmp_path):
    (tmp_path / "bad.html").write_text(
        '<!doctype html><html lang="en"><title>x</title><main><h1>x</h1><p style="color:#999;background:#fff">grey</p>'
        '<img alt="" src="https://example.org/x.png"><script>console.error("oh"); null.x</script></main></html>'
    )
    with chromium() as browser:
        page = browser.open(tmp_path / "bad.html")
        problems = "\n".join(page.problems())
        assert "request for https://example.org/x.png" in problems
        assert "console.error: oh" in problems
        assert "exception: TypeError" in problems
        assert [found.split(":")[0] for found in page.violations()] == ["color-contrast"]


@pytest.mark.parametrize("runs", [["r4"], ["classes"], ["r4", "r2"], ["bitfit"]], ids=" ".join)
def test_the_page_in_a_browser(runs, made, tmp_path):
    report_run(*(made / name for name in runs), out=tmp_path / "page.html")
    with chromium() as browser:
        for dark in (False, True) if runs in (["r4"], ["classes"]) else (True,):
            page = browser.open(tmp_path / "page.html", dark=dark)
            assert page.js("getComputedStyle(document.body).backgroundColor") == ("rgb(14, 17, 22)" if dark else "rgb(245, 246, 248)")
            page.js("document.querySelectorAll('details').forEach(d => d.open = d.querySelectorAll('td').length < 100)")
            assert page.violations() == []
            assert page.problems() == []
        results = json.loads((made / runs[0] / "run.json").read_text())["results"]
        name = results["headline"]
        assert f"{results['before'][name]:.4g} → {results['after'][name]:.4g}" in page.text("#result")
        assert "Norms of A and B" in page.text("#layers") or runs == ["bitfit"]
        assert ("Confusion matrix after" if "classes" in runs else "def read_config") in page.text("#outputs")
        assert page.js("document.documentElement.scrollWidth <= innerWidth")
        for picture in page.js(
            "[...document.querySelectorAll('svg[role=img]')].map(s => [s.querySelector('title').textContent, s.getBBox().width])"
        ):
            assert picture[1] > 100, picture[0]


def test_the_page_is_usable_with_the_keyboard_and_on_a_phone(made, tmp_path):
    report_run(made / "r4", out=tmp_path / "page.html")
    with chromium() as browser:
        page = browser.open(tmp_path / "page.html", width=390, height=800)
        assert page.js("document.documentElement.scrollWidth <= innerWidth")
        assert page.press("Tab") == "a: Skip to the content"
        page.press("Enter")
        assert page.press("Tab").startswith("summary: Numbers")
        page.press("Enter")
        assert page.js("document.activeElement.parentElement.open")
        assert page.press("Tab").startswith("div: Table: ")
