"""Wan 2.1 for text to video and text to image: a transformer over latent frames, UMT5 and a causal autoencoder."""
