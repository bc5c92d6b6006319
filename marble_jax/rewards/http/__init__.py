"""Rewards over HTTP: clients of servers and judges, and the reward server."""
