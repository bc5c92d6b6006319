"""Every micro-batch that tools/benchmark times computes the same gradients; its statistics on numbers done by hand."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sd3_lora as lora
from stacked_trees import take

from marble_jax import tree
from tools.benchmark import __main__ as program
from tools.benchmark import cases, formulations, measure, ours, record
from tools.benchmark.sizes import SIZES, make_problem

QUICK = {"xla_backend_optimization_level": 0}  # these programs are compiled for one run each


@pytest.fixture(scope="module")
def problem():
    return make_problem(SIZES["tiny"]())


@pytest.fixture(scope="module")
def draws(problem):
    """flow, advantages and valid of one micro-batch, by K; the images and velocities are the same for every K."""
    found = {}
    for k in (1, 5):
        batch = problem.batch(k)
        plan = ours.make_plan(problem.size, batch)
        if not found:
            flow, _, _ = jax.jit(lambda *a: ours.inputs(problem, *a, True), compiler_options=QUICK)(
                problem.params, problem.rollout, batch, plan
            )
        found[k] = (
            flow,
            plan.advantages[0],
            plan.valid[0],
        )
    return found


def run(problem, core, flow, advantages, valid):
    return jax.jit(core, compiler_options=QUICK)(
        problem.params, problem.current, flow, advantages, valid
    )


def run_body(problem, body, params=None):
    """A whole micro-batch with K = 1, the velocities of the other policies included."""
    batch = problem.batch(1)
    params = problem.params if params is None else params
    return jax.jit(body, compiler_options=QUICK)(
        params, problem.current, problem.rollout, batch, ours.make_plan(problem.size, batch)
    )


@pytest.fixture(scope="module")
def exact(problem, draws):
    return run(problem, ours.exact(problem, True), *draws[5])


@pytest.fixture(scope="module")
def weighted(problem, draws):
    return run(problem, ours.weighted_sum(problem), *draws[1])


def relative(got, want):
    return float(tree.norm(jax.tree.map(jnp.subtract, got, want)) / tree.norm(want))


def assert_same(got, want):
    """Gradients of every reward and of the divergence."""
    for k in range(5):
        assert relative(take(got["gradients"], k), take(want.gradients, k)) <= 1e-5, k
    assert relative(got["kl_gradient"], want.kl_gradient) <= 1e-5


@pytest.mark.parametrize("together", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_separate_passes(problem, draws, exact, together):
    assert float(jnp.min(exact.counts)) < problem.size.num  # some rewards are missing
    assert_same(run(problem, ours.separate(problem, together), *draws[5]), exact)


FORMULATIONS = [formulations.vmapped, formulations.copied_adapters, formulations.weighted_sums]


@pytest.mark.parametrize("make", FORMULATIONS)
def test_formulations(problem, draws, exact, make):
    assert_same(run(problem, make(problem, True), *draws[5]), exact)


@pytest.mark.slow
@pytest.mark.parametrize("make", FORMULATIONS)
def test_formulations_without_anchors(problem, draws, make):
    want = run(problem, ours.exact(problem, False), *draws[5])
    got = run(problem, make(problem, False), *draws[5])
    for k in range(5):
        assert relative(take(got["gradients"], k), take(want.gradients, k)) <= 1e-5, k
    assert float(tree.norm(got["kl_gradient"])) == 0.0


def test_more_seeds_leave_the_forward_pass_of_the_own_pull_back_alone(problem, draws):
    """A `vmap` that batched it as well would have the formulation lose by a mistake of ours."""

    def activations(core, *args):
        text = jax.jit(core).lower(problem.params, problem.current, *args).as_text()
        return {
            line.rpartition(":")[2].strip()
            for line in text.splitlines()
            if "stablehlo.tanh" in line
        }

    # The feed-forward's tanh is kept for its derivative, so it is in forward passes alone.
    forward = activations(
        lambda params, current, flow: ours.transformer.velocity(
            problem.model, params, current, flow.xt, flow.sigma, flow.cond
        ),
        draws[5][0],
    )
    assert forward and activations(formulations.weighted_sums(problem, True), *draws[5]) == forward


def test_combined_step_is_the_weighted_sum_of_the_gradients(problem, draws, exact):
    mean = ours.mean_gradients(exact)
    want = tree.add(
        tree.weighted_sum(jnp.full(5, 0.2), mean.gradients),
        tree.scale(mean.kl_gradient, problem.size.kl_weight),
    )
    assert relative(run(problem, ours.combined(problem), *draws[5]), want) <= 1e-5


def test_weighted_sum_without_the_divergence(problem, draws, exact, weighted):
    flow, advantages, valid = draws[1]
    alone = run(problem, ours.weighted_sum(problem), flow.replace(v_base=None), advantages, valid)
    divergence = tree.scale(ours.mean_gradients(exact).kl_gradient, problem.size.kl_weight)
    assert float(tree.norm(divergence)) > 0.01 * float(tree.norm(alone))
    assert relative(tree.add(alone, divergence), weighted) <= 1e-5


@pytest.mark.slow
def test_weighted_sum_with_other_forward_passes(problem, weighted):
    """The passes without gradient in one call, and the rollout policy merged."""
    assert relative(run_body(problem, formulations.weighted_sum_batched(problem)), weighted) <= 1e-5
    merged = lora.merge(problem.params, problem.rollout, problem.size.spec.scale)
    got = run_body(problem, formulations.weighted_sum_merged(problem), (problem.params, merged))
    assert relative(got, weighted) <= 1e-4


@pytest.mark.parametrize("batched", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_forward_passes(problem, draws, batched):
    flow = draws[1][0]
    v, v_rollout, v_base = run_body(problem, formulations.three_forwards(problem, batched))
    scale = float(jnp.abs(v_base).mean())
    for got, want in ((v_rollout, flow.v_rollout), (v_base, flow.v_base)):
        assert float(jnp.abs(got - want).max()) <= 1e-5 * scale
    assert (
        float(jnp.abs(v - v_rollout).mean()) > 1e-3 * scale
        and float(jnp.abs(v_rollout - v_base).mean()) > 1e-3 * scale
    )


def test_a_program_adds_up_and_its_sums_are_solved(problem, exact):
    step = ours.compile_program(
        problem, ours.with_inputs(problem, ours.exact(problem, True), True), 5, None, QUICK
    )
    once = jax.tree.map(np.array, step())
    assert relative(once.gradients, exact.gradients) <= 1e-5
    solve = ours.compile_solve(problem, step.sums, QUICK)
    assert relative(step().gradients, tree.scale(once.gradients, 2.0)) <= 1e-6
    assert float(step.sums.num_samples) == 2 * problem.size.num
    mean = ours.mean_gradients(exact)
    update = tree.add(solve(), tree.scale(mean.kl_gradient, -problem.size.kl_weight))
    for k in range(5):  # the solve on the sums of one micro-batch opposes no reward
        assert float(tree.vdot(update, take(mean.gradients, k))) > 0


@pytest.fixture(scope="module", params=["Upstream", "Tuned"])
def peer(request, problem, draws):
    """The PyTorch side on the draws of our micro-batch."""
    for name in ("torch", "diffusers", "peft"):
        pytest.importorskip(name)
    import torch

    from tools.benchmark import peer as peers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other on a busy machine

    def make(num_rewards):
        made = getattr(peers, request.param)(problem, num_rewards, "cpu")
        batch = problem.batch(num_rewards)
        plan, flow = ours.make_plan(problem.size, batch), draws[num_rewards][0]
        to = lambda x: torch.from_numpy(np.array(x))
        latents = lambda x: to(x).permute(0, 3, 1, 2).contiguous()
        made.x0, made.sigma, made.embeds, made.pooled = (
            latents(flow.x0),
            to(flow.sigma),
            to(flow.cond["embeds"]),
            to(flow.cond["pooled"]),
        )
        t = made.sigma[:, None, None, None]
        made.noise = (latents(flow.xt) - (1 - t) * made.x0) / t
        made.advantages, made.valid = to(plan.advantages[0]), to(plan.valid[0])
        return made

    yield make
    torch.set_num_threads(threads)


def test_torch_weighted_sum(problem, weighted, peer):
    made = peer(1)
    made.weighted_sum()
    assert relative(lora.stack(made.gradient(), problem.params), weighted) <= 1e-4


def test_torch_harmonised(problem, exact, peer):
    mean, made = ours.mean_gradients(exact), peer(5)
    made.harmonised()
    *rewards, divergence = (lora.stack(g, problem.params) for g in made.reward_gradients())
    for k, got in enumerate(rewards):
        assert relative(got, take(mean.gradients, k)) <= 1e-4, k
    assert relative(divergence, mean.kl_gradient) <= 1e-4
    once = made.vectors.clone()
    made.harmonised()
    np.testing.assert_allclose(made.vectors.numpy(), 2 * once.numpy(), rtol=1e-5, atol=1e-9)


def test_statistics_by_hand():
    assert measure.quartiles([4.0, 1.0, 3.0, 2.0]) == {
        "median": 2.5,
        "q1": 1.75,
        "q3": 3.25,
        "num": 4,
    }
    # Paired: the slow second round cancels, which a ratio of medians (6 / 2.5) would not show.
    assert measure.ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.5]) == {
        "median": 2.0,
        "q1": 2.0,
        "q3": 2.2,
        "num": 3,
    }
    assert measure.mixture({"a": [4.0, 8.0], "b": [2.0, 0.0]}, {"a": 0.25, "b": 0.75}) == [2.5, 2.0]


def test_rounds_are_interleaved_and_end_in_time():
    now, calls = [0.0], []

    def work(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds

        return call

    sides = [{"a": work("a", 1.0), "b": work("b", 2.0)}, {"t": work("t", 4.0)}]
    times = measure.interleave(sides, 3, 100.0, clock=lambda: now[0], pause=0.0)
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "t": [4.0] * 3}
    assert "".join(calls) == "aabtt" + "bbatt" + "aabtt"  # the first call of a side is not timed
    assert (
        len(measure.interleave(sides, 50, 5.0, clock=lambda: now[0], pause=0.0)["a"])
        == measure.FEWEST
    )
    assert set(measure.interleave([sides[0], {}], 1, 1.0, clock=lambda: now[0])) == {"a", "b"}


def test_averages_of_micro_steps_by_hand():
    size = SIZES["tiny"]()  # anchors at 2 of 6 micro-batchs; 1 of 4 by anchor_every alone
    times = {
        name: [1.0]
        for name in (
            "exact_k1.anchors",
            "exact_k1.signal",
            "exact_k20.anchors",
            "exact_k20.signal",
            "solve_k1",
            "solve_k20",
            "separate_k5",
        )
    }
    times |= {
        "weighted_sum": [8.0],
        "weighted_sum.no_kl": [4.0],
        "combined_k5": [10.0],
        "combined_k5.no_kl": [5.0],
        "exact_k5.anchors": [12.0],
        "exact_k5.signal": [6.0],
        "solve_k5": [3.0],
    }
    derived = {name: values[0] for name, values in cases.derive(size, times).items()}
    assert derived["weighted_sum.kl_every_4"] == 5.0
    assert derived["exact_k5"] == 7.5
    assert derived["exact_k5.step"] == pytest.approx(12 / 3 + 6 * 2 / 3 + 3 / 6)
    assert derived["weighted_sum.step"] == pytest.approx(8 / 3 + 4 * 2 / 3)
    assert derived["combined_k5.kl_every_4"] == 10 / 4 + 5 * 3 / 4
    assert derived["amortized_k5"] == pytest.approx(0.9 * 6.25 + 0.1 * 7.5)
    assert derived["amortized_k5.step"] == pytest.approx(0.9 * (10 / 3 + 10 / 3) + 0.1 * 8.5)
    found = cases.ratios(
        size, {**times, **cases.derive(size, times), "torch.tuned.weighted_sum": [20.0]}
    )
    assert list(found)[:3] == [
        "exact_k5 / weighted_sum.kl_every_4",
        "exact_k5.step / weighted_sum.step",
        "amortized_k5 / weighted_sum.kl_every_4",
    ]
    assert found["exact_k5.anchors / weighted_sum"]["median"] == pytest.approx(8 / 12)
    assert found["exact_k5 / weighted_sum.kl_every_4"]["median"] == pytest.approx(5 / 7.5)
    assert found["weighted_sum / torch.tuned.weighted_sum"]["median"] == 2.5


def test_rows_that_were_not_timed_are_left_out():
    wanted = cases.chooser("weighted_sum*,exact_k5.signal")
    assert (
        wanted("weighted_sum.no_kl")
        and wanted("exact_k5.signal")
        and not wanted("exact_k5.anchors")
    )
    assert cases.chooser("")("exact_k5.anchors")
    times = {"weighted_sum": [8.0], "weighted_sum.no_kl": [4.0], "exact_k5.signal": [6.0]}
    derived = cases.derive(SIZES["tiny"](), times)
    assert set(derived) == {"weighted_sum.kl_every_4", "weighted_sum.step"}
    assert set(cases.ratios(SIZES["tiny"](), {**times, **derived})) == {
        "weighted_sum.no_kl / weighted_sum",
        "exact_k5.signal / weighted_sum",
        "weighted_sum.kl_every_4 / weighted_sum",
        "weighted_sum.step / weighted_sum",
        "exact_k5.signal / weighted_sum.kl_every_4",
    }


def test_sizes_are_those_of_the_shipped_files():
    embedded, medium = SIZES["embedded"](), SIZES["sd35m"]()
    assert (embedded.num, embedded.side, embedded.tokens, embedded.rank, embedded.micro_steps) == (
        72,
        8,
        26,
        16,
        6,
    )
    assert embedded.config.width == 128 and embedded.num % embedded.chunk == 0
    assert medium.gpu_only and (medium.config.width, medium.config.num_layers, medium.side) == (
        1536,
        24,
        64,
    )


def test_record_is_printed_and_written(problem, tmp_path):
    times = {"weighted_sum": [0.002, 0.004, 0.003], "exact_k5": [0.001, 0.002, 0.003]}
    found = {
        "hardware": record.hardware(2),
        "others": 0.012,
        "shapes": record.shapes(problem),
        "versions": record.versions(),
        "times": record.times_record(times, {"exact_k5": 5_000_000}),
        "ratios": {"exact_k5 / weighted_sum": measure.ratio(*times.values())},
    }
    text = record.table(found)
    assert "weighted_sum                                      3.00      2.50      3.50" in text
    assert (
        "exact_k5                                          2.00      1.50      2.50        5.0"
        in text
    )
    assert (
        "2.000   1.500   2.000" in text
        and "kept 1 % of the cores busy\n" in text
        and text.endswith("3 rounds")
    )
    assert (
        "kept 40 % of the cores busy, so nothing here is a measurement (wanted: at most 5 %)"
        in record.table({**found, "others": 0.4})
    )
    record.write(found, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["times"]["exact_k5"]["bytes"] == 5_000_000
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert found["versions"]["jax"] == jax.__version__


def test_share_of_other_processes_by_hand():
    # 10 s on 2 cores: 15 processor seconds were spent, 11 of them here; 4 of 20 are others'.
    assert record.share_of_others((100.0, 5.0), (115.0, 16.0), 10.0, 2) == pytest.approx(0.2)
    machine, own = record.busy_seconds()
    assert 0 < own and not machine < 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--threads=0", "--threads: expected 1 to"),
        ("--repeats=0", "--repeats: expected at least 1; received 0"),
        ("--unroll=0", "--unroll: expected at least 1; received 0"),
        ("--json=/nowhere/x.json", "--json: expected a file in an existing directory"),
        ("--size=huge", "invalid choice"),
    ],
)
def test_bad_flags(argument, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main([argument])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size=sd35m"], "--size: expected a GPU for sd35m; received cpu (--force to run)"),
        (
            ["--size=embedded", "--chunk=7"],
            "--chunk: expected a divisor of the 72 samples; received 7",
        ),
        (
            ["--size=tiny", "--only=exakt*", "--no-torch"],
            "--only: expected patterns of rows (--help names them); received "
            "'exakt*', which matches none",
        ),
    ],
)
def test_bad_input(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    for name in ("OMP_NUM_THREADS", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "1")
    assert program.main(arguments) == 2
    assert capsys.readouterr().err == message + "\n"


def test_flops_of_rows_by_hand(problem):
    """Two forward passes and a backward pass are a signal; the base model and two more cotangents make an anchor."""
    found, size = cases.flops(problem), problem.size
    sample = cases.transformer(size.config, problem.params, problem.current, 16, size.tokens)
    signal, anchor = 2 * sample.forward + sample.backward, sample.base + 2 * sample.backward
    assert found["exact_k5.signal"] == found["weighted_sum.no_kl"] == size.num * signal
    assert found["exact_k5"] == pytest.approx(size.num * (signal + anchor / size.anchor_every))
    assert found["torch.upstream.harmonised"] == found["separate_k5"]
    assert found["separate_k5"] == pytest.approx(
        size.num * (signal + sample.base + 5 * sample.backward)
    )
    entry = record.times_record({"a": [0.5, 0.25, 0.25]}, {}, {"a": 1e12}, 16e12)["a"]
    assert (entry["tflops"], entry["mfu"]) == (4.0, 0.25)


def test_rows_of_the_policy_gradient_have_the_gradients_of_every_reward(problem):
    """Each reward alone, as the one advantage of a weighted sum."""
    from tools.benchmark.policy_gradient import of_steps

    steps = of_steps(problem)
    batch = steps.batch(5)
    arguments = (steps.params, steps.rollout, batch, ours.make_plan(steps.size, batch))
    drawn = jax.jit(lambda *a: ours.inputs(steps, *a, False), compiler_options=QUICK)(*arguments)
    samples, advantages, valid = drawn
    together = run(steps, ours.exact(steps, False), samples, advantages, valid)
    alone = jax.jit(ours.weighted_sum(steps), compiler_options=QUICK)
    for k in range(5):
        masked = jnp.where(valid[:, k : k + 1], advantages[:, k : k + 1], 0.0)
        want = alone(steps.params, steps.current, samples, masked, jnp.ones_like(masked, bool))
        got = jax.tree.map(lambda leaf, k=k: leaf[k] / steps.size.num, together.gradients)
        assert relative(got, want) <= 1e-5, k
