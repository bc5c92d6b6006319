"""Objectives: what a sample is trained towards, and how scores become advantages.

An objective is one file here and one line below, by which it registers itself.
"""

from marble_jax.objectives import awm as awm
from marble_jax.objectives import nft as nft
from marble_jax.objectives import policy_gradient as policy_gradient
