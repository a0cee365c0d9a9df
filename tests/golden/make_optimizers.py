"""Write optimizers.json: 12 clipped steps of each torch optimizer. Needs the extra `oracle`.

python tests/golden/make_optimizers.py
"""

import json
from pathlib import Path

import torch

KINDS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "sgd nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}),
}


def main() -> None:
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 3, generator=generator), torch.randn(2, 3, generator=generator)
    out = {"torch": torch.__version__, "start": start.tolist(), "target": target.tolist(), "runs": {}}
    for name, (kind, options) in KINDS.items():
        w = torch.nn.Parameter(start.clone())
        optimizer = kind([w], **options)
        steps = []
        for _ in range(12):
            optimizer.zero_grad()
            ((w - target) ** 4).mean().backward()
            torch.nn.utils.clip_grad_norm_([w], 0.5)
            optimizer.step()
            steps.append(w.detach().tolist())
        out["runs"][name] = {"options": options, "steps": steps}
    Path(__file__).with_name("optimizers.json").write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
