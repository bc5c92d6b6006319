"""Rewards on the host: worker threads, worker processes, text recognisers."""
