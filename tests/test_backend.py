"""The choice between NumPy and CuPy, transfers, and the work that a training step gives to a GPU."""

import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import fakecupy
import numpy as np
import pytest

import minilora as ml
from minilora import backend as door
from minilora.cli import main
from minilora.data.batches import Batch
from minilora.functional import dropout_mask
from minilora.kernels import cuda, memory
from minilora.optim.flat import clip_grad_norm
from minilora.training.replicas import Replicas

# -- the module of an array -----------------------------------------------------------------------------------------


def test_get_xp_names_the_module(xp, on, backend):
    x = on([1.0, 2.0])
    assert door.get_xp(None, x, x.T, None) is xp
    assert door.backend_name(x) == backend
    assert door.backend_name(x.sum()) == backend  # a NumPy scalar or a 0-d array
    assert door.get_xp() is np


def test_get_xp_refuses_mixed_and_unknown_arrays(fake_cupy):
    x = fake_cupy.ones(2)
    with pytest.raises(TypeError, match=r"NumPy and CuPy are mixed; move the layer with layer\.to"):
        door.get_xp(np.ones(2), None, x)
    with pytest.raises(TypeError, match=r"mixed"):
        ml.Linear(2, 2).forward(x.reshape(1, 2))
    with pytest.raises(TypeError, match="expected a NumPy or CuPy array, got list"):
        door.get_xp([1.0])


def test_unknown_arrays_are_refused_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(TypeError, match="expected a NumPy or CuPy array, got float"):
        door.get_xp(1.0)


def test_round_trip_between_host_and_device(backend, rng):
    x = rng.standard_normal((3, 4)).astype("float32")
    there = door.to_backend(x, backend)
    assert door.backend_name(there) == backend
    assert there.dtype == np.float32
    back = door.to_numpy(there)
    assert type(back) is np.ndarray
    np.testing.assert_array_equal(back, x)
    assert door.to_backend(there, backend) is there  # nothing to convert, nothing copied
    assert door.to_backend(x, backend, "float64").dtype == np.float64
    assert door.to_backend(there, "numpy", "float16").dtype == np.float16
    assert door.to_numpy(there.sum()).shape == ()
    with pytest.raises(ValueError, match="unknown backend 'jax'"):
        door.to_backend(x, "jax")


def test_as_like_keeps_the_dtype(on, backend):
    like = on(np.ones(3, "float32"))
    ids = door.as_like(np.array([1, 2]), like)
    assert (door.backend_name(ids), ids.dtype) == (backend, np.int64)
    assert door.as_like(ids, like) is ids


def test_memory_and_synchronisation(backend):
    assert sys.platform == "win32" or memory.peak_memory("numpy") > 2**20
    door.synchronize(backend)
    assert memory.peak_memory(backend) >= 0


def test_synchronize_waits_for_the_device(fake_cupy, monkeypatch):
    monkeypatch.setattr(memory, "_most_held", 0)
    with fakecupy.count() as c:
        door.synchronize("numpy")
        assert c.syncs == 0
        door.synchronize("cupy")
    assert c.syncs == 1
    assert memory.peak_memory("cupy") == fakecupy.POOL_BYTES


# -- choosing a backend ---------------------------------------------------------------------------------------------


def no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # makes `import cupy` fail


