"""Configuration values and options of all verbs, malformed: refused with status 2 before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attempts import DAMAGED, check, line_of, refusal, run

from marble_jax.config import KEYS
from marble_jax.programs.run_state import run_settings
from marble_jax.storage.workdir import Workdir

CONFIG = str(Path(__file__).parents[2] / "configs" / "embedded.py") + ":smoke"
HUGE = "9" * 400
VALUES = {
    "seed": ["-1", "4294967296", "1.5", "²", "nan", "x", "True", "", "[1]", "1e3"],
    "name": ["a\nb", "a\x1b[31m", "a\x00b"],
    "model.path": [""],
    "model.height": ["0", "-64", "64.5", "sixty", "1000000", "²"],
    "model.dtype": ["float17", "", "5"],
    "model.unroll": ["0", "10000000000"],
    "model.max_sequence_length": ["0", "1e9"],
    "model.embedded_guidance": ["inf", "-1", "nan", "2000"],
    "model.omit_text_encoders": ["5,6"],
    "lora.rank": ["0", "-1", "2.5", HUGE],
    "lora.alpha": ["inf", "nan", "0", "-inf", "1e300", "1e-300", "x"],
    "rollout.num_steps": ["0", "1000000000000", "-1"],
    "rollout.solver": ["heun", ""],
    "rollout.images_per_prompt": ["1", "x"],
    "rollout.merge_adapter": ["2", "perhaps"],
    "rollout.guidance_scale": ["-1", "1e30", "nan"],
    "rollout.noise_level": ["0", "1e30"],
    "policy_gradient.kl_weight": ["1e30", "-1"],
    "awm.rollout_weight": ["1e30"],
    "awm.kl_weight": ["1e30"],
    "rewards.train": [""],
    "rewards.timeout": ["inf", "0", "-5", "nan", "1e300"],
    "rewards.num_workers": ["-1", "1000000"],
    "rewards.max_missing_share": ["1.5", "-0.1", "nan"],
    "advantages.clip": ["0", "inf"],
    "advantages.weights": ["inf,1", "nan", "0,1", "x", "-1"],
    "harmonize.mode": ["exakt"],
    "harmonize.rho": ["1", "-0.1", "nan"],
    "harmonize.fixed_alpha": ["2,-1", "nan", "0.5,x"],
    "harmonize.alpha_floor": ["1.5", "inf"],
    "harmonize.window": ["inf", "0"],
    "nft.beta": ["0", "1.1", "nan", "inf"],
    "nft.kl_weight": ["inf", "-1", "nan", "1e30"],
    "training.learning_rate": ["inf", "nan", "-1", "1e6", "1e-60"],
    "training.weight_decay": ["inf", "nan"],
    "training.epsilon": ["0", "inf", "1e-300"],
    "training.num_steps": ["0", "1000000000000", "-3"],
    "rollout_policy.rate": ["inf", "nan"],
    "ema.decay": ["1", "inf"],
    "evaluation.seed": ["-1", "18446744073709551616", "4294967296"],
    "evaluation.num_steps": ["1000000000"],
    "checkpoints.keep": ["0", "-1"],
    "mesh.data": ["0", "-2", "99999999999"],
}
CASES = [(key, value) for key, values in VALUES.items() for value in values]


@pytest.mark.parametrize(("key", "value"), CASES)
def test_configuration_values(tmp_path, key, value):
    assert key in KEYS
    line = refusal(
        "train",
        f"--config={CONFIG}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.{key}={value}",
    )
    assert "expected" in line and "received" in line and key.split(".")[0] in line, line
    assert not (tmp_path / "run").exists(), "something was written"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.no.such=1", "no.such"),
        ("--config.seeds=1", "did you mean 'seed'"),
        ("--config.seed.a=1", "seed.a"),
        ("--config.=1", "config"),
        ("--config..=1", "config"),
        ("--config.model=1", "model"),
        ("--config", "value"),
        ("--config=/nowhere.py", "/nowhere.py"),
        ("--config=/etc", "/etc"),
        ("--config=/dev/null", "/dev/null"),
        ("--workdir", "value"),
        ("--wrokdir=a", "did you mean"),
        ("--distributed=perhaps", "distributed"),
        ("--coordinator=here", "coordinator"),
        ("--coordinator=a:²", "coordinator"),
        ("--init_timeout=nan", "init_timeout"),
        ("--init_timeout=1e300", "init_timeout"),
        ("--heartbeat_timeout=-1", "heartbeat_timeout"),
        ("-x", "-x"),
        ("word", "word"),
        ("\x1b[31m", "\\x1b"),
    ],
)
def test_arguments_of_train(tmp_path, argument, words):
    arguments = [f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", argument]
    if argument.startswith("--config="):
        arguments = arguments[1:]
    line = refusal("train", *arguments)
    assert "expected" in line and words in line, line


FILES = {
    "syntax": ("def get_config(", "SyntaxError"),
    "nothing": ("", "get_config"),
    "raises": ("raise ValueError('no')", "ValueError"),
    "exits": ("import sys; sys.exit(0)", "SystemExit"),
    "is cancelled": ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
    "exits inside": ("def get_config(preset=''):\n    raise SystemExit", "SystemExit"),
    "another type": ("def get_config(preset=''):\n    return {}", "dict"),
    "no function": ("get_config = 5", "TypeError"),
    "deep": ("x = " + "(" * 5000 + ")" * 5000, "received"),
    "recursion": ("def get_config(preset=''):\n    return get_config()", "RecursionError"),
    "bytes": (b"\x00\x01", "received"),
    "no UTF-8": (b"\xff\xfe", "received"),
}


@pytest.mark.parametrize("name", FILES)
def test_configuration_files(tmp_path, name):
    content, words = FILES[name]
    file = tmp_path / "config.py"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal("train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert "expected" in line and words in line and str(file) in line, line


MODEL = ("--model=embedded", "--prompts=a", "--out=OUT")
VERBS = [
    ("sample", (), "--out"),
    ("sample", ("--out=OUT",), "--model"),
    ("sample", ("--model=embedded", "--workdir=a", "--prompts=a", "--out=OUT"), "both"),
    ("sample", (*MODEL, "--file=a"), "both"),
    *[
        ("sample", (*MODEL, f"--{name}={value}"), name)
        for name, values in {
            "steps": ("0", "-1", "1.5", "²", "x", "", "1000000000000", HUGE, "1_0", "١"),
            "seed": ("-1", "4294967296", "nan", "²"),
            "guidance": ("nan", "inf", "-1", "x", "1e300", "1_0"),
            "embedded_guidance": ("0", "inf", "x"),
            "size": ("64", "64x", "²x²", "0x0", "-64x64", "64x64x64", "1000000x1000000", "x"),
            "batch": ("0", "x", "99999999999"),
            "images": ("0", "1e3", "99999999999999"),
            "dtype": ("float17", "int8"),
            "max_sequence_length": ("0", "x", "99999999"),
            "grid": ("yes", "1"),
            "policy": ("best of all", "emma"),
        }.items()
        for value in values
    ],
    ("sample", (*MODEL, "--steps=1", "--steps=2"), "twice"),
    ("sample", (*MODEL, "--tokens=5"), "max_sequence_length"),
    ("sample", ("--model=embedded", "--file=/nowhere", "--out=OUT"), "/nowhere"),
    ("evaluate", (), "--models"),
    ("evaluate", ("--models=a=embedded", "--out=OUT", "--images=0"), "images"),
    ("evaluate", ("--models=a=embedded", "--out=OUT", "--num_workers=-1"), "num_workers"),
    ("evaluate", ("--models=a=embedded", "--out=OUT", "--num_prompts=-1"), "num_prompts"),
    ("evaluate", ("--models==embedded", "--out=OUT"), "--models"),
    ("evaluate", ("--models=../a=embedded", "--out=OUT"), "--models"),
    ("evaluate", ("--models=", "--out=OUT"), "--models"),
    # Names that the evaluation's own files have.
    ("evaluate", ("--models=evaluation.json=embedded", "--out=OUT"), "evaluation.json"),
    ("evaluate", ("--models=Rating=embedded", "--out=OUT"), "Rating"),
    ("evaluate", (f"--models={'a' * 101}=embedded", "--out=OUT"), "at most 100 letters"),
    ("evaluate", ("--models=a=~no_such_user/model", "--out=OUT"), "~no_such_user/model"),
    ("sample", ("--model=~no_such_user/model", "--prompts=a", "--out=OUT"), "~no_such_user/model"),
    ("convert", ("--model=~no_such_user/model", "--out=OUT"), "~no_such_user/model"),
    ("export", (), "--workdir"),
    ("export", ("--workdir=WORK", "--out=OUT", "--step=²"), "step"),
    ("export", ("--workdir=WORK", "--out=OUT", "--step=-1"), "step"),
    ("export", ("--workdir=WORK", "--out=OUT", "--step=1e3"), "step"),
    ("export", ("--workdir=/nowhere", "--out=OUT"), "/nowhere"),
    ("export", ("--workdir=WORK", "--out=OUT", "--policy=base"), "policy"),
    ("convert", (), "--model"),
    ("convert", ("--model=embedded",), "--out"),
    ("convert", ("--model=embedded", "--out=OUT", "--to=pickle"), "pickle"),
    ("convert", ("--model=embedded", "--out=OUT", "--dtype=int4"), "int4"),
    ("convert", ("--model=embedded", "--out=OUT", "--shard=0"), "shard"),
    ("convert", ("--model=embedded", "--out=OUT", "--shard=-1GB"), "shard"),
    ("convert", ("--model=embedded", "--out=OUT", "--shard=²GB"), "shard"),
    ("convert", ("--model=embedded", "--out=OUT", "--shard=1e400GB"), "shard"),
    ("convert", ("--model=embedded", "--out=OUT", f"--shard={HUGE}GB"), "shard"),
    ("convert", ("--model=embedded", "--out=OUT", "--components=brain"), "brain"),
    ("convert", ("--model=/nowhere", "--out=OUT"), "/nowhere"),
    ("convert", ("--check=/nowhere",), "/nowhere"),
    ("report", (), "--workdir"),
    ("report", ("--workdir=/nowhere",), "/nowhere"),
    ("report", ("--workdir=/dev/null",), "/dev/null"),
    ("report", ("--workdir=s4://bucket/run",), "s4"),
    # What a name of other bytes than UTF-8 comes as.
    ("report", ("--workdir=a\udcff",), "UTF-8"),
    ("train", (f"--config={CONFIG}", "--workdir=a\udcff"), "UTF-8"),
    ("evaluate", ("--models=a=embedded", "--out=a\udcff"), "UTF-8"),
    ("prompts", (), "--out"),
    ("prompts", ("--out=OUT", "--check=a"), "both"),
    ("prompts", ("--out=OUT", "--seed=-1"), "seed"),
    ("prompts", ("--out=OUT", "--seed=²"), "seed"),
    ("prompts", ("--out=OUT", "--scale=nan"), "scale"),
    ("prompts", ("--out=OUT", "--scale=inf"), "scale"),
    ("prompts", ("--out=OUT", "--scale=1e300"), "scale"),
    ("reward", (), "check"),
    ("reward", ("judge",), "judge"),
    ("reward", ("check", "--path=/nowhere"), "/nowhere"),
    ("reward", ("check", "--path=embedded", "--size=1"), "size"),
    ("reward", ("check", "--path=embedded", "--size=10000000"), "size"),
    ("reward", ("check", "--path=embedded", "--batch=0"), "batch"),
    ("reward", ("check", "--path=embedded", "--timeout=inf"), "timeout"),
    ("reward", ("serve", "--path=embedded", "--port=²"), "port"),
    ("reward", ("serve", "--path=embedded", "--port=99999"), "port"),
    ("reward", ("serve", "--path=embedded", "--port=-1"), "port"),
    ("reward", ("serve", "--path=embedded", "--workers=0"), "workers"),
    (
        "train",
        (f"--config={CONFIG}", "--workdir=OUT", "--coordinator=a..b:8476")
        + ("--num_processes=2", "--process_id=1"),
        "a..b:8476",
    ),
    ("reward", ("serve", "--path=embedded", "--workers=1000000"), "workers"),
    ("reward", ("serve", "--path=embedded", "--max_side=0"), "max_side"),
    ("reward", ("serve", "--path=embedded", "--token_file=/nowhere"), "/nowhere"),
    ("plan", (f"--config={CONFIG}", "--devices=-1"), "devices"),
    ("plan", (f"--config={CONFIG}", "--devices=99999999"), "devices"),
    ("plan", (f"--config={CONFIG}", "--utilisation=2"), "utilisation"),
    ("plan", (f"--config={CONFIG}", "--utilisation=nan"), "utilisation"),
    ("plan", (f"--config={CONFIG}", "--programs=dream"), "dream"),
    ("plan", (f"--config={CONFIG}", "--json=/nowhere/plan.json"), "/nowhere/plan.json"),
    ("plan", (f"--config={CONFIG}", "--json=/"), "json"),
    ("trian", (), "did you mean 'train'"),
    ("\x1b[2J", (), "\\x1b"),
]


@pytest.mark.parametrize(("verb", "arguments", "words"), VERBS)
def test_options(tmp_path, verb, arguments, words):
    (tmp_path / "work").mkdir()
    places = {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work")}
    given = []
    for argument in arguments:
        for name, place in places.items():
            argument = argument.replace(f"={name}", f"={place}")
        given.append(argument)
    line = refusal(verb, *given)
    assert "expected" in line and words in line, line
    assert len(line) < 1000, "the line is a page"
    assert not (tmp_path / "out").exists(), "something was written"


def test_help_is_no_refusal():
    status, out, err = run("sample", "--help")
    assert status == 0 and "usage" in out and err == ""


RECORDS = [
    ({"lora.alpha": float("nan")}, "config.json & NaN"),
    ({"lora.alpha": "4"}, "lora.alpha"),
    ({"lora.rank": 2.5}, "lora.rank"),
    ({"seed": 2**70}, "seed"),
    ({"seed": None}, "seed"),
    ({"model.path": 5}, "model.path"),
    ({"model.height": [64]}, "model.height"),
    ({"rewards.train": "brightness"}, "rewards.train"),
    ({"rewards.train": [5]}, "rewards.train"),
    ({"training.learning_rate": float("inf")}, "config.json & Infinity"),
    ({"rollout.solver": {}}, "rollout.solver"),
    ({"model.dtype": None}, "model.dtype"),
]


@pytest.mark.parametrize(("change", "words"), RECORDS)
def test_configuration_of_a_run(tmp_path, change, words):
    (tmp_path / "config.json").write_text(json.dumps(change))
    check(line_of(lambda: run_settings(Workdir(tmp_path))), words)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_configuration_of_a_run(tmp_path, kind):
    content, _ = DAMAGED[kind]
    file = tmp_path / "config.json"
    if content == "folder":
        file.mkdir()
    elif content == "loop":
        file.symlink_to(file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.write_text(content)
    check(line_of(lambda: run_settings(Workdir(tmp_path))), "config.json")
