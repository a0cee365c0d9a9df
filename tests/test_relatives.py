"""Llama with scaled rotary frequencies, Mistral, Qwen3, SmolLM3 and Gemma 3 against transformers and PEFT."""

import json
from itertools import pairwise

import numpy as np
import pytest
from golden.make_adapters import ADAMW, quietly
from oracle import deviation
from safetensors import safe_open
from test_llama import TOLERANCE, assign, by_prefix

import minilora as ml
from minilora.models import KVCache, Llama, LlamaConfig
from minilora.models.generate import generate
from minilora.models.llama_config import VARIANTS

with safe_open(__file__.replace("test_relatives.py", "golden/relatives.safetensors"), "np") as file:
    ABOUT = json.loads(file.metadata()["about"])
    GOLDEN = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
OFFSETS = [0, 5, 6, 29]
IN_FILE = list(ABOUT["configs"])
CASES = """llama3 | linear | dynamic | yarn | yarn, all settings | yarn, attention factor | qwen3 | qwen3, biases, windows | qwen2, windows
    mistral | mistral, no window | smollm3 | smollm3, windows, biases | gemma3 | gemma3, biases""".replace("\n   ", " |").split(" | ")


def adapted(golden, config, dtype="float64"):
    """Our model with the weights and the adapters of a case."""
    model = Llama(LlamaConfig.from_json(config), rng=0, dtype=dtype)
    base, lora = by_prefix(golden, "base:"), by_prefix(golden, "lora:")
    assert {path for path, _ in model.parameters()} == base.keys()  # minilora's paths equal those of the checkpoint
    assign(model, base, dtype)
    ml.inject(model, ml.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"), rng=0)
    assert {path for path, p in model.parameters() if p.trainable} == lora.keys()
    assign(model, lora, dtype)
    return model


def deviations(model, golden, backend="numpy"):
    """{name: largest deviation relative to the largest value} of logits, loss and the gradients of all adapters."""
    model.to(backend)
    expected = {"logits": golden["logits"], "loss": golden["loss"][0], **by_prefix(golden, "grad:")}
    logits, _ = model.forward(golden["ids"], keep=False, offsets=OFFSETS)
    loss, saved = model.loss(golden["ids"], golden["labels"], OFFSETS)
    model.loss_backward(saved)
    found = {"logits": logits, "loss": loss, **{path: p.grad.T for path, p in model.parameters() if p.trainable}}
    assert found.keys() == expected.keys()
    return {what: float(abs(ml.to_numpy(found[what]) - e).max() / abs(e).max()) for what, e in expected.items()}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", IN_FILE)
def test_golden(name, dtype, backend):
    golden = {key.partition("|")[2]: value for key, value in GOLDEN.items() if key.startswith(f"{name}|")}
    found = deviations(adapted(golden, ABOUT["configs"][name], dtype), golden, backend)
    worst = max(found, key=found.get)
    assert found[worst] < TOLERANCE[dtype], f"{worst}: {found[worst]:.1e}"


# -- live -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def oracles():
    """The module that makes the golden file, whose models are transformers' and whose adapters are PEFT's."""
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'minilora[oracle]'")
    from golden import make_relatives

    return make_relatives


@pytest.fixture(scope="session")
def folders(oracles, tmp_path_factory):
    """Folders of transformers' models, by case."""
    folder = tmp_path_factory.mktemp("relatives")
    for name in oracles.CASES:
        quietly(oracles.base_model(name, False).float().save_pretrained, folder / name)
    return {name: folder / name for name in oracles.CASES}


def test_the_cases_are_those_of_the_oracles(oracles):
    assert list(oracles.CASES) == CASES
    assert {case["model_type"] for case in oracles.CASES.values()} == set(VARIANTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_live(name, oracles):
    """In float64, and in float32 as transformers computes it."""
    golden = {key: value.numpy() for key, value in oracles.tensors(name).items()}
    config = oracles.base_model(name).config.to_dict()
    found = deviations(adapted(golden, config), golden)
    assert max(found.values()) < 1e-10, found

    golden |= {key: value.numpy() for key, value in oracles.run(oracles.adapted_model(name, exact=False).float(), name).items()}
    found = deviations(adapted(golden, config, "float32"), golden)
    assert max(found.values()) < 1e-5, found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_config_that_is_written(name, oracles):
    import transformers

    raw = oracles.base_model(name).config.to_dict()
    config = LlamaConfig.from_json(raw)
    theirs = transformers.AutoConfig.for_model(**config.to_json()).to_dict()
    ours = {"architectures", "dtype", "id2label", "initializer_range", "transformers_version"}
    assert [key for key in raw.keys() - ours if theirs[key] != raw[key]] == []
    assert LlamaConfig.from_json(theirs) == config == LlamaConfig.from_json(config.to_json())


def their_logits(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids[None]), use_cache=False).logits[0].numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IN_FILE)
def test_adapters_go_both_ways_and_thirty_steps_match_peft(name, oracles, folders, tmp_path):
    import peft
    import torch

    theirs = oracles.adapted_model(name, exact=False).float()
    theirs.save_pretrained(tmp_path / "theirs")
    ids, labels = (x.numpy() for x in oracles.batch(name))
    model = ml.load_model(folders[name], "numpy")
    ml.load_adapter(model, tmp_path / "theirs")
    expected = their_logits(theirs, ids)
    assert deviation(model.forward(ids, keep=False)[0], expected) < 1e-5
    assert np.abs(ml.load_model(folders[name], "numpy").forward(ids, keep=False)[0] - expected).max() > 0.1

    options = ADAMW | {"lr": 3e-3}
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **options)
    our_optimizer = ml.AdamW(model.parameters(), **options)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = oracles.run(theirs, name)["loss"]  # and backward
        optimizer.step()
        our_loss, saved = model.loss(ids, labels, OFFSETS)
        model.loss_backward(saved)
        our_optimizer.step()
        our_optimizer.zero_grad()
        losses.append((float(our_loss), float(loss)))
    ours, expected = np.array(losses).T
    assert np.abs(ours / expected - 1).max() < 1e-4
    assert expected[-1] < 0.9 * expected[0]

    ml.save_adapter(model, tmp_path / "ours")
    base = oracles.base_model(name, exact=False).float()
    read = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert deviation(their_logits(read, ids), model.forward(ids, keep=False)[0]) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_merged_folder_and_greedy_tokens_match_transformers(name, oracles, folders, tmp_path):
    """From 6 tokens to 32: beyond the windows and the original length. With a cache, as without one."""
    import torch
    import transformers

    ids = oracles.batch(name)[0].numpy()
    model = ml.load_model(folders[name], "numpy")
    ml.inject(model, ml.LoraConfig(r=2, init_lora_weights=False), rng=0)
    ml.merge(model)
    ml.save_model(model, tmp_path / "m")
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info[key] for key in info), info
    assert deviation(their_logits(merged.eval(), ids), model.forward(ids, keep=False)[0]) < 1e-5
    prompt = torch.tensor(ids[None, :6])
    sampling = {"max_new_tokens": 26, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    expected = merged.generate(prompt, **sampling)[0, 6:].tolist()
    assert list(generate(model, ids[:6], 26, 0.0)) == expected
    text = [*ids[:6].tolist()]
    for _ in range(26):
        text.append(int(model.forward(np.array(text), keep=False)[0][-1].argmax()))
    assert text[6:] == expected
    cache, at = KVCache(block=5), [0, 3, 4, 15, 16, 29]
    logits = model.forward(ids, keep=False)[0]
    for a, b in pairwise(at):
        assert deviation(model.decode(ids[a:b], cache), logits[b - 1]) < 1e-5
    with pytest.raises(ValueError, match="33 tokens is longer than the model's 32 positions"):
        model.decode(ids[:4], cache)
