"""The experiment runner: its methods, what it runs and skips, what it makes of the records."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from marble_jax.cli.configuration import load_config
from marble_jax.errors import InputError
from marble_jax.storage.workdir import Workdir
from tools.experiments import equal_cost, fronts, results, runner, table
from tools.experiments.__main__ import main
from tools.experiments.methods import METHODS, SUITES, VIDEO_METHODS, Job, choose, jobs

ROOT = Path(__file__).parents[2]
FILE = str(ROOT / "configs" / "embedded.py")
FAKE = (sys.executable, str(Path(__file__).parent / "fake_train.py"))
REWARDS = ["alignment", "preference", "aesthetic", "ocr", "geneval"]


@pytest.fixture(scope="module")
def planned():
    """Every run of every method for one seed."""
    return jobs(METHODS, 1, Path("out"), FILE)


def test_every_method_has_a_preset_and_every_run_one_configuration(planned):
    assert len({m.name for m in METHODS}) == len(METHODS) and {m.suite for m in METHODS} == set(
        SUITES
    )
    assert sorted(n for job in planned for n in job.methods) == sorted(m.name for m in METHODS)
    without = [{k: v for k, v in job.config.items() if k != "name"} for job in planned]
    assert all(a != b for i, a in enumerate(without) for b in without[:i])
    for job in planned:
        *given, workdir = job.arguments
        assert workdir == f"--workdir=out/{job.name}" and job.config["seed"] == 1
        assert load_config(given).name == job.config["name"]


def test_the_methods_are_what_their_names_say(planned):
    config = {name: job.config for job in planned for name in job.methods}
    for name in ("exact", "amortized", "upstream"):
        assert (
            config[name]["harmonize.mode"] == name
            and config[name]["harmonize.balancer"] == "marble"
        )
    for name, scalarize in (
        ("weighted_sum", "weighted_sum"),
        ("weighted_sum_raw", "weighted_sum"),
        ("upweighted", "weighted_sum"),
        ("gdpo", "gdpo"),
        ("sequential", "weighted_sum"),
        ("exact", "none"),
        ("dropout", "none"),
    ):
        assert config[name]["advantages.scalarize"] == scalarize
    up, level = (config[name]["advantages.weights"] for name in ("upweighted", "weighted_sum"))
    np.testing.assert_allclose(np.array(up) / (level or 1), [1, 1, 1, 2, 2])
    assert config["weighted_sum_raw"]["advantages.weights"] == []
    assert config["unit_weights"]["harmonize.reward_weights"] == []
    rivals = [m.name for m in METHODS if m.suite == "balancers"]
    assert config[rivals[0]] == config["unit_weights"] and len(rivals) == 6
    assert [config[name]["harmonize.balancer"] for name in rivals[1:]] == rivals[1:]
    assert all(config[name]["harmonize.reward_weights"] == [] for name in rivals)
    assert (
        config["dropout"]["reward_schedule.dropout"] > 0
        and len(config["sequential"]["reward_schedule.stages"]) == 3
    )
    assert all(config[f"only_{name}"]["rewards.train"] == [name] for name in REWARDS)
    assert [config[f"refresh_{n}"]["harmonize.refresh_every"] for n in (2, 5, 10, 20)] == [
        2,
        5,
        10,
        20,
    ]
    assert [config[f"rho_{r}"]["harmonize.rho"] for r in (0.1, 0.5, 0.9)] == [0.1, 0.5, 0.9]
    assert (
        not config["raw_exact"]["harmonize.normalize"]
        and config["raw_exact"]["harmonize.mode"] == "exact"
    )
    micro = config["solve_micro"]
    assert (micro["harmonize.mode"], micro["harmonize.refresh_every"]) == ("upstream", 1)
    assert config["solve_batch"] == config["exact"]
    assert "rho_0.7" in next(job.methods for job in planned if job.name == "amortized-1")


def test_methods_on_clips_are_presets_of_their_own_file():
    planned = jobs(choose("video", ()), 1, Path("out"), str(ROOT / "configs" / "embedded_video.py"))
    assert [job.methods for job in planned] == [(method.name,) for method in VIDEO_METHODS]
    rewards = planned[0].config["rewards.train"]
    singles = [job.config["rewards.train"] for job in planned if "_only_" in job.name]
    assert singles == [[name] for name in rewards]
    weights = next(job for job in planned if "weighted_sum" in job.name).config[
        "advantages.weights"
    ]
    assert len(weights) == len(rewards)
    # Other objectives are those that images have, too.
    objectives = [m for m in METHODS if m.suite == "objectives"]
    on_images = [m.preset for m in objectives if not m.name.startswith("nft")]
    assert [m.preset for m in VIDEO_METHODS][-len(on_images) :] == on_images


def test_choosing():
    assert [m.name for m in choose("main", ())] == [m.name for m in METHODS if m.suite == "main"]
    assert choose("all", ()) == METHODS
    assert [m.name for m in choose("main", ("rho_0.1", "exact"))] == ["exact", "rho_0.1"]
    with pytest.raises(
        InputError, match="--suite: expected one of main, .*; received 'mian'; did you mean 'main'"
    ):
        choose("mian", ())
    with pytest.raises(
        InputError, match="--methods: expected one of .*; received 'gpdo'; did you mean 'gdpo'"
    ):
        choose("main", ("gpdo",))
    with pytest.raises(InputError, match="--seeds: expected at least 1; received 0"):
        jobs(METHODS[:1], 0, Path("out"), FILE)


class Bench:
    """Three small jobs and a plan of what their processes do."""

    def __init__(self, folder: Path, **plan):
        self.folder, self.plan = folder, folder / "plan.json"
        rewards = {
            "rewards.train": ["a", "b"],
            "rewards.heldout": ["judge"],
            "training.num_steps": 4,
        }
        self.jobs = [
            Job(
                f"{n}-{seed}",
                (n,),
                seed,
                folder / "runs" / f"{n}-{seed}",
                {"name": n, "seed": seed, **rewards},
                (f"--workdir={folder / 'runs' / f'{n}-{seed}'}",),
            )
            for n, seed in (("x", 1), ("y", 1), ("x", 2))
        ]
        self.change(**plan)
        self.said: list[str] = []

    def change(self, **plan):
        self.plan.write_text(
            json.dumps({"runs": {str(j.workdir): j.config for j in self.jobs}} | plan)
        )

    def run(self, num_jobs=1):
        self.said.clear()
        return runner.run(
            self.jobs, num_jobs, self.folder / "logs", FAKE, self.said.append, 0.01, 1e9
        )

    @property
    def calls(self):
        file = Path(f"{self.plan}.calls")
        return (
            [line.split(" ", 1)[0] for line in file.read_text().splitlines()]
            if file.exists()
            else []
        )


@pytest.fixture
def bench(tmp_path, monkeypatch):
    made = Bench(tmp_path)
    monkeypatch.setenv("PLAN", str(made.plan))
    return made


def test_finished_runs_are_skipped_and_broken_ones_go_on(bench):
    bench.change(stop_after={"y-1": 2}, fail=["x-2"])
    assert bench.run() == ["y-1", "x-2"]
    assert bench.calls == ["x-1", "y-1", "x-2"]
    assert bench.said[0] == "x-1: 4 steps" and bench.said[1].startswith("x-1: done in ")
    assert bench.said[3].startswith("y-1: ended with status 143 after ")
    assert bench.said[5].endswith(
        "marble-jax train: model.path: expected a directory; received nothing"
    )
    assert [runner.steps_done(j) for j in bench.jobs] == [4, 2, 0]
    assert [runner.finished(j) for j in bench.jobs] == [True, False, False]
    bench.change()
    assert bench.run() == []
    assert bench.calls == ["x-1", "y-1", "x-2", "y-1", "x-2"]
    assert bench.said[:2] == ["1 of 3 runs are there already", "y-1: 4 steps, from step 2"]
    assert [
        r["step"] for r in map(json.loads, (bench.jobs[1].workdir / "metrics.jsonl").open())
    ] == [0, 1, 2, 3]
    assert bench.run() == [] and len(bench.calls) == 5


def test_two_at_a_time_share_the_cores(bench):
    assert bench.run(num_jobs=2) == []
    assert sorted(bench.calls) == ["x-1", "x-2", "y-1"]
    own = sorted(os.sched_getaffinity(0))
    dealt = runner.cores(2)
    assert set().union(*dealt) == set(own) and all(dealt)
    assert len(own) == 1 or not dealt[0] & dealt[1]
    for line in Path(f"{bench.plan}.calls").read_text().splitlines():
        cores, threads = line.split(" ", 1)[1].rsplit(" ", 1)
        assert set(json.loads(cores)) in dealt and int(threads) == len(json.loads(cores))


def test_a_folder_with_another_run_stops_everything(bench):
    other = bench.jobs[2]
    other.workdir.mkdir(parents=True)
    (other.workdir / "config.json").write_text(json.dumps({**other.config, "seed": 9}))
    with pytest.raises(
        InputError, match="holds another run: seed: expected 9 .its own.; received 2"
    ):
        bench.run()
    assert bench.calls == []


def test_progress(bench):
    bench.change(stop_after={"x-2": 2})
    times = iter([0.0, 30.0])
    fresh = runner.Progress(bench.jobs, lambda: next(times))
    assert fresh.line() == "0 of 12 steps, 0 of 3 runs done, ? left"
    bench.run()
    assert (
        fresh.line([bench.jobs[2]])
        == "10 of 12 steps, 2 of 3 runs done, 6s left; x-2 at step 2 of 4"
    )


def test_the_result_of_a_run(bench):
    """Steps take 2, 3, 4 and 5 s; two are looked at, with conflict 0 and 1 and worst cosine 0.5 and -0.5."""
    bench.change(gain={"x-1": {"a": -0.25}})
    bench.run()
    got = results.run_result(bench.jobs[0])
    assert (got["seed"], got["methods"], got["num_steps"], got["trained"]) == (
        1,
        ["x"],
        4,
        ["a", "b"],
    )
    assert got["before"] == {"a": 1.0, "b": 1.0, "judge": 1.0} and got["after"] == {
        "a": 0.75,
        "b": 1.5,
        "judge": 1.5,
    }
    assert got["gain"]["a"] == {"mean": -0.25, "low": -0.35, "high": -0.15}
    assert (got["conflict_rate"], got["worst_cos"], got["least_cos"], got["steps_looked_at"]) == (
        0.5,
        0,
        -0.5,
        2,
    )
    assert got["out_of_sample"] == {
        "conflict": 0.5,
        "worst_cos": -0.25,
        "conflict_mean": None,
        "worst_cos_mean": None,
    }
    assert (got["seconds"], got["seconds_per_step"]) == (14.0, 3.5)
    # Without 1.5 s of compiling: 3 s of the step with a solve, and three times 4 s, the median of 0.5, 4 and 5.
    assert got["curve"] == [
        {
            "step": 4,
            "seconds": 15.0,
            "gain": {"a": -0.25, "b": 0.5, "judge": 0.5},
            "joint": {"trained": {"domination": 0.25, "collapse": 0.25}},
        }
    ]
    share = {"mean": 0.25, "low": 0.1, "high": 0.5}
    assert got["joint"] == {
        "trained": {"rewards": ["a", "b"], "count": 8}
        | dict.fromkeys(("domination", "collapse", "difference"), share)
    }
    hashes = [results.config_hash(j.config) for j in bench.jobs]
    assert len(set(hashes)) == 1 and got["config_hash"] == hashes[0]
    assert results.config_hash({**bench.jobs[0].config, "nft.beta": 1}) != hashes[0]


def test_results_are_written_and_read_back(bench, tmp_path):
    bench.change(fail=["y-1"])
    bench.run()
    found = results.collect(bench.jobs, "the command")
    assert (
        found["missing"] == ["y-1"]
        and list(found["runs"]) == ["x-1", "x-2"]
        and found["seeds"] == [1, 2]
    )
    assert found["versions"] == {"jax": "1"} and "versions" not in found["runs"]["x-1"]
    results.write_json(tmp_path / "new" / "results.json", found)
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == found


def made_results():
    """Three methods, two seeds, by hand: method c trains on one reward and has one seed."""

    def run(method, seed, gains, lows, trained=("a", "b"), conflict=0.0, cosine=0.5, later=None):
        gain = {
            n: {"mean": g, "low": low, "high": g + (g - low)}
            for n, g, low in zip("abj", gains, lows, strict=True)
        }
        return {
            "seed": seed,
            "methods": [method],
            "num_steps": 10,
            "num_prompts": 20,
            "trained": list(trained),
            "gain": gain,
            "conflict_rate": conflict,
            "worst_cos": cosine,
            "least_cos": cosine,
            "out_of_sample": later or {},
            "seconds": 60.0,
        }

    def later(*values):
        names = ("conflict", "worst_cos", "conflict_mean", "worst_cos_mean")
        return dict(zip(names, values, strict=True))

    runs = {
        "p-1": run("p", 1, (1.0, 2.0, 0.1), (0.5, 1.0, 0.0), later=later(0.25, -0.02, 0.0, 0.1)),
        "p-2": run(
            "p", 2, (3.0, 2.0, 0.3), (2.5, -1.0, 0.2), cosine=0.3, later=later(0.35, 0.03, 0.5, 0.2)
        ),
        "q-1": run("q", 1, (5.0, -2.0, 0.2), (4.0, -3.0, 0.1), conflict=0.5, cosine=-0.25),
        "q-2": run("q", 2, (7.0, 4.0, 0.2), (6.0, 3.0, 0.1), conflict=1.0, cosine=-0.75),
        "c-1": run("c", 1, (0.0, 9.0, 0.5), (-1.0, 8.0, 0.4), ("b",), None, None),
    }
    methods = [{"name": n, "title": n.upper(), "suite": "main"} for n in "pqc"]
    return {"command": "make it", "seeds": [1, 2], "methods": methods, "missing": [], "runs": runs}


def test_intervals_over_seeds():
    """Student's t at 0.975 is 12.706 with one degree of freedom and 4.303 with two."""
    assert table.t_interval(np.array([1.0, 3.0])) == pytest.approx((2.0, 12.7062), rel=1e-5)
    assert table.t_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(
        (2.0, 4.302653 / 3**0.5), rel=1e-5
    )
    mean, half = table.t_interval(np.array([5.0]))
    assert mean == 5.0 and np.isnan(half)
    assert np.isnan(table.t_interval(np.array([]))).all()


