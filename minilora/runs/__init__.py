"""What a verb of the command line does; Python users call the same functions."""
