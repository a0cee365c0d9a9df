"""Text, records, batches and packing."""

TASKS = {  # of records: to be continued, or texts with a class; and the fields that each needs
    "lm": 'the field "text", or "prompt" and "completion", or "messages"',
    "classify": 'the fields "text" and "label"',
}