def test_rows_and_verdicts():
    made = made_results()
    names = table.columns(made)
    assert names == ("a", "b", "j")
    p, q, c = table.rows(made)
    assert (p.seeds, c.seeds, c.trained) == ((1, 2), (1,), ("b",))
    np.testing.assert_array_equal(p.gain, [[1, 2, 0.1], [3, 2, 0.3]])
    # Seed 2 of p: b gains 2 with an interval from -1, so all are up in both seeds and clearly so in the first.
    assert table.verdict(p, ("a", "b"), names) == ("2/2", "1/2")
    assert table.verdict(q, ("a", "b"), names) == ("1/2", "1/2")
    assert table.verdict(c, ("a", "b"), names) == ("0/1", "0/1")
    np.testing.assert_array_equal(q.clear, [[1, -1, 1], [1, 1, 1]])
    assert np.isnan(c.worst_cos).all() and table.rows(made, "sweeps") == []


def test_the_composite_by_hand():
    """Of two rows every z-score is 1 or -1: p gains less of a and as much more of b; the judge is the same on average.

    Means: p (2, 2, 0.2), q (6, 1, 0.2): z of p is -1 and +1, the third column does not tell them apart. In seed 1
    (1, 2, 0.1) against (5, -2, 0.2): -1, +1, -1; in seed 2 (3, 2, 0.3) against (7, 4, 0.2): -1, -1, +1.
    """
    found = table.rows(made_results())[:2]
    (p, p_half), (q, q_half) = table.composites(found)
    assert (p, q) == pytest.approx((0, 0), abs=1e-12)
    assert p_half == q_half == pytest.approx(0.0, abs=1e-9)  # -1/3 in both seeds for p
    for values, half in zip(
        table.composites(table.rows(made_results())), [np.nan] * 3, strict=True
    ):
        np.testing.assert_equal(values[1], half)  # one method lacks a seed
    three = table.composites(table.rows(made_results()))
    columns = np.array([[2, 6, 0], [2, 1, 9], [0.2, 0.2, 0.5]])
    z = (columns - columns.mean(1, keepdims=True)) / columns.std(1, keepdims=True)
    np.testing.assert_allclose([m for m, _ in three], z.mean(0), atol=1e-8)


