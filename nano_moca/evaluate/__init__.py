"""A trained model in use (embedder.py), and its scores (command.py says which, and how)."""

# ruff: noqa: F401
from nano_moca.evaluate.command import main
