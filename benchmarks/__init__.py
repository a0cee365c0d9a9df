"""Measurements of speed and memory, and of what LoRA gains. Each prints a table, then one line of JSON:

    python -m benchmarks.dense [--targets all]          GPT-2 small, every token labelled
    python -m benchmarks.classification                 MiniLM, snippets of film reviews
    python -m benchmarks.completions [--random]         SmolLM2, prompts and completions
    python -m benchmarks.epochs                         MiniLM, 20 epochs on 200 sentences, LoRA in the top two layers
    python -m benchmarks.toy                            a small MLP
    python -m benchmarks.start                          process start to first step
    python -m benchmarks.generation [--random]          tokens a second
    python -m benchmarks.full_vs_lora_step              both ours
    python -m benchmarks.growth                         time and memory against tokens, rank, layers, vocabulary
    python -m benchmarks.cpu                            all of these, into benchmarks/results/cpu.json
    python -m benchmarks.lora_vs_full                   what LoRA gains of what full fine-tuning gains

All but the last need the extra `oracle` for the rivals (pip install 'minilora[oracle]'); --help tells the options.
"""