def test_joint_rates_over_seeds_and_paired():
    """p: 20 and 30 % above, 10 and 10 % below; q: 40 and 40 % above, 10 and 30 % below; c trains on another set."""
    made = made_results()
    assert "above / below" not in "".join(table.gains_table(table.rows(made), ("a", "b", "j")))
    for name, trained, evaluated in (
        ("p-1", (0.2, 0.1), (0.1, 0.1)),
        ("p-2", (0.3, 0.1), (0.2, 0.1)),
        ("q-1", (0.4, 0.1), (0.1, 0.0)),
        ("q-2", (0.4, 0.3), (0.1, 0.0)),
        ("c-1", (0.6, 0.4), (0.5, 0.5)),
    ):
        made["runs"][name]["joint"] = {
            which: {"domination": {"mean": above}, "collapse": {"mean": below}}
            for which, (above, below) in (("trained", trained), ("all", evaluated))
        }
    head, _, p, q, c = table.gains_table(table.rows(made), ("a", "b", "j"))
    assert "above / below base on all 2 trained rewards | above / below base on all eval" in head
    # Two seeds: half of the interval is 12.706 times half of their distance.
    assert "| 25.0 ± 63.5 / 10.0 ± 0.0 % | 15.0 ± 63.5 / 10.0 ± 0.0 % |" in p
    assert "| 40.0 ± 0.0 / 20.0 ± 127.1 % | 10.0 ± 0.0 / 0.0 ± 0.0 % |" in q
    assert "| - | 50.0 / 50.0 % |" in c
    head, _, q, c = table.differences_table(table.rows(made), ("a", "b", "j"))
    assert "above - below on all 2 trained rewards, points" in head
    # Above minus below, q against p, seed by seed: 30 - 10 and 10 - 20 points; 10 - 0 and 10 - 10.
    assert q.endswith("| +5.0 ± 190.6 | +5.0 ± 63.5 |")
    assert c.endswith("| - | +0.0 |")


