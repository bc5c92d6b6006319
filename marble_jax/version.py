"""The package's version, importable without jax."""

VERSION = "0.1.0"
