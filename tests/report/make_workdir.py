"""A made-up training workdir with every record the report reads; also a script: `python make_workdir.py DIRECTORY`."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np

REWARDS = ("geneval", "ocr", "pickscore", "clip", "aesthetic")
HELDOUT = ("hps", "sharpness")
HOSTILE = "<script>alert('x')</script> a \"quoted\" & <b>bold</b> sign"
PROMPTS = (
    "a red circle and two blue squares",
    'a sign that says "OK"',
    HOSTILE,
    "three green triangles on white",
    'a poster with the word "JAX" in dark blue letters on a pale background',
    "one yellow star",
)
START = {
    "geneval": 0.24,
    "ocr": 0.12,
    "pickscore": 20.5,
    "clip": 0.237,
    "aesthetic": 5.13,
    "hps": 0.204,
    "sharpness": 0.61,
}
RISE = {
    "geneval": 0.45,
    "ocr": 0.62,
    "pickscore": 1.4,
    "clip": 0.004,
    "aesthetic": 0.9,
    "hps": 0.06,
    "sharpness": -0.11,
}
NOISE = {
    "geneval": 0.03,
    "ocr": 0.03,
    "pickscore": 0.15,
    "clip": 0.006,
    "aesthetic": 0.08,
    "hps": 0.008,
    "sharpness": 0.02,
}


def evaluation(step: int, num_steps: int, policy: str, rng: np.random.Generator) -> dict:
    progress = 1 - np.exp(-3 * step / num_steps)
    scores, gain = {}, {}
    for name in REWARDS + HELDOUT:
        width = NOISE[name]
        change = (
            float(RISE[name] * progress + 0.2 * width * rng.normal()) if policy == "ema" else 0.0
        )
        mean = START[name] + change
        scores[name] = {
            "mean": mean,
            "low": mean - width,
            "high": mean + width,
            "count": 96 if name != "ocr" else 64,
        }
        gain[name] = {"mean": change, "low": change - 0.8 * width, "high": change + 0.8 * width}
    record = {"step": step, "policy": policy, "num_prompts": 96, "scores": scores, "seconds": 31.5}
    return record | ({"gain": gain} if policy == "ema" else {})


def out_of_sample(step: int) -> dict:
    """Cosines with earlier steps, from a generator of their own; the averaged update works against the last reward."""
    rng = np.random.default_rng(step)
    row = {}
    for i, name in enumerate(REWARDS):
        row[f"out_of_sample/own_cosine/{name}"] = 0.08 - 0.01 * i + 0.01 * float(rng.normal())
        row[f"out_of_sample/cos_update/{name}"] = 0.03 - 0.01 * i + 0.01 * float(rng.normal())
        row[f"out_of_sample/cos_mean_update/{name}"] = 0.07 - 0.03 * i + 0.01 * float(rng.normal())
        for j in range(i):
            row[f"out_of_sample/cos_pair/{REWARDS[j]}|{name}"] = 0.02 + 0.005 * float(rng.normal())
    for key, of in (("", "cos_update"), ("_mean", "cos_mean_update")):
        worst = min(row[f"out_of_sample/{of}/{name}"] for name in REWARDS)
        row |= {f"out_of_sample/worst_cos{key}": worst, f"out_of_sample/conflict{key}": worst < 0}
    return row


def metrics(step: int, num_steps: int, rng: np.random.Generator, refresh_every: int) -> dict:
    progress = 1 - np.exp(-3 * step / num_steps)
    row = {"step": step, "time": 1.7e9 + 41.0 * step}
    k = len(REWARDS)
    alpha = np.exp(
        0.5 * np.sin(step / 18 + np.arange(k)) + 0.8 * progress * np.array([1, 1.3, -0.5, -0.2, -1])
    )
    alpha /= alpha.sum()
    refreshed = step % refresh_every == 0
    for i, name in enumerate(REWARDS):
        row[f"rollout/score_mean/{name}"] = float(
            START[name] + RISE[name] * progress + NOISE[name] * rng.normal()
        )
        row[f"rollout/score_std/{name}"] = float(3 * NOISE[name])
        row[f"rollout/missing_share/{name}"] = {"ocr": 0.66, "geneval": 0.34}.get(name, 0.0)
        row[f"rollout/failed/{name}"] = 0.02 if name == "aesthetic" and step % 17 == 0 else 0.0
        row[f"rollout/failed_count/{name}"] = 23 if row[f"rollout/failed/{name}"] else 0
        row[f"rollout/zero_std_share/{name}"] = float(
            np.clip(
                {"ocr": 0.5, "geneval": 0.3}.get(name, 0) * (1 - 0.5 * progress)
                + 0.03 * rng.normal(),
                0,
                1,
            )
        )
        row[f"harmonize/alpha/{name}"] = float(alpha[i])
        if refreshed:
            row[f"harmonize/alpha_solved/{name}"] = float(
                np.clip(alpha[i] + 0.06 * rng.normal(), 0, 1)
            )
            row[f"harmonize/grad_norm/{name}"] = float(
                0.01 * 3.0 ** (i - 2) * np.exp(0.3 * rng.normal())
            )
            row[f"harmonize/cos_update/{name}"] = float(
                0.42 - 0.05 * i + 0.1 * rng.normal() - (0.2 if i == 4 else 0)
            )
            for j in range(i):
                row[f"harmonize/cos_pair/{REWARDS[j]}|{name}"] = float(
                    0.3
                    - 0.12 * abs(i - j)
                    + 0.05 * rng.normal()
                    - (0.25 if (j, i) == (1, 4) else 0)
                )
    if refreshed and step:
        row |= out_of_sample(step)
    if refreshed:
        worst = min(row[f"harmonize/cos_update/{name}"] for name in REWARDS)
        row |= {
            "harmonize/worst_cos": worst,
            "harmonize/conflict": int(worst < 0),
            "harmonize/min_norm": 0.48,
            "harmonize/kkt_residual": 3e-7,
        }
    row |= {
        "harmonize/refreshed": int(refreshed),
        "harmonize/alpha_age": step % refresh_every,
        "harmonize/alpha_entropy": float(-(alpha * np.log(alpha)).sum()),
        "rollout/x0_norm": float(1.02 + 0.02 * progress + 0.004 * rng.normal()),
        "rollout/brightness": float(0.48 + 0.15 * progress + 0.01 * rng.normal()),
        "rollout/diversity": float(0.31 * (1 - 0.6 * progress) + 0.008 * rng.normal()),
        "objective/loss": float(0.9 - 0.1 * progress + 0.02 * rng.normal()),
        "objective/kl": float(0.002 * progress),
        "training/grad_norm": None if step == 40 else float(0.05 * np.exp(0.3 * rng.normal())),
        "training/learning_rate": 3e-4 * min(1.0, (step + 1) / 10),
        "rollout_policy/decay": min(0.5, 0.01 * step),
        "ema/decay": 0.9,
        "time/rollout_s": 14.2,
        "time/rewards_wait_s": 5.1 + 0.3 * rng.normal(),
        "time/train_s": 19.8,
        "time/step_s": 40.4,
    }
    return row


def image(path: pathlib.Path, index: int, progress: float, size: int) -> None:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (size, size), (235, 228, 214))
    draw = ImageDraw.Draw(image)
    rng = np.random.default_rng(index)
    for _ in range(3):
        x, y = rng.uniform(0.25, 0.75, 2) * size
        radius = size * (0.08 + 0.1 * progress)
        colour = tuple(int(v) for v in rng.uniform(20, 200, 3))
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def make_workdir(
    directory: str | pathlib.Path,
    *,
    num_steps: int = 120,
    done: int | None = None,
    evaluate_every: int = 20,
    refresh_every: int = 10,
    images: bool = True,
    compare: bool = True,
    size: int = 64,
) -> pathlib.Path:
    """Writes the records of a run of `num_steps` steps of which `done` are over; deterministic."""
    root = pathlib.Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    done = num_steps if done is None else done
    rng = np.random.default_rng(7)
    run = {
        "name": "signs-and-shapes",
        "method": "marble",
        "rewards": list(REWARDS),
        "heldout_rewards": list(HELDOUT),
        "num_steps": num_steps,
        "config": {
            "seed": 17,
            "train.learning_rate": 3e-4,
            "train.num_steps": num_steps,
            "rollout.num_prompts": 48,
            "rollout.num_images": 24,
            "rollout.solver": "dpm2",
            "harmonize.refresh_every_steps": refresh_every,
            "harmonize.rho": 0.7,
            "nft.nft_beta": 0.1,
            "note": "<img src=x onerror=alert(1)>",
        },
        "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8", "marble_jax": "0.1.0"},
        "hardware": {"devices": "8 x TPU v5p", "hosts": 2},
        "command": "marble_jax train --config=configs/signs.py --workdir=/tmp/run",
        "differences_from_upstream": [
            "alpha is solved on the whole batch, not on one micro-step of 192",
            "a missing reward is masked in amortized steps, not entered as advantage 0",
        ],
        "started": "2026-01-05T09:12:44+00:00",
    }
    (root / "run.json").write_text(json.dumps(run))
    (root / "metrics.jsonl").write_text(
        "".join(json.dumps(metrics(s, num_steps, rng, refresh_every)) + "\n" for s in range(done))
    )
    evaluations = [evaluation(0, num_steps, "base", rng)]
    evaluations += [
        evaluation(s, num_steps, "ema", rng)
        for s in range(evaluate_every, done + 1, evaluate_every)
    ]
    (root / "evaluation.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evaluations))
    if images:
        for e in evaluations:
            for index in range(len(PROMPTS)):
                image(
                    root / "samples" / f"step_{e['step']:06d}" / f"{index:02d}.png",
                    index,
                    e["step"] / num_steps,
                    size,
                )
        prompts = [{"prompt": p, "seed": 100 + i} for i, p in enumerate(PROMPTS)]
        (root / "samples" / "prompts.json").write_text(json.dumps(prompts))
    if compare:
        (root / "compare").mkdir(exist_ok=True)
        for name, factor, conflict, worst in (
            ("weighted_sum", 0.6, 0.8, -0.13),
            ("equal alpha", 0.8, 0.31, 0.02),
        ):
            gain = {
                r: {
                    "mean": RISE[r] * factor,
                    "low": RISE[r] * factor - NOISE[r],
                    "high": RISE[r] * factor + NOISE[r],
                }
                for r in REWARDS + HELDOUT
            }
            summary = {
                "name": name,
                "method": name,
                "conflict_rate": conflict,
                "worst_cos": worst,
                "gain": gain,
            }
            (root / "compare" / f"{name.replace(' ', '_')}.json").write_text(json.dumps(summary))
    return root


if __name__ == "__main__":
    print(make_workdir(sys.argv[1], done=int(sys.argv[2]) if len(sys.argv) > 2 else None))