def test_the_page():
    text = table.markdown(made_results())
    lines = text.splitlines()
    assert (
        "make it" in text
        and "10 optimiser steps, 20 held-out prompts" in text
        and "## Methods" in text
    )
    head = next(line for line in lines if line.startswith("| method"))
    assert "| j (never trained) |" in head and "all 2 up" in head
    p = next(line for line in lines if line.startswith("| P |"))
    assert (
        "| 2 | +2.0000 ± 12.7062 | +2.0000 ± 0.0000 |" in p
        and "| 0 % | +0.40 (+0.30) | 30 %, +0.005 | 25 %, +0.150 | 1.0 |" in p
    )
    q = next(line for line in lines if line.startswith("| Q |"))
    assert "| 75 % | -0.50 (-0.75) |" in q
    c = next(line for line in lines if line.startswith("| C |"))
    assert c.startswith("| C | 1 | +0.0000 | +9.0000 | +0.5000 |") and c.endswith(
        "| 0/1 | 0/1 | - | - | - | - | 1.0 |"
    )
    at = lines.index("| minus P | a | b | j |")
    assert lines[at + 2].startswith("| Q | +4.0000 ± 0.0000 | -1.0000 ± 38.1186 |")
    assert lines[at + 3] == "| C | -1.0000 | +7.0000 | +0.4000 |"
    assert (
        len(
            {
                line.count("|")
                for line in lines
                if line.startswith(("| P |", "| Q |", "| C |", "| method"))
            }
        )
        > 1
    )
    empty = table.markdown({**made_results(), "runs": {}, "methods": []})
    assert "No run is finished yet." in empty


