"""Which micro-batchs are timed, what is made of their times, and which ratios are stated."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax

from marble_jax.families.sd3.flops import transformer
from marble_jax.trainable import lora
from tools.benchmark import formulations, measure, ours, policy_gradient
from tools.benchmark.sizes import Problem, Size

REWARDS = (1, 5, 20)
REFRESH_EVERY = 10  # the paper's N
PEERS = ("upstream", "tuned", "compiled")


@dataclasses.dataclass
class Cases:
    """Everything to time.

    Attributes:
      ours: timed functions by name.
      peer: the same, of the PyTorch side.
      memory: bytes of temporary (ours) or peak (theirs, on a GPU) memory by name.
    """

    ours: dict[str, Callable[[], Any]]
    peer: dict[str, Callable[[], Any]]
    memory: dict[str, int]


def chooser(only: str) -> Callable[[str], bool]:
    """Whether a name is wanted: it matches one of the comma-separated shell patterns in `only`, or `only` is empty."""
    patterns = [pattern for pattern in only.split(",") if pattern]
    return lambda name: (
        not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )


def our_cases(
    problem: Problem, formulation: bool, wanted: Callable[[str], bool], say: Callable[[str], None]
) -> Cases:
    """Compiles our side, as far as it is wanted, running everything once."""
    size, cases = problem.size, Cases({}, {}, {})

    def add(
        name: str,
        body: ours.Body,
        num_rewards: int = 1,
        params: Any = None,
        of: Problem = problem,
    ) -> ours.Program | None:
        if not wanted(name):
            return None
        say(f"compiling {name}")
        program = ours.compile_program(of, body, num_rewards, params)
        program()
        cases.ours[name] = program
        if program.bytes is not None:
            cases.memory[name] = program.bytes
        return program

    def step(
        name: str, core: ours.Core, num_rewards: int = 1, reference: bool = True
    ) -> ours.Program | None:
        return add(name, ours.with_inputs(problem, core, reference), num_rewards)

    step("weighted_sum", ours.weighted_sum(problem))
    step("weighted_sum.no_kl", ours.weighted_sum(problem), reference=False)
    step("combined_k5", ours.combined(problem), 5)
    step("combined_k5.no_kl", ours.combined(problem), 5, reference=False)
    for k in REWARDS:
        anchored = step(f"exact_k{k}.anchors", ours.exact(problem, anchors=True), k)
        step(f"exact_k{k}.signal", ours.exact(problem, anchors=False), k, reference=False)
        if anchored is not None and wanted(f"solve_k{k}"):
            say(f"compiling solve_k{k}")
            cases.ours[f"solve_k{k}"] = ours.compile_solve(problem, anchored.sums)
            cases.ours[f"solve_k{k}"]()
    steps = policy_gradient.of_steps(problem)
    for name, core, num_rewards in (
        ("pg.weighted_sum", ours.weighted_sum(steps), 1),
        ("pg.exact_k5", ours.exact(steps, anchors=False), 5),
        ("pg.exact_k20", ours.exact(steps, anchors=False), 20),
    ):
        add(name, ours.with_inputs(steps, core, False), num_rewards, of=steps)
    for k in separate_counts(size):
        step(f"separate_k{k}", ours.separate(problem), k)
    if formulation:
        _add_formulations(problem, step)
        _add_forwards(problem, add)
        if size.unroll > 1:
            rolled = dataclasses.replace(problem, model=problem.model.clone(unroll=1))
            add("f.weighted_sum.rolled", ours.with_inputs(rolled, ours.weighted_sum(rolled), True))
            add(
                "f.exact_k5.rolled.signal",
                ours.with_inputs(rolled, ours.exact(rolled, anchors=False), False),
                5,
            )
    return cases


def separate_counts(size: Size) -> tuple[int, ...]:
    """K of the K + 1 separate passes: 20 only where that takes seconds, not minutes."""
    return (5, 20) if size.name in ("tiny", "embedded") else (5,)


def _add_formulations(problem: Problem, step: Callable) -> None:
    for suffix, anchors in (("anchors", True), ("signal", False)):
        if problem.size.chunk != problem.size.num:
            step(
                f"f.exact_k5.one_chunk.{suffix}",
                ours.exact(problem, anchors, problem.size.num),
                5,
                anchors,
            )
        step(f"f.vmapped_k5.{suffix}", formulations.vmapped(problem, anchors), 5, anchors)
        step(
            f"f.copied_adapters_k5.{suffix}",
            formulations.copied_adapters(problem, anchors),
            5,
            anchors,
        )
        for k in (5, 20):
            step(
                f"f.weighted_sums_k{k}.{suffix}",
                formulations.weighted_sums(problem, anchors),
                k,
                anchors,
            )
    step("f.separate_batched_k5", ours.separate(problem, together=True), 5)


def _add_forwards(problem: Problem, add: Callable) -> None:
    add("f.forwards.three_calls", formulations.three_forwards(problem, batched=False))
    add("f.forwards.one_call", formulations.three_forwards(problem, batched=True))
    add("f.weighted_sum.old_and_ref_in_one_call", formulations.weighted_sum_batched(problem))
    merged = jax.jit(lora.merge, static_argnums=2)(
        problem.params, problem.rollout, problem.size.spec.scale
    )
    add(
        "f.weighted_sum.old_merged",
        formulations.weighted_sum_merged(problem),
        params=(problem.params, merged),
    )


def add_peer(
    cases: Cases,
    problem: Problem,
    threads: int,
    compiled: bool,
    wanted: Callable[[str], bool],
    say: Callable[[str], None],
) -> None:
    """Makes the PyTorch side, as far as it is wanted, running everything once."""
    import torch

    from tools.benchmark.peer import Tuned, Upstream

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if device == "cuda":
        # As our side: float32 is multiplied as float32.
        torch.set_float32_matmul_precision("highest")
    kinds: dict[str, Callable] = {"upstream": Upstream, "tuned": Tuned}
    if compiled:
        kinds["compiled"] = lambda *args: Tuned(*args, compiled=True)
    for name, make in kinds.items():
        for kind, k in (("weighted_sum", 1), ("harmonised", 5)):
            if not wanted(f"torch.{name}.{kind}"):
                continue
            say(f"preparing torch.{name}.{kind}")
            # A compiled backward pass frees what it reads unless told that it will run again.
            torch._functorch.config.donated_buffer = kind != "harmonised"
            run = getattr(make(problem, k, device), kind)
            run()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                run()
                cases.memory[f"torch.{name}.{kind}"] = torch.cuda.max_memory_allocated()
            cases.peer[f"torch.{name}.{kind}"] = run


def mixtures(size: Size) -> dict[str, dict[str, float]]:
    """Shares of what an average micro-batch of several kinds is made of, by name.

    `exact_k5` is what training runs by default: one micro-batch with anchors, anchor_every - 1 without; steps between
    solves and the sum `.kl_every_N` have the divergence as seldom. `.step` is an average micro-batch of a whole
    optimiser step: its own number of anchors, and a share of the one solve.
    """
    every, share, steps = size.anchor_every, size.anchored_share, size.micro_steps
    shares = {}
    for name in ("weighted_sum", "combined_k5"):
        shares[f"{name}.kl_every_{every}"] = {name: 1 / every, f"{name}.no_kl": 1 - 1 / every}
        shares[f"{name}.step"] = {name: share, f"{name}.no_kl": 1 - share}
    for k in REWARDS:
        shares[f"exact_k{k}"] = {
            f"exact_k{k}.anchors": 1 / every,
            f"exact_k{k}.signal": 1 - 1 / every,
        }
        shares[f"exact_k{k}.step"] = {
            f"exact_k{k}.anchors": share,
            f"exact_k{k}.signal": 1 - share,
            f"solve_k{k}": 1 / steps,
        }
    for solving, reusing in (
        ("exact_k5", f"combined_k5.kl_every_{every}"),
        ("exact_k5.step", "combined_k5.step"),
    ):
        between = {part: (1 - 1 / REFRESH_EVERY) * s for part, s in shares[reusing].items()}
        solve = {part: s / REFRESH_EVERY for part, s in shares[solving].items()}
        shares[solving.replace("exact", "amortized")] = between | solve
    return shares


def derive(size: Size, times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Times of the average micro-batchs of `mixtures` whose parts were timed; round by round."""
    return {
        name: measure.mixture(times, parts)
        for name, parts in mixtures(size).items()
        if set(parts) <= set(times)
    }


