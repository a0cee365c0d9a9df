"""A structure-aware fuzzer of every file that minilora reads: `python -m tests.fuzz --help`."""
