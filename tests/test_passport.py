"""Adapters for other programs: exported, read back, refused before anything is trained, described, and published."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import library_bpe

import minilora as ml
from minilora.cli import main
from minilora.formats.gguf import in_halves
from minilora.formats.gguf_header import read_header
from minilora.formats.passport import readers, verdict
from minilora.lora import lora_layers
from minilora.lora.variants.vera import VeraConfig
from minilora.runs.run_file import open_model

ROOT = Path(__file__).parent.parent
IDS = np.arange(3, 30)
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 40}
BASES = "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text"
ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"]},
    "patterns": {"r": 4, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 1.5}},
    "one block": {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "o_proj"], "layers_to_transform": [1], "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "gate_proj"], "use_dora": True},
    "pissa": {"r": 2, "target_modules": ["k_proj"], "init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    here, tokenizer = tmp_path_factory.mktemp("passport"), library_bpe()
    for name in BASES:
        more = {"head_dim": 4} if name in ("qwen3", "gemma3_text") else {}
        more |= {"sliding_window": 64} if name == "mistral" else {}  # mlx-lm does not apply it
        # mlx-lm rounds the root of hidden_size to bfloat16: 4 is exact
        more |= {"sliding_window": 16, "num_hidden_layers": 6, "hidden_size": 16} if name == "gemma3_text" else {}
        config = ml.LlamaConfig(model_type=name, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=64, **SIZES | more)
        ml.save_model(ml.Llama(config, rng=0), here / name)
        tokenizer.save(str(here / name / "tokenizer.json"))
    return here


def adapter(base, out, **config):
    """An adapter with random values, as a folder."""
    model, rng = ml.load_model(base), np.random.default_rng(1)
    ml.inject(model, ml.LoraConfig(base_model_name_or_path=str(base), **config), rng=0)
    for _, layer in lora_layers(model):
        layer.lora_B.data = (layer.lora_B.data + rng.normal(0, 0.1, layer.lora_B.data.shape)).astype(np.float32)
        if config.get("use_dora"):
            layer.lora_magnitude_vector.data = layer.lora_magnitude_vector.data * 1.1
    ml.save_adapter(model, out)
    return logits(model)


def logits(model):
    return model.forward(IDS)[0]


def run(*words):
    assert main([str(word) for word in words]) == 0


def refused(capsys, *words):
    assert main([str(word) for word in words]) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("to", ["peft", "mlx", "gguf"])
def test_an_export_read_back_computes_the_same(kind, to, bases, tmp_path, capsys):
    if to == "gguf":
        pytest.importorskip("gguf")
    expected = adapter(bases / "llama", tmp_path / "adapter", **ADAPTERS[kind])
    out = tmp_path / ("a.gguf" if to == "gguf" else "out")
    if (to, kind) == ("gguf", "dora"):
        error = refused(capsys, "export", tmp_path / "adapter", "--to", to, "--out", out)
        assert "llama.cpp does not read " in error
        assert "DoRA: it has no magnitudes of weights" in error
        assert not out.exists()
        return
    run("export", tmp_path / "adapter", "--to", to, "--out", out)
    model = open_model(bases / "llama", "numpy", out) if to == "gguf" else open_model(out, "numpy")
    assert logits(model) == pytest.approx(expected, abs=1e-6)
    assert abs(expected - logits(ml.load_model(bases / "llama"))).max() > 1e-3


@pytest.mark.parametrize(("base", "interleaved"), [("llama", True), ("smollm3", True), ("qwen2", False), ("gemma3_text", False)])
def test_a_gguf_adapter_is_what_llama_cpp_computes(base, interleaved, bases, tmp_path):
    """W + (alpha / r) B A with the rows of q and k as in a GGUF file of the model: src/llama-graph.cpp, build_lora_mm."""
    pytest.importorskip("gguf")
    adapter(bases / base, tmp_path / "adapter", r=4, lora_alpha=6, target_modules="all-linear", rank_pattern={"k_proj": 2})
    run("export", tmp_path / "adapter", "--to", "gguf", "--out", tmp_path / "a.gguf")
    meta, stored = read_header(tmp_path / "a.gguf")
    assert {key: meta[key] for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")} == {
        "general.type": "adapter", "general.architecture": base.removesuffix("_text"), "adapter.type": "lora", "adapter.lora.alpha": 6.0,
    }  # fmt: skip
    layers = dict(lora_layers(open_model(tmp_path / "adapter", "numpy")))
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}
    for path, name in names.items():
        A, B = (stored[f"blk.2.{name}.weight.lora_{part}"].data.view(np.float32) for part in "ab")
        change = 6 / B.shape[1] * B @ A
        if interleaved and name in ("attn_q", "attn_k"):
            change = in_halves(change, 6 if name == "attn_q" else 2)
        layer = layers[f"model.layers.2.{path}"]
        assert pytest.approx(layer.scaling * layer.lora_A.data @ layer.lora_B.data, abs=1e-6) == change.T
    assert len(stored) == 2 * len(layers)


@pytest.mark.skipif(find_spec("mlx_lm") is None, reason="the oracle mlx-lm: pip install 'mlx[cpu]' mlx-lm")
class TestMlx:
    def theirs(self, base, adapter=None):
        from mlx_lm.utils import load_model

        model = load_model(base)[0]
        if adapter is not None:
            from mlx_lm.tuner.utils import load_adapters

            load_adapters(model, str(adapter))
        return model

    def logits(self, model):
        import mlx.core as mx

        return np.array(model(mx.array(IDS[None]))[0])

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(("base", "kind"), [*(("llama", kind) for kind in ADAPTERS), *((base, "patterns") for base in BASES[1:])])
    def test_mlx_lm_reads_what_is_exported(self, kind, base, bases, tmp_path):
        expected = adapter(bases / base, tmp_path / "adapter", **ADAPTERS[kind])
        run("export", tmp_path / "adapter", "--to", "mlx", "--out", tmp_path / "out")
        assert self.logits(self.theirs(bases / base, tmp_path / "out")) == pytest.approx(expected, abs=1e-4)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", ["lora", "dora"])
    def test_what_mlx_lm_writes_is_read(self, kind, bases, tmp_path):
        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm.tuner.utils import linear_to_lora_layers

        model, about = self.theirs(bases / "llama"), {"rank": 3, "scale": 4.0, "dropout": 0.0}
        model.freeze()
        linear_to_lora_layers(model, 2, {**about, "keys": ["self_attn.q_proj", "mlp.up_proj"]}, use_dora=kind == "dora")
        model.update_modules({})
        values = {name: mx.array(np.random.default_rng(len(name)).normal(0, 0.3, value.shape).astype(np.float32))
                  for name, value in tree_flatten(model.trainable_parameters())}  # fmt: skip
        model.load_weights(list(values.items()), strict=False)
        (tmp_path / "mlx").mkdir()
        mx.save_safetensors(str(tmp_path / "mlx" / "adapters.safetensors"), values)
        config = {"model": str(bases / "llama"), "fine_tune_type": kind, "num_layers": 2, "lora_parameters": about, "seed": 0}
        (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
        assert logits(open_model(tmp_path / "mlx", "numpy")) == pytest.approx(self.logits(model), abs=1e-4)


# -- what is read is said beforehand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reader", "config", "why"),
    [
        ("vllm", {"use_dora": True}, "DoRA"),
        ("vllm", {"modules_to_save": ["lm_head"]}, "modules_to_save (lm_head)"),
        ("vllm", {"rank_pattern": {"q_proj": 2}}, "wrong without an error"),
        ("vllm", {"bias": "all"}, "bias='all'"),
        ("vllm", {"target_modules": ["model.embed_tokens"]}, "an adapter of embed_tokens"),
        ("mlx", {"bias": "lora_only"}, "bias='lora_only'"),
        ("mlx", {"modules_to_save": ["norm"]}, "modules_to_save (norm)"),
        ("llama.cpp", {"use_dora": True}, "DoRA"),
        ("llama.cpp", {"target_modules": ["lm_head"]}, "an adapter of lm_head"),
    ],
)
def test_what_a_reader_refuses(reader, config, why):
    refused, _ = verdict(reader, ml.LoraConfig(**{"target_modules": ["q_proj"], **config}), "llama")
    assert len(refused) == 1
    assert why in refused[0]


def test_plain_lora_is_read_by_all():
    for reader in readers():
        assert verdict(reader, ml.LoraConfig(r=16, target_modules=["q_proj"]), "llama")[0] == []
    assert verdict("vllm", ml.LoraConfig(r=64), "llama") == ([], ["start it with --max-lora-rank 64"])
    assert verdict("peft", ml.BottleneckConfig())[0] == [
        "bottleneck adapters, reduction 16, with layer norms: it has no method of this kind"
    ]
    vera = VeraConfig(r=4, target_modules=["q_proj"])
    assert verdict("peft", vera) == ([], [])
    assert all(verdict(reader, vera, "llama")[0] for reader in ("mlx", "llama.cpp", "vllm"))
    assert "bert" in verdict("mlx", ml.LoraConfig(), "bert")[0][0]


def test_it_is_said_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "use_dora": true}')
    run("info", tmp_path, "--for", "all", "--json")
    found = json.loads(capsys.readouterr().out)["readers"]
    assert {name: bool(each["refused"]) for name, each in found.items()} == {"peft": False, "mlx": False, "llama.cpp": True, "vllm": True}
    assert "choose from peft, mlx, llama.cpp, vllm" in refused(capsys, "info", tmp_path, "--for", "ollama")
    assert "has no adapter" in refused(capsys, "info", tmp_path / "nowhere", "--for", "all")


def test_a_full_fine_tuning_is_to_be_extracted_first(bases, tmp_path, capsys):
    (tmp_path / "run" / "model").mkdir(parents=True)
    for file in (bases / "llama").iterdir():
        (tmp_path / "run" / "model" / file.name).symlink_to(file)
    makes = f"minilora extract {tmp_path / 'run'} --out FOLDER makes one of a fine-tuned model."
    for words in (["info", tmp_path / "run", "--for", "all"], ["export", tmp_path / "run", "--to", "peft", "--out", tmp_path / "a"]):
        assert refused(capsys, *words).endswith(f"{tmp_path / 'run'} has no adapter: there is no adapter_config.json; {makes}")


def test_damaged_adapters_of_other_programs(bases, tmp_path, capsys):
    adapter(bases / "llama", tmp_path / "adapter", **ADAPTERS["plain"])
    run("export", tmp_path / "adapter", "--to", "mlx", "--out", tmp_path / "mlx")
    file = tmp_path / "mlx" / "adapter_config.json"
    good = json.loads(file.read_text())
    for change, why in (
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'; only lora and dora"),
        ({"lora_parameters": {"rank": 4}}, "lora_parameters must be an object with rank and scale"),
        ({"lora_parameters": {"rank": "4", "scale": 1.0}}, "rank"),
        ({"lora_parameters": {"rank": 5, "scale": 1.0}}, "does not fit the model"),
    ):
        file.write_text(json.dumps(good | change))
        assert why in refused(capsys, "generate", tmp_path / "mlx", "--tokens", "1")
    pytest.importorskip("gguf")
    run("export", tmp_path / "adapter", "--to", "gguf", "--out", tmp_path / "a.gguf")
    error = refused(capsys, "generate", bases / "qwen2", "--adapter", tmp_path / "a.gguf", "--tokens", "1")
    assert "is for the architecture 'llama', the model is qwen2" in error
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:200])
    assert "is not a readable GGUF file" in refused(capsys, "generate", bases / "llama", "--adapter", tmp_path / "b.gguf", "--tokens", "1")


def test_the_card_of_a_run(tmp_path):
    """Its head is YAML, and has what PEFT's own cards have; its figures are those of run.json."""
    yaml = pytest.importorskip("yaml")
    flags = "--steps 2 --window 16 --batch-size 2 --eval-bytes 64 --sample-bytes 0 --seed 7 --save-every 0".split()
    run("finetune", *flags, "--out", tmp_path / "run")
    _, head, text = (tmp_path / "run" / "adapter" / "README.md").read_text().split("---\n")[:3]
    assert yaml.safe_load(head) == {"library_name": "peft", "tags": ["minilora", "lora"], "pipeline_tag": "text-generation"}
    results = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    before, after = (results[when]["bits_per_byte"] for when in ("before", "after"))
    assert f"| bits per byte | {before:.4g} | {after:.4g} |" in text
    assert "2 steps, learning rate 0.008 (linear), seed 7, float32" in text
    code = text.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", str(tmp_path / "run" / "adapter"))
    found: dict = {}
    exec(code, found)
    assert len(lora_layers(found["model"])) == 16