def flops(problem: Problem) -> dict[str, float]:
    """FLOPs that a row asks for, by name; what rematerialisation and a solve add is not counted.

    A micro-batch has the current and the rollout velocity forward, that of the base model where a divergence is taken,
    and one backward pass for each cotangent, with the base weights frozen.
    """
    size = problem.size
    sample = transformer(
        size.config,
        problem.params,
        problem.current,
        (size.side // size.config.patch_size) ** 2,
        size.tokens,
    )
    signal = 2 * sample.forward + sample.backward
    whole = signal + sample.base
    found = {"weighted_sum": whole, "combined_k5": whole}
    found |= {f"{name}.no_kl": signal for name in tuple(found)}
    for k in REWARDS:
        found |= {
            f"exact_k{k}.anchors": whole + 2 * sample.backward,
            f"exact_k{k}.signal": signal,
            f"solve_k{k}": 0.0,
            f"separate_k{k}": whole + k * sample.backward,
        }
    for side in PEERS:
        found |= {
            f"torch.{side}.weighted_sum": whole,
            f"torch.{side}.harmonised": whole + 5 * sample.backward,
        }
    # A policy gradient with one update a rollout asks neither other policy.
    own = sample.forward + sample.backward
    found |= dict.fromkeys(("pg.weighted_sum", "pg.exact_k5", "pg.exact_k20"), own)
    found = {name: size.num * count for name, count in found.items()}
    mixed = {
        name: sum(share * found[part] for part, share in parts.items())
        for name, parts in mixtures(size).items()
    }
    return found | mixed


def ratios(size: Size, times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Speeds relative to each other: "A / B" is time of B over time of A, so above 1 where A is faster.

    Like is compared with like first: both sides skip the divergence, then neither does. Ours skipping against a sum
    that does not comes behind.
    """
    fair = f"weighted_sum.kl_every_{size.anchor_every}"
    names = [
        name
        for name in times
        if name != "weighted_sum" and not name.startswith(("solve", "torch", "f.forwards"))
    ]
    pairs = [
        ("exact_k5", fair),
        ("exact_k5.step", "weighted_sum.step"),
        ("amortized_k5", fair),
        ("amortized_k5.step", "weighted_sum.step"),
        ("exact_k5.anchors", "weighted_sum"),
        ("exact_k5", "weighted_sum"),
    ]
    pairs += [(name, "weighted_sum") for name in names]
    pairs += [(name, fair) for name in names if name.startswith(("exact", "amortized"))]
    pairs += [
        ("exact_k20", "exact_k5"),
        ("exact_k20.anchors", "exact_k5.anchors"),
        ("exact_k5", "separate_k5"),
        ("pg.exact_k5", "pg.weighted_sum"),
        ("pg.exact_k20", "pg.exact_k5"),
    ]
    pairs += [
        ("f.forwards.one_call", "f.forwards.three_calls"),
        ("f.exact_k5.rolled.signal", "exact_k5.signal"),
    ]
    for name in times:
        if name.startswith("torch."):
            harmonised = ("exact_k5.anchors", "exact_k5", "separate_k5")
            own = ("weighted_sum",) if name.endswith("weighted_sum") else harmonised
            pairs += [(mine, name) for mine in own]
    return {
        f"{fast} / {slow}": measure.ratio(times[slow], times[fast])
        for fast, slow in pairs
        if fast in times and slow in times
    }
