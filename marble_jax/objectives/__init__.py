"""Objectives: what a sample is trained towards, and how scores become advantages."""