# -- published ----------------------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's API that an upload of small files takes."""

    files: dict = {}  # noqa: RUF012
    status = 200
    seen: list = []  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(self.headers.get("Authorization"))
        answer = {"url": f"http://{self.headers['Host']}/me/adapter"}
        if "/preupload/" in self.path:
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/adapter/commit/0", "commitOid": "0" * 40, "success": True}
        self.answer(answer)

    def do_GET(self):
        self.answer({"sha": "0" * 40, "siblings": [], "id": "me/adapter"})

    do_HEAD = do_GET

    def answer(self, value):
        text = json.dumps(value if self.status == 200 else {"error": "no"}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    library = pytest.importorskip("huggingface_hub")
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    Hub.files, Hub.status, Hub.seen = {}, 200, []
    api = library.HfApi
    monkeypatch.setattr(library, "HfApi", lambda: api(endpoint=address, token="hf_secret"))
    yield Hub
    server.shutdown()
    server.server_close()


def test_push(hub, bases, tmp_path, capsys):
    adapter(bases / "llama", tmp_path / "adapter", **ADAPTERS["plain"])
    (tmp_path / "adapter" / "private.log").write_text("not for others")
    run("push", tmp_path / "adapter", "me/adapter")
    assert sorted(hub.files) == ["adapter_config.json", "adapter_model.safetensors"]
    for name, content in hub.files.items():
        assert (tmp_path / "adapter" / name).read_bytes() == content
    assert "Bearer hf_secret" in hub.seen
    hub.status = 401
    error = refused(capsys, "push", tmp_path / "adapter", "me/adapter")
    assert "the hub refuses me/adapter: it wants a token" in error
    assert "secret" not in error
    hub.status = 403
    assert "your token may not write there (HTTP 403)" in refused(capsys, "push", tmp_path / "adapter", "me/adapter")
    assert "is not an id of the hub" in refused(capsys, "push", tmp_path / "adapter", "adapter")
    assert "has no adapter and no model" in refused(capsys, "push", bases, "me/adapter")


def test_the_page_has_the_rules_of_the_table():
    import importlib.util

    spec = importlib.util.spec_from_file_location("passport", ROOT / "docs" / "passport.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text(encoding="utf-8") == page.filled(page.PAGE.read_text(encoding="utf-8"))
    assert page.FEATURES.keys() == {name for rules in readers().values() for part in ("refuses", "needs") for name in rules.get(part, {})}
