"""The synthetic world of the embedded pipeline: its detector, and golden images with known scores."""
