"""`marble-jax export`: its options, and bad input in one line; what it writes is in tests/programs/test_export.py."""

import pytest

from marble_jax.cli.main import main


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--workdir: expected a value; received none"),
        (["--workdir=/nowhere"], "--out: expected a value; received none"),
        (
            ["--workdir=/nowhere", "--out=x"],
            "--workdir: expected a training run (with config.json); received /nowhere",
        ),
        (
            ["--workdir=x", "--out=y", "--policy=emma"],
            "--policy: expected one of ema, current, rollout, best; received 'emma'; did you mean 'ema'?",
        ),
        (
            ["--workdir=x", "--out=y", "--policy=old"],
            "--policy: expected 'rollout', as the policy is called now; received 'old'",
        ),
        (
            ["--workdir=x", "--out=y", "--policy=base"],
            "--policy: expected one of ema, current, rollout, best; received 'base'",
        ),
        (
            ["--workdir=x", "--out=y", "--which=ema"],
            "--which: expected --policy=NAME, as it is called now; received its earlier name",
        ),
        (
            ["--workdir=x", "--out=y", "--merge", "--dtype=int8"],
            "--dtype: expected one of float32, bfloat16, float16",
        ),
        (
            ["--workdir=x", "--out=y", "--dtype=float16"],
            "--dtype: expected with --merge, whose weights it is of; received 'float16' alone",
        ),
        (
            ["--workdir=x", "--out=y", "--prompt=a cat"],
            "--prompt: expected with --verify, which draws it; received 'a cat' alone",
        ),
        (
            ["--workdir=x", "--out=y", "--step=last"],
            "--step: expected the number of a step; received 'last'",
        ),
        (
            ["--workdir=x", "--out=y", "--verify=maybe"],
            "--verify: expected one of true, false; received 'maybe'",
        ),
        (
            ["--workdir=x", "--out=y", "--config=z"],
            "export: expected no --config (a run brings its own); received --con",
        ),
        (["--workdir=x", "--out=y", "--polciy=ema"], "received --polciy; did you mean 'policy'?"),
    ],
)
def test_bad_input(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("export", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_help(capsys):
    assert main(["export", "--help"]) == 0
    assert "--verify" in capsys.readouterr().out
