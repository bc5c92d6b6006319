"""Models of one evaluation are drawn alike: as stated, else as the first run, else as they agree, else not at all."""

import dataclasses

import pytest

from marble_jax.config import RolloutSettings
from marble_jax.errors import InputError
from marble_jax.families.descriptions import Size
from marble_jax.programs.policy_source import SamplingSettings
from marble_jax.programs.shared_settings import OwnSettings, check_alike, settle

RUN = OwnSettings(True, Size(64, 48), 12, ("text_encoder_3",), "float32", 6, "dpm2")
PLAIN = OwnSettings(False, Size(256, 256), 256, ("text_encoder_3",), "bfloat16")
ASKED = SamplingSettings()
NOTHING: frozenset[str] = frozenset()


def _settled(own, asked=ASKED, stated=NOTHING):
    found = settle(own, asked, stated).settings
    return {
        "size": found.size,
        "length": found.max_sequence_length,
        "omitted": found.omit_text_encoders,
        "dtype": found.dtype,
        "steps": found.num_steps,
        "solver": found.solver,
        "frames": found.num_frames,
    }


def test_a_plain_model_is_drawn_as_the_first_run_is_wherever_it_stands():
    expected = {
        "size": (64, 48),
        "length": 12,
        "omitted": ("text_encoder_3",),
        "dtype": "float32",
        "steps": 6,
        "solver": "dpm2",
        "frames": 1,
    }
    other = dataclasses.replace(RUN, num_steps=9, solver="euler")
    for own in ({"base": PLAIN, "run": RUN}, {"run": RUN, "base": PLAIN, "later": other}):
        assert _settled(own) == expected
    shared = settle({"base": PLAIN, "run": RUN}, ASKED, NOTHING)
    assert shared.size == Size(64, 48) and shared.native_sizes == {"base": "256 x 256"}
    assert shared.origins["size"] == "the training run 'run'"
    assert shared.origins["solver"] == "evaluations of the training run 'run'"
    assert shared.origins["guidance"] == "the training run 'run'"


def test_what_is_stated_holds_for_all():
    asked = SamplingSettings(
        num_steps=3, size=(32, 32), max_sequence_length=7, dtype="bfloat16", guidance=4.5
    )
    differing = dataclasses.replace(RUN, size=Size(32, 32), max_sequence_length=9, dtype="bfloat16")
    found = _settled({"run": RUN, "other": differing, "base": PLAIN}, asked, frozenset({"steps"}))
    assert found == {
        "size": (32, 32),
        "length": 7,
        "omitted": ("text_encoder_3",),
        "dtype": "bfloat16",
        "steps": 3,
        "solver": "dpm2",
        "frames": 1,
    }
    origins = settle({"run": RUN, "base": PLAIN}, asked, frozenset({"steps"})).origins
    assert origins["size"] == origins["steps"] == "command line or default"


def test_a_plain_model_is_guided_as_the_run_is():
    run = dataclasses.replace(RUN, guidance=4.5, negative="ugly")
    found = settle({"base": PLAIN, "run": run}, ASKED, NOTHING).settings
    assert (found.guidance, found.negative) == (4.5, "ugly") and found.guided
    found = settle({"run": run}, SamplingSettings(guidance=1.0), NOTHING).settings
    assert (found.guidance, found.negative) == (1.0, "") and not found.guided


def test_guidance_that_is_stated_leads_away_from_the_negative_prompt_of_the_run():
    run = dataclasses.replace(RUN, guidance=4.5, negative="ugly")
    shared = settle({"base": PLAIN, "run": run}, SamplingSettings(guidance=3.0), NOTHING)
    assert (shared.settings.guidance, shared.settings.negative) == (3.0, "ugly")
    assert shared.origins["negative"] == "the training run 'run'"
    assert shared.origins["guidance"] == "command line or default"
    # An empty one can be stated, and another one.
    for negative in ("", "blue"):
        asked = SamplingSettings(guidance=3.0, negative=negative)
        shared = settle({"run": run}, asked, NOTHING)
        assert shared.settings.negative == negative
        assert shared.origins["negative"] == "command line or default"
    other = dataclasses.replace(run, negative="blurred")
    with pytest.raises(InputError, match="one negative .*--negative=TEXT; received ugly of 'run'"):
        settle({"run": run, "other": other}, SamplingSettings(guidance=3.0), NOTHING)
    # Without guidance there is nothing to agree on.
    plain = settle({"run": run, "other": other}, SamplingSettings(guidance=1.0), NOTHING)
    assert plain.settings.negative == ""


def test_one_policy_is_guided_as_its_run_is():
    rollout = RolloutSettings(guidance_scale=4.5, negative_prompt="ugly")
    for asked, guidance, negative in (
        (SamplingSettings(), 4.5, "ugly"),
        (SamplingSettings(guidance=3.0), 3.0, "ugly"),
        (SamplingSettings(guidance=3.0, negative=""), 3.0, ""),
        (SamplingSettings(negative="blue"), 4.5, "blue"),
        (SamplingSettings(guidance=1.0), 1.0, ""),
    ):
        found = asked.guided_as(rollout)
        assert (found.guidance, found.negative) == (guidance, negative)
    assert SamplingSettings().guided_as(None) == SamplingSettings(guidance=1.0, negative="")