def for_another_cuda(monkeypatch):
    """A cupy that is installed but cannot be imported."""
    folder = Path(tempfile.mkdtemp())
    (folder / "cupy.py").write_text("raise ImportError('libnvrtc.so.12: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(str(folder))


def no_driver(monkeypatch):
    def fail():
        raise OSError("cudaErrorInsufficientDriver")

    monkeypatch.setitem(sys.modules, "cupy", fakecupy.module)
    monkeypatch.setattr(fakecupy.module.cuda.runtime, "getDeviceCount", fail)
    monkeypatch.setattr(fakecupy.module.cuda.runtime, "driverGetVersion", lambda: 0)


def old_driver(monkeypatch):
    no_driver(monkeypatch)
    monkeypatch.setattr(fakecupy.module.cuda.runtime, "driverGetVersion", lambda: 12040)


def old_gpu(monkeypatch, capability="61"):
    monkeypatch.setitem(sys.modules, "cupy", fakecupy.module)
    monkeypatch.setattr(fakecupy.module.cuda, "Device", lambda: SimpleNamespace(compute_capability=capability))


def no_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fakecupy.module)
    monkeypatch.setattr(fakecupy.module.cuda.runtime, "getDeviceCount", lambda: 0)


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (no_package, ImportError, r"pip install 'minilora\[cuda13\]'"),
        (for_another_cuda, ImportError, r"cannot be imported \(libnvrtc.so.12.*is it for another CUDA"),
        (no_driver, RuntimeError, r"no usable NVIDIA driver; cudaErrorInsufficientDriver; install one"),
        (old_driver, RuntimeError, r"no usable NVIDIA driver; it is of CUDA 12, CuPy of CUDA 13: update it, or use"),
        (old_gpu, RuntimeError, r"not support this GPU; its compute capability is 6.1, and this CUDA needs 7.5. pip install"),
        (lambda m: old_gpu(m, "35"), RuntimeError, r"compute capability is 3.5, and this CUDA needs 7.5"),
        (no_device, RuntimeError, "sees no GPU; is CUDA_VISIBLE_DEVICES empty"),
    ],
)
def test_an_unusable_cupy_is_reported(broken, error, message, monkeypatch, capsys):
    broken(monkeypatch)
    for ask in (lambda: door.choose_backend("cupy"), lambda: door.to_backend(np.ones(2), "cupy"), lambda: ml.Linear(2, 2).to("cupy")):
        with pytest.raises(error, match=message):
            ask()
    assert door.choose_backend("numpy") == "numpy"
    assert door.choose_backend("auto", quiet=True) == "numpy"
    assert capsys.readouterr() == ("", "")

    assert door.choose_backend("auto") == "numpy"
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("backend: numpy (CuPy ")
    assert err.count("\n") == 1

    assert main(["gradcheck", "linear", "--backend", "cupy"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("minilora: error: ")
    assert err.count("\n") == 1
    assert "--backend numpy" in err or "pip install" in err


def test_auto_chooses_a_working_cupy(fake_cupy, capsys):
    assert door.choose_backend() == "cupy"
    assert door.choose_backend("cupy") == "cupy"
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="unknown backend 'gpu'; choose auto, numpy or cupy"):
        door.choose_backend("gpu")


# -- equal numbers on both backends ---------------------------------------------------------------------------------

SMALL = ml.GPT2Config(vocab_size=50, n_positions=16, n_embd=12, n_layer=2, n_head=2)


def adapted_model(backend, dropout=0.0, dtype="float32"):
    """A small GPT-2 on a backend, with LoRA injected there; B is not zero, so that A gets a gradient."""
    model = ml.GPT2(SMALL, rng=5).to(backend, dtype)
    ml.inject(model, ml.LoraConfig(r=3, init_lora_weights=False, lora_dropout=dropout), rng=7)
    return model


def batch():
    """Two sequences of 7 and 10 tokens; no weight has a dimension of 17."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 50, 17)
    labels[[3, 11]] = -100
    return Batch(rng.integers(0, 50, 17), labels, np.array([0, 7, 17]))


def test_equal_seeds_give_equal_weights(backend):
    here = dict(adapted_model(backend).parameters())
    for path, p in adapted_model("numpy").parameters():
        assert door.backend_name(here[path].data) == backend
        np.testing.assert_array_equal(ml.to_numpy(here[path].data), p.data, err_msg=path, strict=True)


def test_the_default_generator_can_be_reseeded():
    ml.seed(3)
    a, b = ml.Linear(4, 4), ml.Linear(4, 4)
    ml.seed(3)
    np.testing.assert_array_equal(ml.Linear(4, 4).weight.data, a.weight.data)
    assert not np.array_equal(a.weight.data, b.weight.data)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_equal_keys_give_equal_dropout_masks(xp, dtype):
    for key in (0, 12345, 2**64 - 1, 3**50):
        here, there = (dropout_mask(module.empty(0, dtype), (7, 9), 0.3, key) for module in (xp, np))
        np.testing.assert_array_equal(ml.to_numpy(here), there, strict=True)


def test_a_step_with_dropout_is_equal_on_both_backends(backend):
    def step(where):
        model = adapted_model(where, dropout=0.2, dtype="float64")
        optimizer = ml.AdamW(model.parameters(), lr=1e-2)
        with Replicas(model, optimizer.flat) as replicas:
            loss = replicas.gradients([batch()], seed=(3, 0))
        norm = clip_grad_norm(optimizer.flat, 0.1)
        optimizer.step()
        return [float(loss), float(norm), *ml.to_numpy(optimizer.flat.data)]

    np.testing.assert_allclose(step(backend), step("numpy"), rtol=1e-8, atol=1e-12)


# -- the work of a step on the device -------------------------------------------------------------------------------


@contextmanager
def counted(model):
    """Count, and set `c.frozen`: the frozen weights for which a product of their shape or its transpose was formed."""
    with fakecupy.count() as c:
        yield c
    shapes = {path: tuple(p.data.shape) for path, p in model.parameters() if p.data.ndim == 2 and ".lora_" not in path}
    c.frozen = {path for path, shape in shapes.items() if shape in c.products or shape[::-1] in c.products}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_lora_step_neither_synchronises_nor_forms_dW(fake_cupy, dropout):
    model = adapted_model("cupy", dropout)
    optimizer = ml.AdamW(model.parameters(), lr=1e-3)
    b = batch()
    with counted(model) as c:
        loss, saved = model.loss(b.ids, b.labels, b.offsets)
        model.loss_backward(saved)
        clip_grad_norm(optimizer.flat, 1.0)
        optimizer.step()
    assert (c.syncs, c.to_host) == (0, 0)
    assert c.frozen == set()
    assert len(c.products) > 50
    assert c.launches > len(c.products)
    assert c.bytes < 1000  # only token ids, positions and labels go to the device
    assert isinstance(loss, fake_cupy.ndarray)


def test_the_count_detects_a_full_step(fake_cupy):
    """With all parameters trainable, each dense weight and the tied embedding has its dW formed; reading the loss synchronises."""
    model = adapted_model("cupy").unfreeze()
    b = batch()
    with counted(model) as c:
        loss, saved = model.loss(b.ids, b.labels, b.offsets)
        model.loss_backward(saved)
        float(loss)
    assert "transformer.wte.weight" in c.frozen
    assert (c.syncs, c.to_host) == (1, 1)


def test_a_frozen_linear_forms_one_product_forward_and_one_backward(fake_cupy, rng):
    layer = ml.Linear(6, 4).to("cupy").freeze()
    x, dy = (fake_cupy.asarray(rng.standard_normal(shape)) for shape in ((5, 6), (5, 4)))
    with fakecupy.count() as c:
        _, saved = layer.forward(x)
        layer.backward(dy, saved)
    assert c.products == [(5, 4), (5, 6)]
    with fakecupy.count() as c:
        _, saved = layer.unfreeze().forward(x.astype("float32"))
        layer.backward(dy.astype("float32"), saved)
    assert c.products == [(5, 4), (6, 4), (5, 6)]


# -- modules that an import loads -----------------------------------------------------------------------------------


def loaded_by(code):
    """The modules that a fresh Python loads for `code`, beyond those at its start."""
    lines = f"import sys, json; before = set(sys.modules)\n{code}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def packages(modules):
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)


def beyond_numpy(modules):
    """The packages among them that are neither in the standard library nor loaded by NumPy."""
    return packages(modules) - packages(loaded_by("import numpy.random"))


def test_import_minilora_loads_numpy_at_most():
    modules = loaded_by("import minilora")
    assert beyond_numpy(modules) == {"minilora"}
    assert not [name for name in modules if name.startswith(("minilora.training", "minilora.formats", "minilora.cli"))]


def test_building_and_training_a_layer_loads_only_numpy():
    modules = loaded_by(
        "import minilora as ml, numpy as np\n"
        "layer = ml.LoRALinear(ml.Linear(4, 4), r=2)\n"
        "y, saved = layer.forward(np.ones((3, 4), 'float32'))\n"
        "layer.backward(y, saved)\n"
        "ml.SGD(layer.parameters(), lr=0.1).step()\n"
        "ml.choose_backend('numpy')"
    )
    assert beyond_numpy(modules) == {"minilora"}


LAUNCHES = {"GPT-2": 76, "Llama": 112}  # launches of a block with LoRA on all linear layers, forward and backward; quoted in README.md


@pytest.mark.skipif(not cuda.ENABLED, reason="counts launches of the CUDA sources, which need g++ here")
@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_per_block(name, fake_cupy):
    """The cost of one additional block; there is no synchronisation, and no transfer after the first step."""

    def step(blocks):
        sizes = {"n_layer": blocks, "n_embd": 12, "n_head": 2} if name == "GPT-2" else {"num_hidden_layers": blocks}
        if name == "GPT-2":
            model = ml.GPT2(ml.GPT2Config(vocab_size=20, n_positions=8, **sizes), rng=0)
        else:
            sizes |= {"hidden_size": 12, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
            model = ml.Llama(ml.LlamaConfig(vocab_size=20, max_position_embeddings=8, **sizes), rng=0)
        ml.inject(model.to("cupy"), ml.LoraConfig(r=2), rng=0)
        optimizer, ids = ml.AdamW(model.parameters(), 1e-3), np.arange(16) % 20
        for _ in range(2):
            with fakecupy.count() as c:
                _, saved = model.loss(ids, ids, [0, 8, 16])
                model.loss_backward(saved)
                optimizer.step()
                optimizer.zero_grad()
        return c

    few, more = step(2), step(4)
    assert (more.syncs, more.to_host) == (0, 0)
    assert more.to_device == few.to_device <= 4  # ids, positions or angles, labels
    assert (more.launches - few.launches) / 2 <= LAUNCHES[name]
