"""Files: checkpoints, adapters, tokenizers, run folders. Nothing here knows training."""
