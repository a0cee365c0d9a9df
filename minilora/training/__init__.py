"""The loop, replicas, evaluation and metrics."""
