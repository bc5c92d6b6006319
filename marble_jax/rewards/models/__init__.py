"""Reward networks on the accelerator, with their published weights."""