def with_curves():
    """A step of p takes 10 passes and 3 s, one of q 4 passes and 2 s; c is of an earlier version."""
    found = made_results()
    for name, run in found["runs"].items():
        if name.startswith("c"):
            continue
        passes, seconds = {"p": (10.0, 3.0), "q": (4.0, 2.0)}[name[0]]
        run["passes_per_step"] = passes
        ends = {n: run["gain"][n]["mean"] for n in "abj"}
        run["curve"] = [
            {
                "step": step,
                "seconds": step * seconds,
                "gain": {n: g * step / 10 for n, g in ends.items()},
                "joint": {"all": {"domination": step / 20, "collapse": step / 40}},
            }
            for step in (2, 4, 6, 10)
        ]
        # On the straight line from 6 to 10 but for one, which jumps there.
        run["curve"][2]["gain"]["b"] = 0.0
    return found


def test_methods_at_equal_cost_by_hand():
    """Ten steps of q take 40 passes and 20 s, which p reaches with 4 steps and with 6 2/3."""
    found = with_curves()
    runs = list(found["runs"].values())
    both = ("p", "q")
    assert equal_cost.budget(runs, "passes", both) == 40.0
    assert equal_cost.budget(runs, "seconds", both) == 20.0
    assert equal_cost.budget(runs, "passes", ("p",)) == 100.0
    assert equal_cost.reached(runs[0], "passes", 40.0).step == 4
    within = equal_cost.reached(runs[0], "seconds", 20.0)
    np.testing.assert_allclose([within.step, within.cost], [6 + 2 / 3, 20.0])
    end = runs[0]["gain"]["b"]["mean"]
    # 20 s are a sixth of the way from the evaluation at 18 s to that at 30 s.
    np.testing.assert_allclose(within.gain["b"], end / 6)
    np.testing.assert_allclose(within.joint["all"]["domination"], (6 + 2 / 3) / 20)
    assert not within.whole and equal_cost.reached(runs[0], "seconds", 31.0).whole
    assert equal_cost.reached(runs[0], "passes", 19.0) is None
    assert equal_cost.reached(found["runs"]["c-1"], "passes", 40.0) is None
    text = table.markdown(found)
    passes, seconds = text.split("At equal network passes")[1].split("At equal wall time")
    assert "40 passes;" in passes and "20 seconds without compiling" in seconds
    # Gains of p: 1 and 3, 2 and 2, 0.1 and 0.3, of which 0.4 and 2/3 (of b a sixth) are there.
    assert "| P | 2 | 4 | 100 % | +0.8000 ± 5.0825 | +0.8000 ± 0.0000 |" in passes
    assert "| P | 2 | 6.67 | 100 % | +1.3333 ± 8.4708 | +0.3333 ± 0.0000 |" in seconds
    for section in (passes, seconds):
        assert "| Q | 2 | 10 | 100 % | +6.0000" in section and "| 1/2 |" in section
        assert "| C |" not in section
    assert "At equal" not in table.markdown(made_results())
    same = with_curves()
    for run in same["runs"].values():
        run["passes_per_step"] = 4.0
    # Where all take as many passes, the tables of whole runs say it already.
    assert "At equal network passes" not in table.markdown(same)


