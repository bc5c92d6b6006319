"""Stable Diffusion 3 and 3.5: MMDiT, two CLIP text encoders and T5, a 16-channel image autoencoder."""
