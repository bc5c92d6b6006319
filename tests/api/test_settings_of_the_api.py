"""Settings, sampling and runs by Python: what is taken, and what is refused in one line."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

import marble_jax
from marble_jax import platform
from marble_jax.api import runs, sampling
from marble_jax.api.sampling import _KINDS, sampling_settings
from marble_jax.config import Settings
from marble_jax.errors import InputError
from marble_jax.programs.evaluation_request import requested_prompts
from marble_jax.programs.locations import read_prompts
from marble_jax.programs.policy_source import SamplingSettings
from marble_jax.rewards.base import Reward
from marble_jax.rewards.scorer import Scorer


def test_presets_are_what_settings_are_made_of():
    presets = marble_jax.presets()
    assert {"embedded", "embedded:smoke", "sd3:gpu_80gb"} <= set(presets)
    assert all(presets.values())
    settings = marble_jax.load_settings("embedded:smoke")
    assert settings.training.num_steps == 3 and settings.name == "embedded-smoke"


def test_changes_are_values_of_python():
    base = marble_jax.load_settings("embedded:smoke")
    changed = marble_jax.load_settings(
        base, {"training.num_steps": 7, "rewards.train": ["ocr"], "training.learning_rate": 1}
    )
    assert changed.training.num_steps == 7 and changed.rewards.train == ("ocr",)
    assert changed.training.learning_rate == 1.0 and changed.model == base.model
    assert base.training.num_steps == 3


@pytest.mark.parametrize(
    ("config", "changes", "line"),
    [
        ("embeded", {}, "expected a configuration file.*did you mean 'embedded'"),
        ("embedded:smok", {}, "did you mean 'smoke'"),
        (3, {}, "config: expected the name of a preset, a path or Settings; received int"),
        ("embedded", {"training.num_step": 1}, "did you mean 'training.num_steps'"),
        ("embedded", {"training.num_steps": "3"}, "expected int .*; received '3'"),
        ("embedded", {"training.num_steps": -3}, "expected a number >= 1"),
        ("embedded", {"rewards.train": "ocr"}, "expected tuple of texts"),
    ],
)
def test_settings_that_are_none(config, changes, line):
    with pytest.raises(InputError, match=line) as caught:
        marble_jax.load_settings(config, changes)
    assert "\n" not in str(caught.value)


def test_every_sampling_setting_has_a_kind():
    assert set(_KINDS) == set(SamplingSettings.__dataclass_fields__)
    assert sampling_settings() == SamplingSettings()
    assert sampling_settings(size=[64, 32], num_steps=3, guidance=2).size == (64, 32)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"steps": 3}, "sampling setting: expected one of seed, num_steps.*received 'steps'"),
        ({"num_steps": 0}, "num_steps: expected a number >= 1; received 0"),
        ({"num_steps": True}, "num_steps: expected an integer; received True"),
        ({"seed": 2**32}, "seed: expected a number <= "),
        ({"size": (64,)}, "size"),
        ({"guidance": float("nan")}, "guidance"),
        ({"dtype": "float8"}, "dtype: expected one of float32, bfloat16"),
        ({"stream_dtype": "bfloat16"}, "stream_dtype: expected one of compute, float32"),
        ({"integer_timesteps": 1}, "integer_timesteps: expected "),
    ],
)
def test_sampling_settings_that_are_none(settings, line):
    with pytest.raises(InputError, match=line):
        sampling_settings(**settings)


@pytest.mark.parametrize(
    ("prompts", "options", "line"),
    [
        ([], {}, r"prompts: expected a text or several; received \[\]"),
        ([3], {}, r"received \[3\]"),
        ("a cat", {"images": 0}, "images: expected a number >= 1"),
        ("a cat", {"solver": "heun"}, "expected one of euler"),
        ("a cat", {"model": "/nowhere"}, "model: expected a directory or a Hub name"),
    ],
)
def test_samples_that_are_none(prompts, options, line):
    with pytest.raises(InputError, match=line):
        marble_jax.sample(prompts, **options)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected a training run \(with config.json\)"):
        marble_jax.Run(tmp_path)


def test_a_lora_of_nothing_is_refused(tmp_path):
    with pytest.raises(
        InputError, match="LoRA: expected a directory, a .safetensors file or a hub"
    ):
        marble_jax.read_lora(str(tmp_path / "none"))


class _Sampler:
    """Stands in for a model that is open: draws the number of every sample, as an image or a clip."""

    shape: tuple[int, ...] = ()

    def __init__(self, source, settings, pipelines=None):
        self.source, self.settings = source, settings

    def prepare(self, texts, console):
        assert texts == ["a cat", "a cat", "a dog", "a dog", "a bird", "a bird"]

    def open(self):
        pass

    def draw(self, texts, numbers):
        assert len(texts) == len(numbers) <= self.settings.batch
        ones = np.ones((len(texts), *self.shape))
        return ones * np.array(list(numbers)).reshape(-1, *[1] * len(self.shape)) / 255


@pytest.mark.parametrize("shape", [(4, 6, 3), (2, 4, 6, 3)], ids=["images", "clips"])
def test_images_are_pillows_and_clips_are_arrays(monkeypatch, shape):
    monkeypatch.setattr(sampling, "ImageSampler", _Sampler)
    monkeypatch.setattr(_Sampler, "shape", shape)
    samples = marble_jax.sample(["a cat", "a dog", "a bird"], images=2, batch=4)
    assert len(samples) == 6
    for number, sample in enumerate(samples):
        assert isinstance(sample, Image.Image if len(shape) == 3 else np.ndarray)
        array = np.asarray(sample)
        assert array.dtype == np.uint8 and array.shape == shape
        np.testing.assert_array_equal(array, number)


@pytest.mark.parametrize(("num_workers", "threads"), [(0, 7), (3, 3)])
def test_an_evaluation_scores_on_as_many_threads_as_the_run(
    tmp_path, monkeypatch, num_workers, threads
):
    """The default of a run, 0, stands for all cores."""
    monkeypatch.setattr(platform, "usable_cores", lambda: 7)
    rewards = dataclasses.replace(Settings().rewards, num_workers=num_workers)
    prompts = dataclasses.replace(Settings().prompts, path="embedded")
    settings = dataclasses.replace(Settings(), rewards=rewards, prompts=prompts)
    monkeypatch.setattr(runs, "run_settings", lambda _: settings)
    requests = []
    monkeypatch.setattr(runs, "evaluate", lambda request, out: requests.append(request) or {})
    marble_jax.Run(tmp_path).evaluate(tmp_path / "out")
    scorer = Scorer([Reward(name="one", kind="host")], requests[0].num_workers)
    assert len(scorer._host._pool._threads) == threads
    scorer.close()


@pytest.mark.parametrize(
    ("sources", "count"), [(("general", "ocr", "geneval"), 420), (("ocr",), 9)]
)
def test_an_evaluation_is_of_the_prompts_that_the_run_evaluates_on(
    tmp_path, monkeypatch, sources, count
):
    """Of the test files' 500 prompts, the first of each source that the run is on, and its rules of scoring."""
    default = Settings()
    settings = dataclasses.replace(
        default,
        prompts=dataclasses.replace(default.prompts, path="embedded", sources=sources),
        evaluation=dataclasses.replace(default.evaluation, num_prompts=count),
        rewards=dataclasses.replace(default.rewards, upstream_scoring=True),
    )
    monkeypatch.setattr(runs, "run_settings", lambda _: settings)
    requests = []
    monkeypatch.setattr(runs, "evaluate", lambda request, out: requests.append(request) or {})
    run = marble_jax.Run(tmp_path)
    run.evaluate(tmp_path / "out", images=2)
    drawn = requested_prompts(requests[0])
    by_source = read_prompts("embedded", "test", sources)
    expected = []
    for name in sorted(sources):
        for prompt in by_source[name][: count // len(sources)]:
            expected += [prompt, prompt]
    assert drawn == expected and requests[0].upstream_scoring
    run.evaluate(tmp_path / "out", num_prompts=3)
    assert len(requested_prompts(requests[1])) == 3
    # Prompts that are asked for are all of them.
    run.evaluate(tmp_path / "out", prompts="embedded")
    assert len(requested_prompts(requests[2])) == sum(
        map(len, read_prompts("embedded", "test").values())
    )


def test_names_of_compared_models(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "run_settings", lambda _: Settings())
    run = marble_jax.Run(tmp_path)
    assert repr(run) == f"Run({str(tmp_path)!r})"
    for models, line in (
        ({"a/b": "x"}, "a name of at most 100 letters, digits"),
        ({"ema": "x"}, "models: expected another name than a policy's; received 'ema'"),
    ):
        with pytest.raises(InputError, match=line):
            run.evaluate(tmp_path / "out", models=models)
    with pytest.raises(InputError, match="policies: expected one of base, ema"):
        run.evaluate(tmp_path / "out", policies=("emma",))
    with pytest.raises(InputError, match="policies: expected at least one"):
        run.evaluate(tmp_path / "out", policies=())
    with pytest.raises(InputError, match="export option: expected one of policy"):
        run.export(tmp_path / "out", polcy="ema")
    with pytest.raises(InputError, match="policy: expected one of"):
        run.export(tmp_path / "out", policy="base")
