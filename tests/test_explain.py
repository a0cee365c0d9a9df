"""minilora explain: every operation, every layer and model of the catalogue; the numbers against the arrays; lines; pages; bad input."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from browser import chromium
from counting import Counted, counting

import minilora as ml
from minilora import kernels as K
from minilora.checking.catalogue import catalogue
from minilora.checking.trace import arrays_in, owner, trace
from minilora.cli import main
from minilora.explain import code as source
from minilora.explain.costs import counted, predicted, saved_formula
from minilora.explain.docstring import sizes_of
from minilora.explain.explain import explain
from minilora.explain.formulas import formulas
from minilora.explain.lines import lines_of, undone
from minilora.explain.worked import grid_of, worked
from minilora.functional import gelu_tanh, gelu_tanh_backward, layer_norm, layer_norm_backward, lora_linear, lora_linear_backward
from minilora.models.block import PreNormBlock

SUBJECTS = list(catalogue())
NAMES = [name for name, *_ in SUBJECTS]


def close(a, b, tolerance):
    return abs(a - b) <= tolerance * max(abs(a), abs(b), 1e-3)


def ran(layer, x, options, arrays=False):
    """The calls of one pass, forward and backward."""
    with trace(layer, arrays) as calls:
        y, saved = layer.forward(x, **options)
        layer.backward(np.random.default_rng(0).standard_normal(np.shape(y)), saved)
    return calls


# ---- what is counted ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(SUBJECTS)), ids=NAMES)
def test_formulas_of_cost_equal_what_is_counted_while_it_runs(number):
    _, layer, x, options = SUBJECTS[number]
    x = x.view(Counted) if x.dtype.kind == "f" else x
    with counting(layer) as count:
        ran(layer, x, options)  # what a layer computes once and keeps
        count.flops = 0
        calls = ran(layer, x, options)
    roots = [c for c in calls if c.parent is None]
    assert sum(counted(root)[kind] for root in roots for kind in ("forward", "dx", "dW")) == count.flops
    for call in (c for c in calls if c.is_operation and not c.children and c.during == "forward"):
        for kind in ("forward", "dx", "dW", "skipped"):
            parts = predicted(call).get(kind, "0").replace(" - ", " + -").split(" + ")
            total = sum(int(np.prod([call.flops.sizes.get(s) or int(s) for s in part.split()])) for part in parts)
            assert total == getattr(call.flops, kind), (call.place, kind)
    total = 0
    for call in calls:
        docs = source.doc(call)
        sizes = sizes_of(docs.letters, call.shapes)
        total += bytes_of(saved_formula(call.kept, docs, sizes), sizes)
    assert total == sum(c.bytes_saved for c in calls) == sum(map(held_by, roots))


def bytes_of(formula, sizes):
    """The value of a formula such as "4 T m (x) + 8·14"."""
    terms = [re.findall(r"\w+", term.partition(" (")[0]) for term in formula.split(" + ") if term]
    return sum(int(np.prod([int(a) if a.isdigit() else sizes[a] for a in term])) for term in terms)


def held_by(root):
    """Bytes of the arrays in what a call saved, each once, without those of parameters."""
    own = {id(owner(p.data)) for _, p in root.layer.parameters()}
    return sum(a.nbytes for i, a in {id(owner(a)): owner(a) for a in arrays_in(root.saved)}.items() if i not in own)


# ---- worked numbers -------------------------------------------------------------------------------------------------------------------


def check_worked(call, i, j):
    """Every number that is worked out equals the array's and its finite difference. Returns how many were compared."""
    compared = 0
    for entry in worked(call, i, j):
        assert np.isfinite(entry["value"])
        if entry["array"] is not None:
            assert close(entry["value"], entry["array"], 1e-9), (call.place, entry["formula"])
            compared += 1
        if "finite_difference" in entry:
            assert close(entry["value"], entry["finite_difference"], 1e-5), (call.place, entry["formula"])
    return compared


