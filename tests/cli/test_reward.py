"""`marble-jax reward check` and `serve`: what they print, when they fail, and that a server comes and goes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from marble_jax.cli import reward_choice
from marble_jax.cli.main import main
from marble_jax.cli.reward_serve import _passed_over
from marble_jax.rewards.base import Reward
from marble_jax.rewards.http import protocol

MODULE = """
import time


def red(image, prompt, metadata):
    return (image[..., 0] - image[..., 1]).mean() * prompt.startswith("a red")


def same(image, prompt, metadata):
    return 0.5


def broken(image, prompt, metadata):
    raise FileNotFoundError("model.bin")


def rank(images, prompt, metadata):
    return images.mean((1, 2, 3)) - images.mean()


NUMBER = iter(range(1000))


def faulty(images, prompts, metadata):
    scores = [float(image.mean()) + 5 for image in images]
    kind = next(NUMBER) % 16  # the first call is the check's; 5 of 16 go wrong
    if kind == 2:
        raise ConnectionError("server gone")
    if kind == 5:
        time.sleep(30)
    return {8: [float("nan")] * len(scores), 11: scores[1:], 14: "garbage"}.get(kind, scores)
"""
SMOKE = (
    f"--config={Path(__file__).parents[2] / 'configs' / 'embedded.py'}:smoke",
    "--config.rewards.heldout=",
    "--config.harmonize.reward_weights=",
    "--config.harmonize.mode=exact",
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module of functions and a rewards directory."""
    (tmp_path / "marble_test_cli.py").write_text(MODULE)
    (tmp_path / "rewards.json").write_text(
        json.dumps(
            {
                "red": {"kind": "function", "function": "marble_test_cli:red"},
                "same": {"kind": "function", "function": "marble_test_cli:same"},
                "lost": {"kind": "function", "function": "marble_test_cli:lost"},
            }
        )
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_check_prints_a_table_and_records(here, capsys):
    assert (
        main(["reward", "check", f"--path={here}", "--rewards=red", "--size=32", "--batch=4"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].startswith("1 rewards on 12 golden images of 32 px") and "peak memory" in lines[0]
    )
    assert lines[1].split()[:6] == ["reward", "status", "own", "other", "img/s", "weights"]
    assert lines[3].split()[:2] == ["red", "ok"] and "own prompts lead by 0.0" in lines[3]
    command = ["reward", "check", f"--path={here}", "--rewards=red", "--size=32"]
    assert main([*command, "--write"]) == 0 and (here / "golden.json").exists()
    assert main(command) == 0 and "as on record, within" in capsys.readouterr().out


def test_check_fails_for_what_is_broken(here, capsys):
    functions = ["marble_test_cli:broken", "marble_test_cli:same", "marble_test_cli:red"]
    assert (
        main(["reward", "check", f"--path={here}", f"--rewards={','.join(functions)}", "--size=16"])
        == 2
    )
    captured = capsys.readouterr()
    assert "12 of 12 golden images without a score: FileNotFoundError: model.bin" in captured.out
    assert captured.err.splitlines()[-1] == (
        "marble-jax reward: check: expected every reward to pass; received marble_test_cli:broken (failed), "
        "marble_test_cli:same (constant)"
    )


def test_check_goes_on_past_a_reward_that_does_not_load(here, capsys):
    assert main(["reward", "check", f"--path={here}", "--size=16"]) == 2
    captured = capsys.readouterr()
    assert "not loaded" in captured.out and "expected a function lost in" in captured.out
    assert "received same (constant), lost (not loaded)" in captured.err
    assert main(["reward", "check", f"--path={here}", "--rewards=lost", "--size=16"]) == 2


def test_clip_rewards_are_checked_on_clips(here, capsys):
    (here / "rewards.json").write_text(
        json.dumps(
            {
                "told": {"kind": "motion_as_told"},
                "still": {"kind": "flicker"},
                "red": {"kind": "brightness"},
            }
        )
    )
    command = ["reward", "check", f"--path={here}", "--size=32", "--batch=2", "--frames=count:3"]
    assert main([*command, "--write"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "12 golden images of 32 px or clips of 5 frames (own prompts" in lines[0]
    assert lines[3].split()[:2] == ["told", "ok"]
    assert " frames" in lines[1] and " all " in lines[3]
    assert lines[5].endswith(" count:3, mean of scores")
    assert set(json.loads((here / "golden.json").read_text())["scores"]) == {"told", "still", "red"}
    assert main([*command, "--rewards=told,still"]) == 0
    assert "as on record" in capsys.readouterr().out
    # Of another length nothing is on record.
    assert main([*command, "--rewards=told", "--num_frames=9"]) == 0
    shown = capsys.readouterr().out
    assert "clips of 9 frames" in shown and "as on record" not in shown


def test_a_run_s_rules_of_scoring_are_those_that_are_checked_and_served(
    monkeypatch, refused, capsys
):
    asked = []
    load = reward_choice.load_rewards

    def load_rewards(*args, **options):
        asked.append(options["upstream"])
        return load(*args, **options)

    monkeypatch.setattr(reward_choice, "load_rewards", load_rewards)
    command = ["reward", "check", *SMOKE, "--rewards=geneval", "--batch=1"]
    assert main(command) == 0
    assert "upstream's rules" not in capsys.readouterr().out
    upstream = [*command, "--config.rewards.upstream_scoring=true"]
    assert main(upstream) == 0
    assert "OCR and GenEval by upstream's rules" in capsys.readouterr().out
    assert asked == [False, True]
    # Scores on record are of the published rules.
    assert "--write: expected rewards that score by the published rules" in refused(
        *upstream, "--write"
    )


def test_functions_need_no_directory(here):
    config = here / "mine.py"
    config.write_text(
        "from marble_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        "    config.rewards.train = ('marble_test_cli:red',)\n"
        "    config.model.height = config.model.width = 32\n    return config\n"
    )
    assert main(["reward", "check", f"--config={config}"]) == 0


def test_bad_command_lines(refused, here):
    assert (
        "reward: expected one of check, serve; received 'chek'; did you mean 'check'?"
        in refused("reward", "chek")
    )
    assert "expected one of check, serve; received ''" in refused("reward")
    assert "expected either --config or --rewards_path; received neither" in refused(
        "reward", "check"
    )
    assert "rewards.path: expected a directory with rewards.json" in refused(
        "reward", "check", "--path=/nowhere"
    )
    assert "--batch: expected a whole number of at least 1" in refused(
        "reward", "check", "--path=x", "--batch=0"
    )
    assert "received 'rd'; did you mean 'red'?" in refused(
        "reward", "check", f"--path={here}", "--rewards=rd"
    )
    check = ("reward", "check", f"--path={here}", "--rewards=red")
    assert (
        "--frames: expected one of all, first, every:K, count:M; received 'firs'; did you mean 'first'?"
        in refused(*check, "--frames=firs")
    )
    assert "--frame_reduction: expected one of mean, min; received 'max'" in refused(
        *check, "--frame_reduction=max"
    )
    assert "--num_frames: expected a whole number of at least 1; received '0'" in refused(
        *check, "--num_frames=0"
    )
    serve = ("reward", "serve", f"--path={here}", "--rewards=red")
    assert "--port: expected a whole number of at least 0; received 'x'" in refused(
        *serve, "--port=x"
    )
    assert "--host: expected a loopback address" in refused(*serve, "--host=0.0.0.0", "--port=0")
    assert "expected --token or --token_file; received both" in refused(
        *serve, "--token=a", "--token_file=b"
    )
    assert "expected a token in nowhere; received FileNotFoundError" in refused(
        *serve, "--token_file=nowhere"
    )
    assert "expected a function lost in" in refused("reward", "serve", f"--path={here}")


def test_serve_until_a_signal(here):
    """In a process of its own: it says where it is, answers, and ends with status 0."""
    (here / "token").write_text("t0k\n")
    (here / "token").chmod(0o600)
    command = [
        sys.executable,
        "-m",
        "marble_jax",
        "reward",
        "serve",
        f"--path={here}",
        "--rewards=red",
        "--port=0",
        "--token_file=token",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("serving red at http://127.0.0.1:") and "(with a token)" in line
            image = np.zeros((1, 4, 4, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
            body = protocol.encode_request(protocol.Request("red", image, ["a red thing"], [{}]))
            headers = {"Content-Type": protocol.CONTENT_TYPE, "Authorization": "Bearer t0k"}
            request = urllib.request.Request(line.split()[3] + "/score", body, headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.loads(answer.read()) == {"scores": [1.0], "applies": [True]}
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0 and process.stderr.read() == ""
        finally:
            process.kill()


def test_training_does_not_start_with_a_broken_reward(refused, here):
    message = refused(
        "train", *SMOKE, "--config.rewards.train=marble_test_cli:broken,geneval", "--workdir=run"
    )
    assert (
        "reward marble_test_cli:broken: expected sound scores of the golden images; received a reward that fails"
        " (12 of 12 golden images without a score: FileNotFoundError: model.bin)" in message
    )
    assert not (here / "run").exists()


def test_a_reward_that_compares_images_needs_whole_groups(refused, here):
    message = refused(
        "train",
        *SMOKE,
        "--config.rewards.train=marble_test_cli:rank",
        "--config.rollout.batch_size=6",
        "--workdir=run",
    )
    assert (
        "rollout.batch_size: expected a multiple of the 4 images a prompt, as marble_test_cli:rank"
        in message
    )


@pytest.mark.slow
def test_training_with_a_reward_that_fails_now_and_then(here, capsys):
    """Raises, hangs, NaN, too few and garbage: the run goes on under mask, stops under fail, and goes on again."""
    command = [
        "train",
        *SMOKE,
        "--config.rewards.train=marble_test_cli:faulty,geneval",
        "--workdir=run",
        "--config.rollout.batch_size=4",
        "--config.rewards.timeout=2",
    ]
    assert main([*command, "--config.training.num_steps=6"]) == 0
    rows = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    failed = [row["rollout/failed_count/marble_test_cli:faulty"] for row in rows]
    assert len(rows) == 6 and sum(failed) >= 16 and sum(failed) % 4 == 0
    assert all(5 < row["rollout/score_mean/marble_test_cli:faulty"] < 6 for row in rows)
    assert "marble_test_cli:faulty failed at times" in (here / "run" / "report.html").read_text()
    capsys.readouterr()
    assert main([*command, "--config.training.num_steps=20", "--config.rewards.on_error=fail"]) == 2
    (line,) = [
        text
        for text in capsys.readouterr().err.splitlines()
        if text.startswith("marble-jax train:")
    ]
    assert "reward marble_test_cli:faulty: " in line
    done = len((here / "run" / "metrics.jsonl").read_text().splitlines())
    assert line.endswith(f"; saved after step {done}, the same command goes on from there")
    assert main([*command, f"--config.training.num_steps={done + 2}"]) == 0
    assert len((here / "run" / "metrics.jsonl").read_text().splitlines()) == done + 2


def test_serving_says_that_sources_have_no_effect():
    """Requests have prompts without a source: only the client's entry can go by one."""
    some = Reward(name="red", kind="host", sources=("ocr", "general"))
    (line,) = _passed_over([some, Reward(name="same", kind="host")])
    assert line.startswith("reward red: sources (ocr, general) have no effect here")
