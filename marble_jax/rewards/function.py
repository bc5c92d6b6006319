"""A user's own reward: one Python function, named `module:function` in the configuration.

Its first two parameters say how it wants to be called:

    def sharpness(image, prompt, metadata): ...      # one image at a time -> a number
    def sharpness(images, prompts, metadata): ...    # a batch -> a number each
    def rank(images, prompt, metadata): ...          # all images of one prompt -> a number each

and `clip`, `clips` instead of `image`, `images`, that it takes clips; with a further parameter `fps=16` it is also told
how many frames a second they have, where that is known. An image is float32 [H, W, 3], a clip
[F, H, W, 3], in [0, 1] (read-only); metadata is the prompt's mapping (a list of them where `images` is one). None
instead of a number says that the function does not apply to that image; NaN, or an exception, that it failed. An
attribute `applies`, a function (prompt, metadata) -> bool, leaves out prompts before any call. The module is looked for
beside `rewards.json`, in the working directory and among what is installed. Several threads may call the function at
the same time.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from marble_jax.errors import InputError, nearest, one_line, one_of
from marble_jax.prompts.quotations import quoted_text
from marble_jax.rewards.base import CLIPS, IMAGES, Metadata, Reward, RewardError, Takes
from marble_jax.rewards.registration import BuildContext, option, register_reward
from marble_jax.types import Params

log = logging.getLogger(__name__)

Applies = Callable[[str, Metadata], bool]
"""(prompt, metadata) -> whether a reward is asked about images of that prompt."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a function is called and what it takes.

    Attributes:
      call: "pointwise", one image at a time; "batch"; "group", all images of a prompt.
      takes: see `Reward`.
      wants_fps: whether it asks for the frames a second of clips.
    """

    call: Literal["pointwise", "batch", "group"]
    takes: Takes = IMAGES
    wants_fps: bool = False


FORMS = {
    ("image", "prompt"): Form("pointwise"),
    ("images", "prompts"): Form("batch"),
    ("images", "prompt"): Form("group"),
    ("clip", "prompt"): Form("pointwise", CLIPS),
    ("clips", "prompts"): Form("batch", CLIPS),
    ("clips", "prompt"): Form("group", CLIPS),
}
"""Forms by the names of a function's first two parameters."""
APPLIES: dict[str, Applies] = {
    "all": lambda prompt, metadata: True,
    "quoted": lambda prompt, metadata: quoted_text(prompt) is not None,
    "geneval": lambda prompt, metadata: "include" in metadata,
}
"""Rules for which prompts a reward is asked about."""
_NAME = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")


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
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(f"reward function: expected module:function; received {name!r}")
    module_name, function_name = match.groups()
    module = import_module(name, module_name, directory)
    function = getattr(module, function_name, None)
    if callable(function):
        return function
    received = "none"
    if function is not None:
        received = type(function).__name__
    raise InputError(
        f"reward {name}: expected a function {function_name} in {module.__file__}; received "
        f"{received}{nearest(function_name, _public_functions(module))}"
    )


def _public_functions(module: ModuleType) -> Iterable[str]:
    for name, value in vars(module).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            yield name


def import_module(name: str, module_name: str, directory: Path | str | None) -> ModuleType:
    """Imports a user's module.

    Args:
      name: `module:function` or `module:kind`, for messages.
      module_name: dotted.
      directory: where it is looked for first, besides the working directory.

    Raises:
      InputError: no such module, or it does not import.
    """
    _add_to_path(directory)
    _add_to_path(Path.cwd())
    # The module may have been written since Python last listed these directories.
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # It is the module itself, or one of its packages, that is missing; or else something that it imports.
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(
                f"reward {name}: expected a module {module_name} in {Path.cwd()}, beside rewards.json or "
                "installed; received none"
            ) from None
        raise InputError(
            f"reward {name}: expected a module that imports; it lacks {error.name}"
        ) from error
    # Whatever the user's module raises, also on its way out of the program; the cause stays attached.
    except BaseException as error:
        # Ctrl-C of a user who waits for an import.
        if isinstance(error, KeyboardInterrupt):
            raise
        raise InputError(
            f"reward {name}: expected a module that imports; received {one_line(error)}"
        ) from error


def _add_to_path(place: Path | str | None) -> None:
    # Last, so that a file of the user's cannot stand in for a library that happens to share its name.
    if place is not None and str(place) not in sys.path:
        sys.path.append(str(place))


def applies_rule(name: str, rule: str, directory: Path | str | None = None) -> Applies:
    """Returns the function behind `applies` of a reward: one of APPLIES, or a user's own as module:function."""
    if is_function(rule):
        return load_function(rule, directory)
    one_of(f"reward {name}: applies (or module:function)", rule, APPLIES)
    return APPLIES[rule]


def form_of(name: str, function: Callable[..., Any]) -> Form:
    """Returns how the function wants to be called.

    Raises:
      InputError: a coroutine, or parameters that do not say.
    """
    if inspect.iscoroutinefunction(function):
        raise InputError(f"reward {name}: expected a plain function; received a coroutine")
    parameters: list[inspect.Parameter] = []
    try:
        parameters = list(inspect.signature(function).parameters.values())
    # A function of C may have no signature; it then has no names that say how to call it.
    except (TypeError, ValueError):
        pass
    if len(parameters) >= 3 and _takes_three(parameters):
        form = FORMS.get((parameters[0].name, parameters[1].name))
        if form is not None:
            names = [parameter.name for parameter in parameters[3:]]
            return dataclasses.replace(form, wants_fps=form.takes == CLIPS and "fps" in names)
    received = ", ".join(map(str, parameters)) or "none that can be read"
    raise InputError(
        f"reward {name}: expected parameters (image, prompt, metadata), (images, prompts, metadata) "
        f"or, for all images of a prompt, (images, prompt, metadata), or clip and clips instead; "
        f"received ({received})"
    )