@pytest.mark.parametrize("number", range(len(SUBJECTS)), ids=NAMES)
def test_worked_numbers_equal_the_arrays_in_the_catalogue(number):
    _, layer, x, options = SUBJECTS[number]
    rng = np.random.default_rng(number)
    for call in [c for c in ran(layer, x, options, arrays=True) if c.is_operation and c.name in formulas()]:
        if call.name == "dora_linear" and call.args.get("mask") is not None:
            continue  # another formula, which is not worked out
        rows, columns = grid_of(call)
        for _ in range(3 if x.dtype.kind == "f" else 1):  # a model calls each operation several times
            assert check_worked(call, int(rng.integers(rows)), int(rng.integers(columns))) > 0


@pytest.mark.parametrize("name", K.TABLE)
def test_every_operation_is_explained(name):
    said = []
    result = explain(name, say=said.append)
    assert result["operation"] == name
    assert result["equation"]
    assert result["worked"]
    assert result["code"] or name in ("add", "multiply")
    for entry in result["worked"]:
        assert entry["array"] is None or close(entry["value"], entry["array"], 1e-9)
        assert "finite_difference" not in entry or close(entry["value"], entry["finite_difference"], 1e-5)
    has_gradient = K.TABLE[name].kernels[-1].backward is not None or "cross_entropy" in name
    assert has_gradient == any("finite_difference" in entry for entry in result["worked"])
    assert "one number" in "\n".join(said)


def test_every_place_of_the_bundled_model_is_explained():
    model = ml.load_model("pydoc", "numpy")
    for path in [
        path for path, _ in model.modules() if (path and not path.startswith("transformer.h.")) or path.startswith("transformer.h.2")
    ]:
        result = explain(path, feature=3)
        assert result["place"] == path
        for entry in result["worked"]:
            assert "finite_difference" not in entry or close(entry["value"], entry["finite_difference"], 1e-5), (path, entry)


def test_a_block_adds_up():
    result = explain("h.1", token=2, feature=1)
    values = {entry["name"]: entry["value"] for entry in result["worked"]}
    assert {"x + attn", "x + attn + mlp", "dy + ln_2.dx", "dy + ln_2.dx + ln_1.dx", "dx"} <= values.keys()
    assert values["dy + ln_2.dx + ln_1.dx"] == values["dx"]
    assert [child["place"] for child in result["children"]][:3] == ["ln_1", "attn", "drop_1"]


def test_every_term_of_a_sum_in_a_composite_has_a_name(tmp_path):
    result = explain("encoder.layer.0", save_small("bert", tmp_path), "a man eating food")
    names = [entry["name"] for entry in result["worked"]]
    assert names[:3] == ["x + dense", "LayerNorm + output.dense", "output.LayerNorm.dx + intermediate.dense.dx"]
    assert not any("?" in name for name in names)
    assert result["about"].endswith("(R, d)")


def test_lora_beside_full_fine_tuning():
    costs = explain("lora")["costs"]
    lora, full = costs["LoRA"], costs["fully trained"]
    assert lora["formulas"]["skipped"] == full["formulas"]["dW"] == "2 T m n"
    assert lora["formulas"]["dW"] == "2 T m r + 2 T r n"
    assert lora["dW"] < full["dW"]
    assert lora["formulas"]["saved"] == "4 T r (u) + 4 T m (x)"
    assert (lora["trained"], full["trained"]) == (8 * (128 + 128), 128 * 128 + 128)


# ---- a step ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["lora", "h.2.mlp.c_fc"])
def test_a_step_changes_the_number_as_worked_out(place):
    result = explain(place, step=True)
    gradient, update = result["worked"][1], result["worked"][-1]
    assert gradient["value"]
    assert close(gradient["value"], gradient["finite_difference_of_loss"], 1e-5)
    assert update["value"] == pytest.approx(result["after"], rel=1e-12)
    assert result["after"] != result["before"]
    assert result["loss_after"] < result["loss"]
    assert [row["name"] for row in result["way"]][:2] == ["linear_cross_entropy", "GPT2.loss"]
    assert result["way"][-1]["place"] == f"{result['place']}/lora_linear"
    assert len([row for row in result["way"] if row["name"] == "Block"]) == 4 - (2 if place != "lora" else 0)


# ---- lines ----------------------------------------------------------------------------------------------------------------------------


