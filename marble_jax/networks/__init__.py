"""Networks that belong to no model family: text and image encoders, autoencoders, attention, dense layers."""
