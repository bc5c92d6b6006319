"""Prompts: where they are read from, and which of them a training step draws."""