def test_the_passes_of_a_step(tmp_path):
    """By hand: 6 rollout steps an image; of DiffusionNFT 3 timesteps with two velocities and a pull-back each."""
    flat = jobs(choose("main", ("weighted_sum",)), 1, tmp_path, FILE)[0].config
    Workdir(str(tmp_path / "run")).claim(
        {**flat, "harmonize.anchor_every": 1, "nft.kl_weight": 0.0}
    )
    got = equal_cost.passes_per_step(Workdir(str(tmp_path / "run")))
    images = flat["rollout.prompts_per_step"] * flat["rollout.images_per_prompt"]
    assert flat["rollout.num_steps"] == 6
    # The sum's advantage scales one direction, and the anchor is the other.
    assert got == images * (6 + 3 * 2 + 3 * 2)


def test_a_pareto_front_by_hand():
    """(3, 1) and (1, 3) are corners, (2, 2) lies between; (2, 1) and (1, 1) are beaten, a double is not."""
    points = np.array([[2, 1], [1, 3], [3, 1], [2, 2], [1, 1], [2, 2], [np.nan, 9]])
    assert fronts.pareto_front(points).tolist() == [1, 3, 5, 2]
    assert fronts.pareto_front(np.array([[0, 0], [1, 1]])).tolist() == [1]
    assert fronts.pareto_front(np.zeros((0, 2))).tolist() == []


def test_pairs():
    assert (
        fronts.parse_pairs("a+b,a+j", "abj") == [("a", "b"), ("a", "j")]
        and fronts.parse_pairs("", "ab") == []
    )
    with pytest.raises(InputError, match="--pairs: expected reward.reward,...; received 'a'"):
        fronts.parse_pairs("a", "ab")
    with pytest.raises(InputError, match="--pairs: expected one of a, b; received 'c'"):
        fronts.parse_pairs("a+c", "ab")


def test_the_drawing_is_the_same_twice(tmp_path):
    pytest.importorskip("matplotlib")
    made = made_results()
    pair = [("a", "b"), ("a", "j"), ("b", "j")]
    for name in ("one.svg", "two.svg"):
        fronts.draw(table.rows(made), table.columns(made), pair, tmp_path / name)
    one = (tmp_path / "one.svg").read_text()
    assert one == (tmp_path / "two.svg").read_text() and one.count('id="axes_') >= 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.svg", "two.svg"]


