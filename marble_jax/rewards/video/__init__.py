"""Rewards of clips as such: how much moves, whether as the prompt tells, and how evenly."""