def facing(forward, backward):
    """{backward line: the forward lines that it undoes}, as texts."""
    lines, back = lines_of(forward), lines_of(backward)
    pairs = zip(back, undone(lines, back), strict=True)
    return {b.text.strip(): [lines[k].text.strip() for k in found] for b, found in pairs if found}


def test_lines_that_quote_the_line_they_undo_face_it():
    pairs = facing(lora_linear, lora_linear_backward)
    assert pairs['dB = (s * u).T @ dy if "dB" in need else None'] == ["y += (s * u) @ B"]
    assert pairs["dA = (x if mask is None else x * mask).T @ du"] == ["u = (x if mask is None else x * mask) @ A"]
    assert pairs["du = s * (dy @ B.T)"] == ["y += (s * u) @ B"]  # it quotes nothing: u is read there
    pairs = facing(layer_norm, layer_norm_backward)
    assert pairs["along = (dxhat * xhat).mean(axis=1, keepdims=True)"] == ["xhat = centred * rstd"]
    assert pairs['dbeta = dy.sum(axis=0) if "dbeta" in need else None'] == ["return gamma * xhat + beta, (xhat, rstd)"]


def test_lines_that_call_backward_face_the_call():
    pairs = facing(PreNormBlock.forward, PreNormBlock.backward)
    assert pairs["da = attn.backward(da, s_attn, need_dx=at_a)"][0].startswith("a, s_attn = attn.forward(a,")
    assert pairs["dm: Any = self.drop_2.backward(dy, s_drop_2, need_dx=at_y)"][-1] == "y = K.add(h, m)"
    assert pairs["dh = K.add(dy, dh)"] == ["y = K.add(h, m)"]


def test_a_line_that_is_computed_again_undoes_nothing():
    pairs = facing(gelu_tanh, gelu_tanh_backward)
    assert list(pairs) == ["dz = _C * (1 + 3 * 0.044715 * x * x)", "return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * dz)"]


@pytest.mark.parametrize("name", [name for name, op in K.TABLE.items() if op.kernels[-1].backward is not None])
def test_every_backward_has_a_line_that_faces_another(name):
    code = explain(name)["code"][0]
    assert any(line["undoes"] for line in code["backward"])


# ---- other models, and bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["gpt2", "llama", "tied", "bert"])
def folder(request, tmp_path):
    """A small model in a folder, with a byte tokenizer or a small one."""
    return save_small(request.param, tmp_path)


def save_small(kind, folder):
    from small_tokenizers import library_bpe, library_wordpiece

    sizes = {**tiny.SIZES, "vocab_size": 400, "max_position_embeddings": 16, "hidden_size": 12}
    if kind == "gpt2":
        model = ml.GPT2(ml.GPT2Config(vocab_size=400, n_positions=16, n_embd=12, n_layer=2, n_head=3), rng=0)
    elif kind == "bert":
        model = ml.BertClassifier(ml.BertConfig(**sizes | {"vocab_size": 10}, intermediate_size=9, num_labels=3), rng=0)
    else:
        model = ml.Llama(ml.LlamaConfig(**sizes, intermediate_size=9, tie_word_embeddings=kind == "tied"), rng=0)
    ml.save_model(model, folder / "model")
    (library_wordpiece() if kind == "bert" else library_bpe()).save(str(folder / "model" / "tokenizer.json"))
    return folder / "model"


def test_another_model(folder):
    text = "a man eating food" if "bert" in json.loads((folder / "config.json").read_text())["model_type"] else "the cat sat"
    for place in ("lora", "attention"):
        for entry in explain(place, folder, text)["worked"]:
            assert entry["array"] is None or close(entry["value"], entry["array"], 1e-9)
            assert "finite_difference" not in entry or close(entry["value"], entry["finite_difference"], 1e-5)
    step = explain(model=folder, text=text, step=True)
    assert close(step["worked"][1]["value"], step["worked"][1]["finite_difference_of_loss"], 1e-4)
    assert step["worked"][-1]["value"] == pytest.approx(step["after"], rel=1e-12)


