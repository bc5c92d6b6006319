"""Rewards: numbers for images, from networks on the device and readers and detectors on the host."""
