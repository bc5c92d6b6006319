"""Evaluation of a policy on held-out prompts with fixed seeds."""
