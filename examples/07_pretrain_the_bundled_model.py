"""Train the model that is bundled with the package: a byte-level GPT-2 of 0.86 M parameters.

    python examples/07_pretrain_the_bundled_model.py [folder]        15 to 20 minutes on two cores

The text is the English of `pydoc_data.topics`, Python's built-in help, which every installation has. The same Python, NumPy
and number of threads reproduce the file bit for bit; other Python versions have a slightly different text.
"""

import hashlib
import math
import sys
from itertools import islice
from pydoc_data.topics import topics

import numpy as np
from tqdm import tqdm

from minilora.data.batches import held_out_windows, random_windows
from minilora.formats.checkpoint import save_model
from minilora.models import GPT2, GPT2Config
from minilora.optim.flat import clip_grad_norm
from minilora.optim.optimizers import AdamW
from minilora.optim.schedules import schedule
from minilora.training.evaluate import evaluate
from minilora.training.replicas import Replicas

STEPS, BATCH, WINDOW, THREADS, SEED = 2400, 16, 256, 2, 0


def main(folder: str = "pydoc") -> None:
    text = np.frombuffer("\n\n\n".join(topics[key] for key in sorted(topics)).encode(), dtype=np.uint8)
    print(f"{len(text):,} bytes, sha256 {hashlib.sha256(text.tobytes()).hexdigest()[:16]}, Python {sys.version.split()[0]}")
    held_out, train = text[: len(text) // 20], text[len(text) // 20 :]

    model = GPT2(GPT2Config(vocab_size=256, n_positions=WINDOW, n_embd=128, n_layer=4, n_head=4, dropout=0.05), rng=SEED)
    optimizer = AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    rate = schedule("cosine", STEPS, warmup=100)
    batches = random_windows(train, WINDOW, BATCH, np.random.default_rng(SEED))

    with Replicas(model, optimizer.flat, THREADS) as replicas, tqdm(total=STEPS, unit="step") as bar:
        for step, batch in enumerate(islice(batches, STEPS)):
            optimizer.lr = 3e-3 * rate(step)
            loss = replicas.gradients([batch], seed=(SEED, step))
            clip_grad_norm(optimizer.flat, 1.0)
            optimizer.step()
            bar.update()
            if (step + 1) % 200 == 0:
                nats, _ = evaluate(model, held_out_windows(held_out, WINDOW, 4), THREADS)
                bar.write(f"step {step + 1}: bits per byte {float(loss) / math.log(2):.3f} training, {nats / math.log(2):.3f} held out")

    save_model(model, folder, dtype="float16")
    print(f"written to {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
