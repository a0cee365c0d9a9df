"""Measurements of speed and memory, and of the quality of LoRA against full fine-tuning. Each prints a table and one line of JSON:

    python -m benchmarks.dense [--targets all]          GPT-2 small, every token labelled
    python -m benchmarks.classification                 MiniLM, snippets of film reviews
    python -m benchmarks.completions [--random]         SmolLM2, prompts and completions
    python -m benchmarks.epochs                         MiniLM, 20 epochs on 200 sentences, LoRA in the top two layers
    python -m benchmarks.toy                            a small MLP
    python -m benchmarks.straight                       the same against a straight line of NumPy calls
    python -m benchmarks.start                          process start to first step
    python -m benchmarks.generation [--random]          tokens per second
    python -m benchmarks.full_vs_lora_step              full fine-tuning against LoRA, both minilora
    python -m benchmarks.growth                         time and memory against tokens, rank, layers, vocabulary
    python -m benchmarks.cpu                            all of these, into benchmarks/results/cpu-<processor>.json
    python -m benchmarks.footprint                      memory and time of a step of models up to 8B, counted and measured
    python -m benchmarks.lora_vs_full                   share of full fine-tuning's improvement that LoRA reaches

All but the last two need the extra `oracle` for the rivals (pip install 'minilora[oracle]'); --help lists the options.
"""

import minilora  # noqa: F401  (before NumPy is loaded: it names OpenBLAS's kernels, where they have been measured)