def test_the_command_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Two methods, two seeds and a stand-in for training; then the same command, which trains nothing."""
    pytest.importorskip("matplotlib")
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    monkeypatch.setenv("PLAN", str(plan))
    argv = [
        "--methods=exact,gdpo",
        "--seeds=2",
        "--steps=3",
        f"--config={FILE}",
        f"--out={out}",
        "--jobs=2",
    ]
    every = jobs(choose("main", ("exact", "gdpo")), 2, out, FILE, ["--config.training.num_steps=3"])
    plan.write_text(json.dumps({"runs": {str(j.workdir): j.config for j in every}}))
    assert [j.name for j in every] == ["exact-1", "gdpo-1", "exact-2", "gdpo-2"]
    assert main([*argv, "--dry_run"], FAKE) == 0 and not out.exists()
    assert capsys.readouterr().out.count("fake_train.py --config=") == 4
    assert main(argv, FAKE) == 0
    found = json.loads((out / "results.json").read_text())
    assert sorted(found["runs"]) == sorted(j.name for j in every) and found["missing"] == []
    assert {m["name"] for m in found["methods"]} == {"exact", "nft_marble", "gdpo", "solve_batch"}
    assert (
        "| MARBLE, exact | 2 |" in (out / "table.md").read_text() and (out / "fronts.svg").exists()
    )
    calls = Path(f"{plan}.calls").read_text()
    assert main(argv, FAKE) == 0 and Path(f"{plan}.calls").read_text() == calls
    assert "4 of 4 runs are there already" in capsys.readouterr().out
    assert main([*argv, "--collect", f"--results={tmp_path / 'kept'}"], FAKE) == 0
    assert json.loads((tmp_path / "kept" / "results.json").read_text())["runs"] == found["runs"]
    Workdir(str(out / "equal-1")).claim({"seed": 5})  # somebody's other run, under a name of ours
    assert main([*argv, "--collect"], FAKE) == 0
    assert json.loads((out / "results.json").read_text())["runs"] == found["runs"]
    # Folders that are gone, and their results on record: nothing is trained again, and the table stays.
    elsewhere = [a for a in argv if not a.startswith("--out=")]
    elsewhere += [f"--out={tmp_path / 'empty'}", f"--results={tmp_path / 'kept'}"]
    assert main(elsewhere, FAKE) == 0 and Path(f"{plan}.calls").read_text() == calls
    assert "4 runs are on record in" in capsys.readouterr().out
    assert json.loads((tmp_path / "kept" / "results.json").read_text())["runs"] == found["runs"]
    fewer = ["--seeds=1" if a == "--seeds=2" else a for a in elsewhere]
    assert main(fewer, FAKE) == 0  # the other seed stays on record
    assert "left out" not in capsys.readouterr().out
    assert json.loads((tmp_path / "kept" / "results.json").read_text())["runs"] == found["runs"]
    other = [*elsewhere, "--collect", "--config.nft.beta=0.5"]
    assert main(other, FAKE) == 0  # another configuration: not these runs
    said = capsys.readouterr().out
    assert "of other configurations, left out: exact-1, gdpo-1, exact-2, gdpo-2" in said
    assert json.loads((tmp_path / "kept" / "results.json").read_text())["runs"] == {}
    assert main([*argv, "--list"], FAKE) == 0 and "GDPO" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--suit=main"], "option: expected one of .*received --suit; did you mean 'suite'"),
        (["--jobs=3"], "--jobs: expected 1 or 2; received 3"),
        (["--seeds=x"], "--seeds: expected a whole number"),
        (["--steps=0"], "--steps: expected a whole number of at least 1; received '0'"),
        (["--pairs=ocr+jury"], "--pairs: expected one of .*; received 'jury'"),
        (["--config.nft.bta=1"], "nft.bta: expected a configuration key"),
    ],
)
def test_bad_options(argv, message, capsys):
    assert main([f"--config={FILE}", *argv], ("false",)) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err) and len(captured.err.splitlines()) == 1


def test_a_result_on_record_is_that_of_todays_configuration():
    """Keys that came later count as having had their default; a changed default, or a key that is gone, does not."""
    config = {"name": "x", "seed": 3, "nft.beta": 0.1, "harmonize.rho": 0.7}
    same = results._same_config
    assert same({"nft.beta": 0.1, "harmonize.rho": 0.7}, config)
    assert same({"nft.beta": 0.1}, config)
    assert not same({"nft.beta": 0.1}, config | {"harmonize.rho": 0.6})
    assert not same({"nft.beta": 0.2, "harmonize.rho": 0.7}, config)
    assert not same({"nft.beta": 0.1, "nft.gone": 1}, config)
    assert not same(None, config)
