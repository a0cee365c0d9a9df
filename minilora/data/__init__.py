"""Text, records, batches and packing."""
