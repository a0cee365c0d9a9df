"""Text, records, batches and packing."""

TASKS = ("lm", "classify")  # of records: to be continued, or texts with a class
