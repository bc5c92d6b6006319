"""What `tools.gpu` found, as one record and as a table: rows of every part, and the ratios between them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

CORE = "weighted_sum,weighted_sum.no_kl,exact_k5.*,solve_k5"
ROWS = {
    "core": CORE,
    "unrolled": CORE,
    "tuned": "torch.tuned.*",
    "dots": CORE,
    "upstream": "torch.upstream.*",
    "compiled": "torch.compiled.*",
    "more": "combined_k5,exact_k20.*,separate_k5",
}
TESTS = {
    "tests": ("tests/harmonize/test_gpu_gradients.py", "tests/networks/test_gpu_attention.py"),
    "presets": ("tests/plan/test_gpu_memory.py",),
}
VARIANTS = {"dots": ("--remat=dots",), "unrolled": ("--unroll=13",)}
"""Parts whose rows are those of `core` under another setting, and that setting."""
PAIRS = (
    ("exact_k5", "torch.upstream.harmonised"),
    ("exact_k5", "torch.tuned.harmonised"),
    ("exact_k5", "torch.compiled.harmonised"),
    ("weighted_sum", "torch.upstream.weighted_sum"),
    ("weighted_sum", "torch.tuned.weighted_sum"),
    ("weighted_sum", "torch.compiled.weighted_sum"),
    ("exact_k5", "weighted_sum"),
    ("exact_k20.signal", "exact_k5.signal"),
    ("exact_k5", "separate_k5"),
    ("exact_k5.dots", "exact_k5"),
    ("exact_k5.unrolled", "exact_k5"),
    ("exact_k5.unrolled", "torch.tuned.harmonised"),
    ("weighted_sum.unrolled", "torch.tuned.weighted_sum"),
)


def combine(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One record of all parts: rows of every side, and the ratios between them."""
    results = {
        part: found["result"]
        for part, found in parts.items()
        if part in ROWS and found["state"] == "done"
    }
    times = {}
    for part, result in results.items():
        for name, entry in result["times"].items():
            times[f"{name}.{part}" if part in VARIANTS else name] = entry
    first = next(iter(results.values()), {})
    versions = {
        name: version for result in results.values() for name, version in result["versions"].items()
    }
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "hardware": first.get("hardware", {}),
        "shapes": first.get("shapes", {}),
        "times": times,
        "ratios": ratios(times),
        "tests": {
            part: parts[part]["result"]
            for part in TESTS
            if parts.get(part, {}).get("state") == "done"
        },
        # Whole, so that this one file is enough to go on from.
        "parts": dict(parts),
    }


def ratios(times: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Speeds relative to each other, from medians; low and high from the quartiles of both."""
    found = {}
    seldom = [("exact_k5", name) for name in times if name.startswith("weighted_sum.kl_every_")]
    for fast, slow in (*PAIRS, *seldom):
        if fast in times and slow in times:
            one, other = times[fast]["milliseconds"], times[slow]["milliseconds"]
            found[f"{fast} / {slow}"] = {
                "median": other["median"] / one["median"],
                "low": other["q1"] / one["q3"],
                "high": other["q3"] / one["q1"],
            }
    return found


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown for the README, and what is missing."""
    lines = []
    if size := record["shapes"]:
        where = record["hardware"]
        lines += [
            f"{size['name']}: {size['num']} samples of {size['side']} x {size['side']} latents and "
            f"{size['tokens']} text tokens, {size['parameters'] / 1e6:.0f} M parameters, {size['dtype']}; "
            f"{'; '.join(where.get('graphics') or where['devices'])}; "
            + ", ".join(
                f"{name} {record['versions'][name]}"
                for name in ("python", "jax", "torch", "diffusers")
                if name in record["versions"]
            ),
            "",
            "| micro-batch | ms (quartiles) | TFLOP/s | MFU | MFU at most | GB |",
            "|---|---|---|---|---|---|",
        ]
    for name, entry in record["times"].items():
        ms = entry["milliseconds"]
        lines.append(
            f"| {name} | {ms['median']:.2f} ({ms['q1']:.2f} to {ms['q3']:.2f}) | "
            + (f"{entry['tflops']:.3g}" if "tflops" in entry else "")
            + " | "
            + (f"{entry['mfu']:.0%}" if "mfu" in entry else "")
            + " | "
            + (f"{entry['mfu_cap']:.0%}" if "mfu_cap" in entry else "")
            + " | "
            + (f"{entry['bytes'] / 1e9:.1f}" if "bytes" in entry else "")
            + " |"
        )
    if record["ratios"]:
        lines += ["", "| times as fast as | median | from | to |", "|---|---|---|---|"]
        lines += [
            f"| {name} | {r['median']:.2f} | {r['low']:.2f} | {r['high']:.2f} |"
            for name, r in record["ratios"].items()
        ]
    for part, tests in record["tests"].items():
        lines += [
            "",
            f"{part}: {tests['passed']} passed, {len(tests['failed'])} failed, {len(tests['skipped'])} "
            "skipped",
        ]
        lines += [
            f"  {kind}: {each['name']}: {each['message']}"
            for kind in ("failed", "skipped")
            for each in tests[kind]
        ]
    lines += [
        f"{part}: {found['state']}: {found['reason']}"
        for part, found in record["parts"].items()
        if found["state"] != "done"
    ]
    return "\n".join(lines)