def test_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'minilora[gguf]'")
    from test_gguf import random_model, small, write
    from test_tokenizer import metadata

    file = tmp_path / "model.gguf"
    model = random_model(small(vocab_size=400, max_position_embeddings=16, intermediate_size=64))
    about = {f"tokenizer.ggml.{name}": value for name, value in metadata().items()}
    write(file, model, {"proj": gguf.GGMLQuantizationType.Q8_0}, about)
    for place in ("lora", "layers.1.self_attn.q_proj", "layers.1", "attention"):
        worked = [entry for entry in explain(place, file, "the cat sat")["worked"] if "finite_difference" in entry]
        assert worked
        assert all(close(entry["value"], entry["finite_difference"], 1e-5) for entry in worked)
    step = explain(model=file, text="the cat sat", step=True)
    assert step["worked"][-1]["value"] == pytest.approx(step["after"], rel=1e-12)


def test_two_arrays_of_one_shape_have_their_own_names(tmp_path):
    costs = explain("swiglu", save_small("llama", tmp_path), "the cat sat")["costs"]
    assert sorted(costs["LoRA"]["formulas"]["saved"].split(" + ")) == ["4 T n (g)", "4 T n (u)"]


def test_what_is_printed_where_there_is_no_argument_or_no_result():
    said = []
    for place in ("cross_entropy", "adamw", "transformer", "add"):
        explain(place, say=said.append)
    text = "\n".join(said)
    assert "backward  computed by forward  ->  dlogits (T, V) = (6, 5)" in text
    assert "v (n) = (5,)  ->  written in place" in text
    assert "backward  dy (13, 128)  ->  gradients of parameters" in text
    assert "backward  not called: it has no backward function" in text
    assert text.count("cost, example") == 2
    assert text.count("cost, LoRA") == 2


def test_a_composite_says_in_which_order_backward_is_called():
    orders = {child["place"]: child["backward"] for child in explain("h.1")["children"]}
    assert sorted(orders, key=lambda name: orders[name] or 0) == ["add", "drop_2", "mlp", "ln_2", "drop_1", "attn", "ln_1", "take_rows"]


def test_a_run_is_explained_with_its_own_adapter(tmp_path):
    model = ml.load_model("pydoc", "numpy")
    ml.inject(model, ml.LoraConfig(r=3, target_modules=["c_fc"], base_model_name_or_path="pydoc"), rng=0)
    for path, p in model.parameters():
        p.data = p.data + 0.01 if path.endswith("lora_B") else p.data
    ml.save_adapter(model, tmp_path / "adapter")
    result = explain("lora", tmp_path / "adapter")
    assert result["place"] == "transformer.h.0.mlp.c_fc/lora_linear" or result["place"].endswith("c_fc/lora_linear")
    assert result["sizes"]["r"] == 3
    assert str(tmp_path / "adapter") in result["note"]


@pytest.mark.parametrize("kind", ["dora", "vera", "bottleneck"])
def test_other_adapters(kind, tmp_path):
    of = {"base_model_name_or_path": "pydoc", "target_modules": ["c_attn"]}
    configs = {"dora": ml.LoraConfig(r=2, use_dora=True, **of), "vera": ml.VeraConfig(r=4, **of), "bottleneck": ml.BottleneckConfig(**of)}
    model = ml.load_model("pydoc", "numpy")
    ml.inject(model, configs[kind], rng=0)
    for _, p in model.parameters():
        p.data = p.data + 0.01 if p.trainable else p.data
    ml.save_adapter(model, tmp_path / "adapter")
    for place in ("h.1.attn.c_attn", "h.1"):
        result = explain(place, tmp_path / "adapter")
        assert len(result["worked"]) > 1
        for entry in result["worked"]:
            held = kind == "dora" and entry["name"].endswith("lora_A")  # DoRA's own gradient holds the norms of the columns
            assert held or "finite_difference" not in entry or close(entry["value"], entry["finite_difference"], 1e-4), entry
    with pytest.raises(ValueError, match="this model trains no LoRALinear"):
        explain(model=tmp_path / "adapter", step=True)


