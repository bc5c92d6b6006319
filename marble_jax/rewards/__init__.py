"""Rewards: numbers for pictures, from networks on the device and readers and detectors on the host."""
