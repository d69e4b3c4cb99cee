"""Command lines: each parses flags and calls one function of `nanochat`."""