@pytest.mark.parametrize("guidance", [None, 0.0, 1.0])
def test_a_negative_prompt_that_nothing_would_read_is_refused(guidance):
    asked = SamplingSettings(guidance=guidance, negative="ugly")
    message = (
        r"--negative: expected none without guidance .*above 1 turns it on\); received 'ugly'$"
    )
    for rollout in (None, RolloutSettings()):
        with pytest.raises(InputError, match=message):
            asked.guided_as(rollout)
    with pytest.raises(InputError, match=message):
        settle({"run": RUN, "base": PLAIN}, asked, NOTHING)


def test_frames_are_stated_or_the_run_s():
    run = dataclasses.replace(RUN, size=Size(64, 48, 17))
    shared = settle({"base": PLAIN, "run": run}, ASKED, NOTHING)
    assert shared.size == Size(64, 48, 17)
    stated = SamplingSettings(size=(32, 32), num_frames=5)
    assert settle({"run": run, "other": RUN}, stated, NOTHING).size == Size(32, 32, 5)


def test_a_plain_model_takes_the_guidance_input_of_the_run():
    run = dataclasses.replace(RUN, embedded_guidance=3.5)
    assert settle({"base": PLAIN, "run": run}, ASKED, NOTHING).settings.embedded_guidance == 3.5
    stated = SamplingSettings(embedded_guidance=2.0)
    assert settle({"base": PLAIN, "run": run}, stated, NOTHING).settings.embedded_guidance == 2.0


def test_all_models_are_computed_as_the_first_run_is():
    run = dataclasses.replace(RUN, integer_timesteps=True, stream_dtype="float32")
    for own in ({"base": PLAIN, "run": run}, {"run": run, "later": RUN}):
        found = settle(own, ASKED, NOTHING).settings
        assert (found.integer_timesteps, found.stream_dtype) == (True, "float32")
    found = settle({"base": PLAIN}, ASKED, NOTHING).settings
    assert (found.integer_timesteps, found.stream_dtype) == (False, "compute")
    stated = SamplingSettings(integer_timesteps=False, stream_dtype="compute")
    found = settle({"run": run}, stated, NOTHING).settings
    assert (found.integer_timesteps, found.stream_dtype) == (False, "compute")


@pytest.mark.parametrize("setting", ["integer_timesteps", "stream_dtype"])
def test_images_that_were_computed_in_two_ways_are_not_compared(setting):
    with pytest.raises(InputError, match=f"received {setting} True of 'a' and None of 'b'"):
        check_alike({"a": {setting: True}, "b": {}})


def test_models_without_a_run_keep_their_own_where_they_agree():
    found = _settled({"a": PLAIN, "b": PLAIN})
    assert found["size"] == (256, 256) and found["length"] == 256
    assert (found["steps"], found["solver"]) == (40, "euler")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"a": PLAIN, "b": dataclasses.replace(PLAIN, size=Size(64, 64))},
            "--models: expected one size for all models, or --size=HEIGHTxWIDTH; received "
            "256 x 256 of 'a', 64 x 64 of 'b'$",
        ),
        (
            {"r": RUN, "s": dataclasses.replace(RUN, size=Size(64, 64))},
            "expected one size .* received 64 x 48 of 'r', 64 x 64 of 's'$",
        ),
        (
            {"r": RUN, "s": dataclasses.replace(RUN, max_sequence_length=77), "p": PLAIN},
            "expected one max_sequence_length for all models, or --max_sequence_length=N; received "
            "12 of 'r', 77 of 's'$",
        ),
        (
            {"r": RUN, "s": dataclasses.replace(RUN, dtype="bfloat16")},
            "expected one dtype for all models, or --dtype=NAME; received float32 of 'r', bfloat16 of 's'$",
        ),
        (
            {"r": RUN, "s": dataclasses.replace(RUN, embedded_guidance=3.5)},
            "expected one embedded_guidance for all models, or --embedded_guidance=SCALE; received "
            "None of 'r', 3.5 of 's'$",
        ),
        (
            {"r": RUN, "s": dataclasses.replace(RUN, omit_text_encoders=())},
            "expected one omit_text_encoders .*; received text_encoder_3 of 'r', none of 's'$",
        ),
        (
            {"r": RUN, "s": dataclasses.replace(RUN, size=Size(64, 48, 17))},
            "expected one size for all models, or --size=FRAMESxHEIGHTxWIDTH; received 64 x 48 of 'r', "
            "17 x 64 x 48 of 's'$",
        ),
        (
            {"r": RUN, "s": dataclasses.replace(RUN, guidance=4.5)},
            "expected one guidance for all models, or --guidance=SCALE; received 1.0 of 'r', 4.5 of 's'$",
        ),
    ],
)
def test_a_mixture_is_refused(own, message):
    with pytest.raises(InputError, match=message):
        settle(own, ASKED, NOTHING)


def test_images_that_were_drawn_differently_are_not_compared():
    drawn = {"size": [64, 64], "steps": 40, "dtype": "float32", "seed": 3, "weights": "aa"}
    check_alike({"a": drawn, "b": drawn | {"weights": "bb", "adapter": "cc"}})
    for setting, value in (("size", [32, 32]), ("steps", 20), ("dtype", "bfloat16"), ("seed", 4)):
        with pytest.raises(
            InputError, match=f"drawn alike; received {setting} .* of 'a' and .* of 'b'"
        ):
            check_alike({"a": drawn, "b": drawn | {setting: value}})