BAD = {
    "a place that is not there": (["transformer.h.0.attn.c_atn"], "nearest are transformer.h.0.attn.c_attn,"),
    "a place of several": (["c_attn"], "transformer.h.0.attn.c_attn, transformer.h.1.attn.c_attn"),
    "a token out of range": (["lora", "--token", "13"], "no token 13; choose one from 0 to 12"),
    "a negative feature": (["lora", "--feature", "-1"], "no feature -1; choose one from 0 to 127"),
    "a text that is too long": (["--text", "x" * 300], "the text has 300 tokens, and pydoc takes 256 at most"),
    "a text that is too short": (["--text", "x"], "must have two tokens or more, as the loss is that of the next token; this has 1."),
    "a step of what is not adapted": (["h.0.ln_1", "--step"], "transformer.h.0.ln_1 has no LoRA for a step to change"),
    "no model": (["--model", "nowhere"], "there is no model at nowhere"),
    "a page that is there": (["--html", "setup.cfg"], "setup.cfg is in use"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg").write_text("")
    argv, message = BAD[case]
    assert main(["explain", *argv]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_a_model_without_lora_has_no_step(tmp_path, capsys):
    model = ml.load_model("pydoc", "numpy")
    ml.inject(model, ml.PartialConfig(train=["bias"], base_model_name_or_path="pydoc"), rng=0)
    ml.save_adapter(model, tmp_path / "adapter")
    assert main(["explain", "--model", str(tmp_path / "adapter"), "--step"]) == 1
    assert "this model trains no LoRALinear, so there is no step to explain" in capsys.readouterr().err


# ---- the command and the page ---------------------------------------------------------------------------------------------------------


def test_json_has_every_term_of_a_sum(capsys):
    assert main(["explain", "lora", "--token", "2", "--feature", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    dA = next(entry for entry in result["worked"] if entry["name"] == "dA")
    assert len(dA["terms"]) == 13
    assert sum(dA["terms"]) == pytest.approx(dA["value"])
    assert (result["token"], result["feature"], dA["index"]) == (2, 3, [3, 3])


def test_the_page_works_alone_and_by_keyboard(tmp_path):
    explain("lora", html=tmp_path / "lora.html", token=2, feature=3)
    explain("h.1", html=tmp_path / "block.html")
    explain(step=True, html=tmp_path / "step.html")
    with chromium() as browser:
        for name in ("lora", "block", "step"):
            for dark in (False, True):
                page = browser.open(tmp_path / f"{name}.html", dark=dark)
                assert page.problems() == []
                assert page.violations() == []
        page = browser.open(tmp_path / "lora.html")
        assert "dA[3,3] = Σ_t x[t,3] du[t,3]" in page.text("#work")
        lit = "[...document.querySelectorAll('.lit')].map(e => e.dataset.name || e.querySelector('code').innerText.trim())"
        page.js("document.querySelectorAll('.code.forward [tabindex]')[0].focus()")
        page.press("ArrowDown")
        assert page.js(lit) == ["x", "A", "dx", "dA", *page.js(lit)[4:]]
        assert "u = (x if mask is None else x * mask) @ A" in page.js(lit)
        assert "dA = (x if mask is None else x * mask).T @ du" in page.js(lit)
        page.js("document.querySelector('input[name=token]:checked').focus()")
        page.press("ArrowRight")
        assert "y[3,3] = " in page.text("#work")
        assert page.problems() == []


def test_the_page_says_what_the_terminal_says(tmp_path):
    said = []
    result = explain("attention", html=tmp_path / "page.html", say=said.append)
    page, terminal = (tmp_path / "page.html").read_text(), "\n".join(said)
    for entry in result["worked"]:
        assert f"{entry['value']:.8g}" in page
        assert f"{entry['value']:.8g}" in terminal
    assert "http" not in page.replace("http-equiv", "")


def test_the_page_of_the_docs_is_what_is_printed():
    root = Path(__file__).parent.parent
    spec = importlib.util.spec_from_file_location("outputs", root / "docs" / "outputs.py")
    outputs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outputs)
    page = (root / "docs" / "explain.md").read_text(encoding="utf-8")
    hidden = [re.sub(r"\(?-?\d[\d.,e+-]*\)?", "#", text) for text in (page, outputs.filled(page))]  # numbers differ by rounding
    assert hidden[0] == hidden[1]
    assert "linear\n" + "\n".join(formulas()["linear"]) in page
