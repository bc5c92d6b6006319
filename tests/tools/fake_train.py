"""Stands in for `marble-jax train` in the tests of the runner: writes a run's records and trains nothing.

Reads the configurations of all runs from the file in PLAN, by folder, and what is to go wrong: {"runs": {workdir:
config}, "fail": [names], "stop_after": {name: steps}, "gain": {name: {reward: gain}}}.
"""

import json
import os
import sys
import time
from pathlib import Path

plan = json.loads(Path(os.environ["PLAN"]).read_text())
workdir = Path(next(a for a in sys.argv if a.startswith("--workdir=")).split("=", 1)[1])
config = plan["runs"][str(workdir)]
with open(os.environ["PLAN"] + ".calls", "a") as calls:
    calls.write(
        f"{workdir.name} {sorted(os.sched_getaffinity(0))} {os.environ['OMP_NUM_THREADS']}\n"
    )
if workdir.name in plan.get("fail", ()):
    print("about to fail")
    sys.exit("marble-jax train: model.path: expected a directory; received nothing")
workdir.mkdir(exist_ok=True)
(workdir / "config.json").write_text(json.dumps(config))
rewards, heldout, steps = (
    config["rewards.train"],
    config["rewards.heldout"],
    config["training.num_steps"],
)
(workdir / "run.json").write_text(
    json.dumps(
        {
            "rewards": rewards,
            "heldout_rewards": heldout,
            "command": "marble-jax train",
            "versions": {"jax": "1"},
            "hardware": {"device": "cpu"},
            "config": config,
        }
    )
)
metrics, evaluations = workdir / "metrics.jsonl", workdir / "evaluation.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
gain = plan.get("gain", {}).get(workdir.name, {})


def evaluation(step, policy):
    record = {"step": step, "policy": policy, "num_prompts": 4}
    record["scores"] = {
        n: {"mean": 1.0 + (step > 0) * gain.get(n, 0.5)} for n in (*rewards, *heldout)
    }
    if step:
        record["gain"] = {
            n: {
                "mean": gain.get(n, 0.5),
                "low": gain.get(n, 0.5) - 0.1,
                "high": gain.get(n, 0.5) + 0.1,
            }
            for n in (*rewards, *heldout)
        }
        share = {"mean": 0.25, "low": 0.1, "high": 0.5}
        rates = {"count": 8} | dict.fromkeys(("domination", "collapse", "difference"), share)
        record["joint"] = {"trained": rates | {"rewards": rewards}}
    with evaluations.open("a") as file:
        file.write(json.dumps(record) + "\n")


if not done:
    evaluation(0, "base")
for step in range(done, steps):
    look = {"harmonize/conflict": step % 2, "harmonize/worst_cos": 0.5 - step} if step < 2 else {}
    if step < 2:
        look |= {"out_of_sample/conflict": step % 2, "out_of_sample/worst_cos": -step / 2}
    with metrics.open("a") as file:
        row = {"step": step, "time/step_s": 2.0 + step, "harmonize/refreshed": float(step == 1)}
        if step == 0:
            row["time/compile_s"] = 1.5
        file.write(json.dumps(row | look) + "\n")
    if plan.get("stop_after", {}).get(workdir.name) == step + 1 and not done:
        time.sleep(plan.get("sleep", 0))
        sys.exit(143)
evaluation(steps, "ema")
