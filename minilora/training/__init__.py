"""Optimizers, schedules, data, replicas and the loop."""
