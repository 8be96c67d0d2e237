"""Checkpoints as Hugging Face folders."""
