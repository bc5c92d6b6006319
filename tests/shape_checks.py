"""The run-time check of the shapes in signatures, which `pytest --check-shapes` turns on."""

import re
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype
from jaxtyping import install_import_hook

CHECKED = (
    "flow",
    "families",
    "objectives",
    "harmonize",
    "trainable",
    "training",
)

_SHAPE = re.compile(r"\b(Float|Int|Bool|Num|UInt|Shaped|Inexact|Real)\[")


def install() -> None:
    """Checks the functions with shapes of packages that are imported from here on."""
    packages = [f"marble_jax.{package}" for package in CHECKED]
    # The hook looks the decorator up at every function.
    jaxtyping.jaxtyped = but_inner_functions(jaxtyping.jaxtyped)
    install_import_hook(packages, "shape_checks.check")


def but_inner_functions(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """The decorator that leaves functions inside of others alone, unless they state a shape.

    Those are made anew whenever the one around them runs, and decorating takes longer than most of them do.
    """

    def with_options(**options: Any) -> Callable[..., Any]:
        decorate = jaxtyped(**options)

        def decorated(function: Any) -> Any:
            is_inner = "<locals>" in function.__qualname__
            if is_inner and not isinstance(function, type) and not has_shapes(function):
                return function
            return decorate(function)

        return decorated

    return with_options


def has_shapes(function: Any) -> bool:
    """Whether a signature states the shape of an array."""
    annotations = getattr(function, "__annotations__", {})
    return any(_SHAPE.search(str(annotation)) for annotation in annotations.values())


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose arguments and result are checked against its signature at every call."""
    # Structures of arrays also hold what stands for arrays: abstract ones, axes of a vmap, None.
    if function.__name__ == "__init__":
        return function
    return beartype(function)
