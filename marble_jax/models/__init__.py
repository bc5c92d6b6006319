"""Networks of a Stable Diffusion 3 pipeline in flax linen, and the loader of their published weights."""
