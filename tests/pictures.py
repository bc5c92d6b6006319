"""Pictures that a program wrote, as arrays."""

from marble_jax.storage.images import read_frames


def read_image(path):
    """An image file as uint8 [H, W, 3], of a clip the first frame."""
    return read_frames(path)[0]
