"""A user's own reward: one Python function, named `module:function` in the configuration.

Its first two parameters say how it wants to be called:

    def sharpness(image, prompt, metadata): ...      # one image at a time -> a number
    def sharpness(images, prompts, metadata): ...    # a batch -> a number each
    def rank(images, prompt, metadata): ...          # all images of one prompt -> a number each

An image is float32 [H, W, 3] in [0, 1] (read-only), metadata the prompt's mapping (a list of them where `images` is
one). None instead of a number says that the function does not apply to that image; NaN, or an exception, that it
failed. An attribute `applies`, a function (prompt, metadata) -> bool, leaves out prompts before any call. The module
is looked for beside `rewards.json`, in the working directory and among what is installed. Several threads may call the
function at the same time.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import numbers
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marble_jax.errors import InputError, nearest, one_line, one_of
from marble_jax.rewards.base import Metadata, Reward, RewardError
from marble_jax.rewards.ocr import quoted_text
from marble_jax.types import Params

log = logging.getLogger(__name__)

FORMS = {
    ("image", "prompt"): "pointwise",
    ("images", "prompts"): "batch",
    ("images", "prompt"): "group",
}
"""How a function is called, by the names of its first two parameters."""
APPLIES: dict[str, Callable[[str, Metadata], bool]] = {
    "all": lambda prompt, metadata: True,
    "quoted": lambda prompt, metadata: quoted_text(prompt) is not None,
    "geneval": lambda prompt, metadata: "include" in metadata,
}
"""Rules for which prompts a reward is asked about."""


def is_function(name: str) -> bool:
    """Whether a reward's name names a function."""
    return ":" in name


def load_function(name: str, directory: Path | str | None = None) -> Callable[..., Any]:
    """Imports `module:function`.

    Args:
      name: dotted module and function.
      directory: where modules are looked for first, besides the working directory.

    Raises:
      InputError: no such module or function, or the module does not import.
    """
    match = re.fullmatch(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)", name)
    if not match:
        raise InputError(f"reward function: expected module:function; received {name!r}")
    module_name, function_name = match.groups()
    for place in (directory, Path.cwd()):
        if place is not None and str(place) not in sys.path:
            sys.path.append(str(place))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(
                f"reward {name}: expected a module that imports; it lacks {error.name}"
            ) from error
        raise InputError(
            f"reward {name}: expected a module {module_name} in {Path.cwd()}, beside rewards.json or "
            "installed; received none"
        ) from None
    except Exception as error:  # whatever the user's module raises; the cause stays attached
        raise InputError(
            f"reward {name}: expected a module that imports; received {one_line(error)}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        choices = [
            n
            for n, value in vars(module).items()
            if inspect.isfunction(value) and not n.startswith("_")
        ]
        raise InputError(
            f"reward {name}: expected a function {function_name} in {module.__file__}; received "
            f"{'none' if function is None else type(function).__name__}{nearest(function_name, choices)}"
        )
    return function


def applies_rule(
    name: str, rule: str, directory: Path | str | None = None
) -> Callable[[str, Metadata], bool]:
    """The function behind `applies` of a reward: one of APPLIES, or a user's own as module:function."""
    if is_function(rule):
        return load_function(rule, directory)
    one_of(f"reward {name}: applies (or module:function)", rule, APPLIES)
    return APPLIES[rule]


def form_of(name: str, function: Callable[..., Any]) -> str:
    """How the function wants to be called.

    Raises:
      InputError: a coroutine, or parameters that do not say.
    """
    if inspect.iscoroutinefunction(function):
        raise InputError(f"reward {name}: expected a plain function; received a coroutine")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    needed = [
        p
        for p in parameters[3:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    form = FORMS.get(tuple(p.name for p in parameters[:2]))
    if (
        form is None
        or len(parameters) < 3
        or needed
        or any(p.kind is p.KEYWORD_ONLY for p in parameters[:3])
    ):
        received = ", ".join(str(p) for p in parameters) or "none that can be read"
        raise InputError(
            f"reward {name}: expected parameters (image, prompt, metadata), (images, prompts, metadata) "
            f"or, for all images of a prompt, (images, prompt, metadata); received ({received})"
        )
    return form


class FunctionReward(Reward):
    """A Python function as a reward. A host reward."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        applies: Callable[[str, Metadata], bool] | None = None,
    ):
        """Builds the reward.

        Args:
          name: key of the reward.
          function: see the module.
          applies: which prompts it is called for; by default the function's own attribute `applies`, or all.
        """
        super().__init__(name=name, kind="host")
        self.function, self.form = function, form_of(name, function)
        self.whole_groups = self.form == "group"
        self._applies = applies or getattr(function, "applies", None) or APPLIES["all"]

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """What the user's rule says."""
        try:
            return bool(self._applies(prompt, metadata))
        except Exception as error:  # foreign code
            raise RewardError(f"reward {self.name}: applies raised {one_line(error)}") from error

    def score(self, params: Params, images, prompts: Sequence[str], metadata: Sequence[Metadata]):
        """See `Reward.score`; the third array is False where the function returned None."""
        images = np.asarray(images).view()
        images.setflags(write=False)  # the other rewards see the same array
        found: list[Any] = [np.nan] * len(prompts)
        if self.form == "batch":
            found = self._listed(self.function(images, list(prompts), list(metadata)), len(prompts))
        else:
            self._by_part(images, prompts, metadata, found)
        applies = np.array([value is not None for value in found], bool)
        values = np.array([self._number(v) if v is not None else 0.0 for v in found], np.float64)
        return values, applies & np.isfinite(values), applies

    def _by_part(self, images, prompts, metadata, found: list[Any]) -> None:
        """Fills `found` image by image or group by group; one that raises does not take the others along."""
        if self.form == "pointwise":
            parts = [[i] for i in range(len(prompts))]
        else:
            parts = [
                [i for i, p in enumerate(prompts) if p == prompt]
                for prompt in dict.fromkeys(prompts)
            ]
        errors = []
        for part in parts:
            first = part[0]
            try:
                if self.form == "pointwise":
                    answers = [self.function(images[first], prompts[first], metadata[first])]
                else:
                    answers = self._listed(
                        self.function(images[part], prompts[first], [metadata[i] for i in part]),
                        len(part),
                    )
            except Exception as error:  # foreign code
                errors.append(error)
                continue
            for i, answer in zip(part, answers):
                found[i] = answer
        if len(errors) == len(parts):
            raise errors[-1]
        if errors:
            log.warning(
                "reward %s failed in %d of %d calls: %s",
                self.name,
                len(errors),
                len(parts),
                one_line(errors[-1]),
            )

    def _listed(self, answer: Any, count: int) -> list[Any]:
        if isinstance(answer, (str, bytes, dict)) or not hasattr(answer, "__len__"):
            raise RewardError(
                f"expected a list of {count} scores; received {type(answer).__name__}"
            )
        answer = list(answer)
        if len(answer) != count:
            raise RewardError(f"expected {count} scores; received {len(answer)}")
        return answer

    def _number(self, value: Any) -> float:
        """A score as a float: Python's, NumPy's, or an array or tensor of one element; NaN for anything else."""
        if (
            isinstance(value, (str, bytes))
            or isinstance(value, numbers.Complex)
            and not isinstance(value, numbers.Real)
        ):
            return np.nan
        try:
            return float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            return np.nan
