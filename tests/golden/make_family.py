"""Write the folder family: adapters of other methods than LoRA, made by PEFT for the golden Llama, with their logits and gradients.

python tests/golden/make_family.py        (needs the extra `oracle`)
"""

import json
import shutil
from pathlib import Path

import numpy as np
from make_adapters import IDS, adapted, base, logits, options, quietly

FOLDER = Path(__file__).with_name("family")
NAMES = options("llama")["names"]
LORA = {
    "dora": NAMES | {"use_dora": True, "use_rslora": True},
    "embedding": options("llama")["embedding adapted"],
    "pissa": NAMES | {"init_lora_weights": "pissa", "r": 3},  # not perturbed: the comparison is about the initial values
}
VERA = {key: NAMES[key] for key in ("target_modules", "task_type", "fan_in_fan_out")} | {"r": 5, "save_projection": False}


def gradients(model) -> dict[str, np.ndarray]:
    """{path: gradient} of the mean next-token loss on the first golden batch."""
    import torch

    ids = torch.from_numpy(IDS[0])
    model.zero_grad()
    out = quietly(model, input_ids=ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(out.reshape(-1, out.shape[-1]), ids[:, 1:].reshape(-1)).backward()
    names = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    return {name.replace(".default.weight", "").replace(".default", ""): p.grad.numpy() for name, p in names.items()}


def vera():
    """A PEFT model with VeRA, perturbed at random."""
    import peft
    import torch

    model = quietly(peft.get_peft_model, base("llama"), quietly(peft.VeraConfig, **VERA))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def main() -> None:
    from safetensors.numpy import load_file, save_file

    shutil.rmtree(FOLDER, ignore_errors=True)
    expected = {}
    for what, model in {**{what: adapted("llama", f, None if what == "pissa" else 5) for what, f in LORA.items()}, "vera": vera()}.items():
        quietly(model.save_pretrained, FOLDER / what, save_embedding_layers=False)
        expected[f"{what}.logits"] = logits(model)
        if what != "pissa":
            expected |= {f"{what}.gradient.{path}": g for path, g in gradients(model).items()}
    save_file(expected, FOLDER / "expected.safetensors")
    tensors = load_file(FOLDER / "pissa" / "adapter_model.safetensors")
    save_file(tensors, FOLDER / "pissa.safetensors")
    shutil.rmtree(FOLDER / "pissa")
    for stray in FOLDER.rglob("README.md"):
        stray.unlink()
    for path in FOLDER.rglob("adapter_config.json"):  # PEFT writes sets in arbitrary order
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"target_modules": sorted(config["target_modules"])}, indent=2) + "\n")


if __name__ == "__main__":
    main()
