"""The run-time check of the shapes in signatures, which `pytest --check-shapes` turns on."""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import install_import_hook

CHECKED = ("flow", "families", "objectives", "harmonize", "training")


def install() -> None:
    """Checks the functions of packages that are imported from here on."""
    packages = [f"marble_jax.{package}" for package in CHECKED]
    install_import_hook(packages, "shape_checks.check")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose arguments and result are checked against its signature at every call."""
    # Structures of arrays also hold what stands for arrays: abstract ones, axes of a vmap, None.
    if function.__name__ == "__init__":
        return function
    return beartype(function)
