"""Files: checkpoints, adapters, GGUF, tokenizers, chat templates. Knows no training."""