def _takes_three(parameters: Sequence[inspect.Parameter]) -> bool:
    """Whether a function can be called with three positional arguments and nothing else."""
    for parameter in parameters[:3]:
        if parameter.kind is parameter.KEYWORD_ONLY:
            return False
    for parameter in parameters[3:]:
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic:
            return False
    return True


class FunctionReward(Reward):
    """A Python function as a reward. A host reward."""

    def __init__(self, name: str, function: Callable[..., Any], applies: Applies | None = None):
        """Builds the reward.

        Args:
          name: key of the reward.
          function: see the module.
          applies: which prompts it is called for; by default the function's own attribute `applies`, or all.
        """
        form = form_of(name, function)
        super().__init__(
            name=name, kind="host", takes=form.takes, needs_full_group=form.call == "group"
        )
        self.function, self.form = function, form
        self._applies = applies or getattr(function, "applies", None) or APPLIES["all"]

    def applies(self, prompt: str, metadata: Metadata) -> bool:
        """Whether the reward applies to a prompt, by the user's rule."""
        try:
            return bool(self._applies(prompt, metadata))
        # Foreign code: whatever it raises.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise RewardError(f"reward {self.name}: applies raised {one_line(error)}") from error

    def score(
        self,
        params: Params,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Reward.score`; the third array is False where the function returned None."""
        # The other rewards see the same array, hence a view that cannot be written to.
        images = np.asarray(images).view()
        images.setflags(write=False)
        if self.form.call == "batch":
            answer = self.function(images, list(prompts), list(metadata), **self._rate())
            answers = _as_list(answer, len(prompts))
        else:
            answers = self._call_by_part(images, prompts, metadata)
        values, applies = np.zeros(len(prompts)), np.zeros(len(prompts), bool)
        for index, answer in enumerate(answers):
            if answer is not None:
                values[index], applies[index] = _as_number(answer), True
        return values, applies & np.isfinite(values), applies

    def _call_by_part(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> list[Any]:
        """Calls the function image by image or group by group; one that raises does not take the others along.

        Raises:
          Exception: what the last call raised, if all of them did.
        """
        # What a call that raised leaves behind is NaN, a failure; None would say that it does not apply.
        answers: list[Any] = [np.nan] * len(prompts)
        errors: list[BaseException] = []
        parts = self._parts(prompts)
        for part in parts:
            try:
                part_answers = self._call(part, images, prompts, metadata)
            # Foreign code: whatever it raises, in a worker's thread, to which no Ctrl-C comes.
            except BaseException as error:
                errors.append(error)
                continue
            for index, answer in zip(part, part_answers, strict=True):
                answers[index] = answer
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
        return answers

    def _parts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Returns the indices of each call's images."""
        if self.form.call == "pointwise":
            return [[index] for index in range(len(prompts))]
        groups: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(index)
        return list(groups.values())

    def _call(
        self,
        part: list[int],
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
    ) -> list[Any]:
        first = part[0]
        if self.form.call == "pointwise":
            return [self.function(images[first], prompts[first], metadata[first], **self._rate())]
        part_metadata = [metadata[index] for index in part]
        answer = self.function(images[part], prompts[first], part_metadata, **self._rate())
        return _as_list(answer, len(part))

    def _rate(self) -> dict[str, float]:
        """The frame rate as an argument; nothing where nobody knows it or the function does not ask."""
        if self.frames_per_second is None or not self.form.wants_fps:
            return {}
        return {"fps": self.frames_per_second}


def _as_list(answer: Any, count: int) -> list[Any]:
    """Returns a function's answer for `count` images as a list.

    Raises:
      RewardError: it is no list of that many.
    """
    if isinstance(answer, (str, bytes, dict)) or not hasattr(answer, "__len__"):
        raise RewardError(f"expected a list of {count} scores; received {type(answer).__name__}")
    scores = list(answer)
    if len(scores) != count:
        raise RewardError(f"expected {count} scores; received {len(scores)}")
    return scores


def _as_number(value: Any) -> float:
    """Returns a score as a float: Python's, NumPy's, or an array or tensor of one element; NaN for anything else."""
    # float() would read a text as a number and NumPy's complex as its real part.
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    if isinstance(value, (str, bytes)) or is_complex:
        return np.nan
    try:
        if hasattr(value, "item"):
            value = value.item()
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return np.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionOptions:
    """Options of the kind "function"."""

    function: str = option("", "the function, as module:function")
    applies: str = option(
        "",
        "prompts it is called for: all, quoted, geneval or module:function; its own rule by default",
    )


@register_reward("function", FunctionOptions)
def build_function(name: str, options: FunctionOptions, context: BuildContext) -> FunctionReward:
    """Builds the reward of a function under another name, or with another rule for prompts."""
    rule = None
    if options.applies:
        rule = applies_rule(name, options.applies, context.directory)
    return FunctionReward(name, load_function(options.function, context.directory), rule)
