"""Optimizers over one flat buffer, schedules and clipping."""
