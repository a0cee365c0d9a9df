"""A new architecture is one file and one line: the file is the first half of this one, the line is in the fixture."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

import minilora as ml
from minilora.checking.subjects import LossOf
from minilora.formats.atomic import read_json
from minilora.layers import Embedding, Layer, Linear, RMSNorm, Tanh
from minilora.models.config_file import ModelConfig
from minilora.models.decoder import Decoder
from minilora.models.generate import generate
from minilora.models.registry import ARCHITECTURES, Architecture
from minilora.models.stack import Body, Parts

# -- the file ---------------------------------------------------------------------------------------------------------------------


@dataclass
class TinyConfig(ModelConfig):
    vocab_size: int = 11
    max_position_embeddings: int = 8
    width: int = 6
    depth: int = 2

    fixed: ClassVar = {"activation": ("tanh",)}

    def __post_init__(self):
        self.check()


class TinyBlock(Layer):
    """y = x + tanh(x W + b).   x (T, d) -> y (T, d), or its `rows`."""

    def __init__(self, c, rng, dtype):
        self.dense, self.act = Linear(c.width, c.width, rng=rng, dtype=dtype), Tanh()

    def forward(self, x, keep=True, need_dx=True, offsets=None, rows=None, extend=None):
        x_rows = x if rows is None else x[rows]
        at_z = need_dx or self.dense.trainable
        z, s_dense = self.dense.forward(x_rows, keep=keep and at_z, need_dx=need_dx)
        a, s_act = self.act.forward(z, keep=keep and at_z)
        return x_rows + a, self.save(need_dx, rows, len(x), s_dense, s_act) if keep else None

    def backward(self, dy, saved, need_dx=True):
        rows, T, s_dense, s_act = self.load(saved, need_dx)
        dz = self.act.backward(dy, s_act)  #                         y = x + tanh(z)
        dx = self.dense.backward(dz, s_dense, need_dx=need_dx)  #    z = x W + b
        if not need_dx:
            return None
        dx = dy + dx  #                                              x feeds y twice
        if rows is None:
            return dx
        dx_all = np.zeros((T, dx.shape[1]), dx.dtype)
        dx_all[rows] = dx
        return dx_all


class TinyBody(Body):
    def __init__(self, c, rng, dtype):
        super().__init__(c)
        self.words = Embedding(c.vocab_size, c.width, rng=rng, dtype=dtype)
        self.blocks = [TinyBlock(c, rng, dtype) for _ in range(c.depth)]
        self.norm = RMSNorm(c.width, dtype=dtype)

    def parts(self):
        return Parts([self.words], self.blocks, self.norm)

    def embed(self, ids, places, keep):
        return self.words.forward(ids, keep=keep)

    def embed_backward(self, dx, saved):
        self.words.backward(dx, saved)


class Tiny(Decoder):
    model_type = "tiny"

    def __init__(self, config, *, rng=None, dtype="float32"):
        self.config, rng = config, np.random.default_rng(rng) if rng is None or isinstance(rng, int) else rng
        self.tiny = TinyBody(config, rng, dtype)

    @property
    def body(self):
        return self.tiny


# -- the line ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", Architecture(TinyConfig, Tiny, ("TinyLM",), "tiny.", "tiny.words.weight"))


# -- what follows -----------------------------------------------------------------------------------------------------------------

IDS = np.array([1, 5, 2, 10, 0, 7, 7])
OFFSETS = [0, 4, 7]
LABELS = np.array([5, 2, 10, -100, 7, 7, -100])


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of the new architecture."""
    ml.save_model(Tiny(TinyConfig(), rng=0), tmp_path / "m")
    return tmp_path / "m"


def test_it_is_written_and_loaded(folder):
    assert read_json(folder / "config.json")["architectures"] == ["TinyLM"]
    model = ml.load_model(folder, "numpy")
    assert isinstance(model, Tiny)
    expected, _ = Tiny(TinyConfig(), rng=0).forward(IDS, keep=False)
    np.testing.assert_array_equal(model.forward(IDS, keep=False)[0], expected)
    assert len(list(generate(model, IDS[:3], 9))) == 9


def test_it_is_adapted_trained_and_its_adapter_saved(folder, tmp_path):
    model = ml.load_model(folder, "numpy")
    ml.inject(model, ml.LoraConfig(r=2, target_modules="all-linear"), rng=0)
    optimizer = ml.AdamW([(path, p) for path, p in model.parameters() if p.trainable], 1e-2)
    losses = []
    for _ in range(5):
        loss, saved = model.loss(IDS, LABELS, OFFSETS)
        optimizer.zero_grad()
        model.loss_backward(saved)
        optimizer.step()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    ml.save_adapter(model, tmp_path / "adapter")
    again = ml.load_model(folder, "numpy")
    ml.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_array_equal(again.forward(IDS, keep=False)[0], model.forward(IDS, keep=False)[0])


@pytest.mark.parametrize("adapted", [False, True])
def test_its_gradients_are_right(adapted):
    model = Tiny(TinyConfig(), rng=0, dtype="float64")
    if adapted:
        ml.inject(model, ml.LoraConfig(r=2, target_modules=["dense"], layers_to_transform=[1], layers_pattern="blocks"), rng=0)
    for layer in (model, LossOf(model, LABELS)):
        report = ml.gradcheck(layer, IDS, offsets=OFFSETS)
        assert report.ok, str(report)


def test_its_config_is_checked(folder):
    with pytest.raises(ValueError, match=r"here: TinyConfig: width must be a positive integer, got 0"):
        TinyConfig.from_json({"width": 0}, "here")
    with pytest.raises(ValueError, match=r"here has activation 'relu'; supported: tanh"):
        TinyConfig.from_json({"activation": "relu"}, "here")


def test_a_mixture_that_differs_in_the_last_norm_has_no_loss():
    """The norm gets the labelled rows alone, and could not tell to which model they belong."""
    base = Tiny(TinyConfig(), rng=0).freeze()
    other = base.replica()
    ml.inject(other, ml.PartialConfig(train=["norm"]))
    other.body.norm.weight.data = other.body.norm.weight.data + 1
    mixture = ml.mixed([base, other], [1, 0], OFFSETS)
    assert mixture.forward(IDS, keep=False, offsets=OFFSETS)[0].shape == (7, 11)
    with pytest.raises(ValueError, match="the batch it was made for has 7"):
        mixture.loss(IDS, LABELS, OFFSETS)
