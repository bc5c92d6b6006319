"""The core as a library: gradients against PyTorch and by hand, the min-norm update against an exhaustive solve."""

import itertools
import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import marble_jax
from marble_jax import balancing, platform
from marble_jax.errors import InputError
from marble_jax.harmonize.balancers import Balancer, Fixed, Solution

GUIDE = pathlib.Path(marble_jax.__file__).parent / "guides" / "balancing.md"
K = 3


def _problem(seed=0):
    """Inputs, targets and parameters of a two-layer network with K heads."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(12, 4)), rng.normal(size=(12, K))
    params = {"w": rng.normal(size=(4, 5)), "v": {"v": rng.normal(size=(5, K))}}
    to_float32 = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
    return to_float32((x, y, params))


def _losses(params, x, y):
    prediction = jnp.tanh(x @ params["w"]) @ params["v"]["v"]
    return jnp.mean((prediction - y) ** 2, axis=0)


def _torch_gradients(x, y, params, weights=None):
    """Leaves [K, ...] by K backward passes of PyTorch in float64; a weight [n, K] multiplies each sample's square."""
    torch = pytest.importorskip("torch")
    x, y = (torch.tensor(np.asarray(a, np.float64)) for a in (x, y))
    w = torch.tensor(np.asarray(params["w"], np.float64), requires_grad=True)
    v = torch.tensor(np.asarray(params["v"]["v"], np.float64), requires_grad=True)
    squares = (torch.tanh(x @ w) @ v - y) ** 2
    if weights is not None:
        squares = squares[:, :1] * torch.tensor(np.asarray(weights, np.float64))
    losses = squares.mean(0)
    parts = [torch.autograd.grad(loss, (w, v), retain_graph=True) for loss in losses]
    return {
        "w": np.stack([part[0].numpy() for part in parts]),
        "v": {"v": np.stack([part[1].numpy() for part in parts])},
    }


def _assert_close(got, wanted, rtol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), got, wanted)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradients_are_those_of_pytorch(chunk_size):
    x, y, params = _problem()
    losses, gradients = balancing.losses_and_gradients(_losses, params, x, y, chunk_size=chunk_size)
    _assert_close(gradients, _torch_gradients(x, y, params))
    np.testing.assert_allclose(losses, _losses(params, x, y), rtol=1e-6)


def test_the_network_is_traced_once_and_extra_results_come_through():
    x, y, params = _problem()
    calls = []

    def losses_fn(p, x):
        calls.append(1)
        losses = _losses(p, x, y)
        return tuple(losses), {"mean": losses.mean()}

    step = jax.jit(lambda p: balancing.losses_and_gradients(losses_fn, p, x, has_aux=True))
    (losses, aux), gradients = step(params)
    assert calls == [1]
    np.testing.assert_allclose(aux["mean"], losses.mean(), rtol=1e-6)
    _assert_close(gradients, _torch_gradients(x, y, params))
    alone = balancing.per_objective_gradients(lambda p: _losses(p, x, y), params)
    _assert_close(gradients, alone, rtol=1e-5)


def test_weights_of_samples_give_the_gradients_of_many_backward_passes():
    x, y, params = _problem(1)
    weights = np.random.default_rng(2).normal(size=(12, 7)).astype(np.float32)

    def term(p, sample):
        one, target = sample
        return jnp.sum((jnp.tanh(one @ p["w"]) @ p["v"]["v"])[0] - target[0]) ** 2

    _, gradients = balancing.weighted_sample_gradients(term, params, (x, y), weights, chunk_size=4)
    assert gradients["w"].shape == (7, 4, 5)
    _assert_close(gradients, _torch_gradients(x, y, params, weights))


def test_terms_and_masks_by_hand():
    """f = a x and b x: terms of two samples, 1 and 3, whose second one does not count for the second objective."""
    params = {"a": jnp.array(2.0), "b": jnp.array(5.0)}
    weights = jnp.array([[[1.0, 0.0], [1.0, 2.0]], [[1.0, 0.0], [jnp.nan, jnp.nan]]])
    valid = jnp.array([[True, True], [True, False]])
    losses, gradients = balancing.weighted_sample_gradients(
        lambda p, x: jnp.stack([p["a"] * x, p["b"] * x]),
        params,
        jnp.array([1.0, 3.0]),
        weights,
        valid,
    )
    # (1 a + 3 a) / 2 = 4 at a = 2; a + 2 b = 12 of one sample.
    np.testing.assert_allclose(losses, [4.0, 12.0])
    np.testing.assert_allclose(gradients["a"], [2.0, 1.0])
    np.testing.assert_allclose(gradients["b"], [0.0, 2.0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_gradients_are_not_rounded_to_the_dtype_of_weights(dtype):
    """By hand: two samples' gradients 1/3 and 1/7, weighed by 1 and 2 and by 4 and -1, averaged."""
    losses, gradients = balancing.weighted_sample_gradients(
        lambda p, x: p * x,
        jnp.array(3.0),
        jnp.array([1 / 3, 1 / 7]),
        jnp.array([[1, 4], [2, -1]], dtype),
    )
    expected = [(1 / 3 + 2 / 7) / 2, (4 / 3 - 1 / 7) / 2]
    np.testing.assert_allclose(gradients, expected, rtol=1e-6)
    np.testing.assert_allclose(losses, 3 * np.array(expected), rtol=1e-6)
    assert gradients.dtype == losses.dtype == jnp.float32


def test_float64_parameters_have_gradients_of_float64_whatever_the_weights():
    with jax.enable_x64(True):
        losses, gradients = balancing.weighted_sample_gradients(
            lambda p, x: p * x,
            jnp.array(3.0, jnp.float64),
            jnp.array([1 / 3, 1 / 7], jnp.float64),
            jnp.array([[1.0], [2.0]], jnp.float32),
        )
        assert gradients.dtype == losses.dtype == jnp.float64
        np.testing.assert_allclose(gradients, [(1 / 3 + 2 / 7) / 2], rtol=1e-15)


def _shortest(vectors):
    """Shortest convex combination in float64: the best of all faces on which the affine solution is inside."""
    best, length = None, np.inf
    for size in range(1, len(vectors) + 1):
        for face in itertools.combinations(range(len(vectors)), size):
            chosen = vectors[list(face)]
            system = np.block(
                [[chosen @ chosen.T, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]]
            )
            shares = np.linalg.lstsq(system, np.append(np.zeros(size), 1.0), rcond=None)[0][:size]
            vector = shares @ chosen
            if (shares >= -1e-9).all() and np.linalg.norm(vector) < length - 1e-12:
                best, length = vector, np.linalg.norm(vector)
    return best


def _stacked(count=4, seed=0):
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-2, 2, size=(count, 1))
    flat = rng.normal(size=(count, 6)) * scales
    tree = {"a": jnp.asarray(flat[:, :2]), "b": jnp.asarray(flat[:, 2:].reshape(count, 2, 2))}
    return flat, tree


def _flat(tree):
    return np.concatenate([np.asarray(tree["a"]).ravel(), np.asarray(tree["b"]).ravel()])


@pytest.mark.parametrize("seed", range(2))
def test_marble_and_min_norm_are_the_shortest_combinations(seed):
    flat, tree = _stacked(seed=seed)
    update, info = balancing.balance(tree, "min_norm")
    np.testing.assert_allclose(_flat(update), _shortest(flat), rtol=1e-3, atol=1e-6)
    norms = np.linalg.norm(flat, axis=1)
    unit = flat / norms[:, None]
    update, info = balancing.balance(tree)
    np.testing.assert_allclose(
        _flat(update), norms.mean() * _shortest(unit), rtol=1e-3, atol=1e-4 * norms.mean()
    )
    np.testing.assert_allclose(info.norms, norms, rtol=1e-5)
    np.testing.assert_allclose(info.weights @ flat, _flat(update), rtol=1e-4, atol=1e-5)
    cosines = unit @ _flat(update) / np.linalg.norm(_flat(update))
    np.testing.assert_allclose(info.cos_update, cosines, atol=1e-4)
    np.testing.assert_allclose(info.cos_pair, unit @ unit.T, atol=1e-5)
    assert float(info.worst_cos) > -1e-3 and float(info.kkt_residual) <= 1e-6
    assert balancing.STATUS_NAMES[int(info.status)] == "solved"


def test_every_name_is_a_balancer():
    for name in balancing.BALANCER_NAMES:
        weights = {"fixed": (0.25,) * 4}.get(name)
        assert isinstance(balancing.select_balancer(name, weights), Balancer)


@pytest.mark.parametrize("name", ["marble", "pcgrad"])
def test_what_is_masked_or_broken_stays_out(name):
    flat, tree = _stacked()
    tree["a"] = tree["a"].at[1, 0].set(jnp.nan)
    solve = jax.jit(lambda g, v: balancing.balance(g, name, valid=v))
    update, info = solve(tree, jnp.array([True, True, False, True]))
    np.testing.assert_array_equal(info.used, [True, False, False, True])
    np.testing.assert_allclose(
        _flat(update), np.asarray(info.weights)[[0, 3]] @ flat[[0, 3]], rtol=1e-4, atol=1e-5
    )
    assert np.isfinite(_flat(update)).all()


def test_weights_and_settings_reach_the_balancer():
    _, tree = _stacked()
    update, info = balancing.balance(tree, "weighted_sum", weights=(1, 0, 2, 0))
    np.testing.assert_allclose(info.weights, [1, 0, 2, 0], rtol=1e-6)
    _, info = balancing.balance(tree, "fixed", weights=(0.5, 0.5, 0.0, 0.0), normalize=True)
    np.testing.assert_allclose(info.alpha, [0.5, 0.5, 0.0, 0.0], rtol=1e-6)
    _, info = balancing.balance(tree, "marble", alpha_floor=0.2)
    assert float(info.alpha.min()) > 0.199
    _, info = balancing.balance(tree, Fixed())
    np.testing.assert_allclose(info.alpha, 0.25)


class _Counting(Balancer):
    """Equal shares, and a state that counts."""

    def init(self, num_rewards):
        return jnp.zeros((), jnp.int32)

    def __call__(self, gram, valid, state=()):
        solution: Solution = Fixed()(gram, valid)
        return solution.replace(state=state + 1)


def test_the_first_link_of_a_chain_is_balance_before_the_optimizer():
    x, y, params = _problem(3)
    optimizer = optax.chain(balancing.balanced(_Counting(), num_objectives=K), optax.sgd(0.1))

    def step(carry, _):
        p, state = carry
        gradients = balancing.per_objective_gradients(_losses, p, x, y)
        updates, state = optimizer.update(gradients, state, p)
        return (optax.apply_updates(p, updates), state), None

    (got, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
    wanted = params
    for _ in range(3):
        gradient = jax.grad(lambda p: jnp.mean(_losses(p, x, y)))(wanted)
        wanted = jax.tree.map(lambda p, g: p - 0.1 * g, wanted, gradient)
    _assert_close(got, wanted)
    assert int(state[0].info.state) == 3
    np.testing.assert_allclose(state[0].info.alpha, 1 / K, rtol=1e-6)


def test_half_precision_parameters_keep_their_dtype():
    x, y, params = _problem()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    _, gradients = balancing.losses_and_gradients(_losses, half, x, y)
    update, info = balancing.balance(gradients)
    assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype("bfloat16")}
    assert info.gram.dtype == jnp.float32 and bool(info.used.all())


def test_nnx_and_linen_parameters_are_trees_like_others():
    x = jnp.ones((3, 2))
    definition, params, rest = nnx.split(nnx.Linear(2, K, rngs=nnx.Rngs(0)), nnx.Param, ...)
    per_loss = balancing.per_objective_gradients(
        lambda p: nnx.merge(definition, p, rest)(x).mean(0), params
    )
    update, _ = balancing.balance(per_loss, "equal")
    assert jax.tree.structure(update) == jax.tree.structure(params)
    np.testing.assert_allclose(jax.tree.leaves(update)[0].sum(), 1.0, rtol=1e-5)
    model = nn.Dense(K)
    linen = model.init(jax.random.key(0), x)
    per_loss = balancing.per_objective_gradients(lambda p: model.apply(p, x).mean(0), linen)
    assert per_loss["params"]["kernel"].shape == (K, 2, K)


@pytest.mark.parametrize(
    ("name", "settings", "line"),
    [
        ("fixed", {"weights": [np.nan, 0.5, 0.5]}, r"weights\[0\]: expected a finite number"),
        ("weighted_sum", {"weights": [1, np.inf, 1]}, r"weights\[1\]: expected a finite number"),
        (
            "marble",
            {"weights": [1, 1e39, 1]},
            "reward weights: expected numbers above 0 that float32",
        ),
        ("marble", {"weights": []}, "weights: expected one number an objective, or None; received"),
        ("marble", {"weights": ["x", 2, 3]}, r"weights\[0\]: expected a number; received 'x'"),
        ("marble", {"weights": 3.0}, "weights: expected .*; received 3.0"),
        ("marble", {"reward_weights": 3.0}, "reward_weights of the balancer 'marble': expected"),
        ("marble", {"alpha_floor": np.nan}, "alpha_floor of the balancer 'marble': expected a fin"),
        ("marble", {"alpha_floor": 1.5}, r"alpha floor: expected a number in \[0, 1 / K\]"),
        ("marble", {"normalize": "no"}, "normalize of the balancer 'marble': expected a boolean"),
        ("upgrad", {"regularisation": np.nan}, "regularisation of the balancer 'upgrad': expected"),
        ("upgrad", {"num_sweeps": 0}, "UPGrad sweeps: expected a whole number of at least 1"),
        ("nash", {"regularisation": -5}, "NashMTL regularisation: expected a number of at least 0"),
        ("nash", {"num_steps": 0}, "NashMTL steps: expected a whole number of at least 1"),
        ("cagrad", {"c": "x"}, "c of the balancer 'cagrad': expected a number; received 'x'"),
    ],
)
def test_numbers_that_would_spoil_an_update_are_refused(name, settings, line):
    with pytest.raises(InputError, match=line) as caught:
        balancing.balance(jnp.eye(3), name, **settings)
    assert "\n" not in str(caught.value)


def test_numbers_of_a_balancer_are_not_traced_and_may_be_of_numpy_or_jax():
    wanted = balancing.balance(jnp.eye(3), "weighted_sum", weights=(1.0, 2.0, 3.0))[0]
    np.testing.assert_allclose(wanted, [1.0, 2.0, 3.0])
    for weights in (np.array([1, 2, 3]), jnp.array([1.0, 2.0, 3.0]), [np.float32(1), 2, 3]):
        got, _ = balancing.balance(jnp.eye(3), "weighted_sum", weights=weights)
        np.testing.assert_array_equal(got, wanted)
    compiled = jax.jit(lambda w: balancing.balance(jnp.eye(3), "weighted_sum", weights=w)[0])
    with pytest.raises(
        InputError, match="weights: expected numbers that are known before the prog"
    ):
        compiled(jnp.ones(3))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: balancing.balance({}), r"gradients: expected leaves \[K, ...\] with the same K"),
        (
            lambda: balancing.balance({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}),
            r"received \[2, 3\], \[3, 3\]",
        ),
        (
            lambda: balancing.balance(jnp.ones((2, 3)), "pcgard"),
            "balancer: expected one of .*received 'pcgard'.*pcgrad",
        ),
        (
            lambda: balancing.balance(jnp.ones((2, 3)), "cagrad", weights=(1, 2)),
            "weights: expected with one of marble, weighted_sum, fixed, min_norm; received them with",
        ),
        (
            lambda: balancing.balance(jnp.ones((2, 3)), "marble", weights=(1, 2, 3)),
            "expected one number for each of 2 rewards; received 3",
        ),
        (lambda: balancing.balance(jnp.ones((2, 3)), "cagrad", c=2.0), r"expected a number in \["),
        (lambda: balancing.balance(jnp.ones((2, 3)), "upgrad", c=0.5), "setting of the balancer"),
        (
            lambda: balancing.balance(jnp.ones((2, 3)), "min_norm", normalize=True),
            "normalize of the balancer 'min_norm'",
        ),
        (
            lambda: balancing.balance(jnp.ones((2, 3)), Fixed(), normalize=True),
            "expected a name beside weights and settings",
        ),
        (
            lambda: balancing.balance(jnp.ones((2, 3)), valid=[True]),
            r"valid: expected one switch for each of 2 objectives; received shape \[1\]",
        ),
        (
            lambda: balancing.losses_and_gradients(lambda p: p.sum(), jnp.ones(3)),
            r"losses_fn: expected an array \[K\] or a tuple of K scalars; received \[\]",
        ),
        (
            lambda: balancing.losses_and_gradients(lambda p: (p, p), jnp.ones(3)),
            r"losses_fn: expected scalars; received shapes \[\[3\]\]",
        ),
        (
            lambda: balancing.losses_and_gradients(lambda p: p, jnp.ones(3), has_aux=True),
            "losses_fn: expected a pair",
        ),
        (
            lambda: balancing.losses_and_gradients(lambda p: p["a"], {"a": jnp.arange(3)}),
            r"params\['a'\]: expected an array of floating-point numbers; received int32",
        ),
        (lambda: balancing.losses_and_gradients(lambda p: p, {}), "params: expected arrays"),
        (
            lambda: balancing.weighted_sample_gradients(
                lambda p, x: p * x, jnp.ones(()), jnp.ones(3), jnp.ones((2, 2))
            ),
            r"weights: expected \[3, K\] or \[3, K, J\]; received shape \[2, 2\]",
        ),
        (
            lambda: balancing.weighted_sample_gradients(
                lambda p, x: p * x, jnp.ones(()), jnp.ones(3), jnp.ones((3, 2, 2))
            ),
            r"terms of a sample: expected 2, as many as there are weights; received shape \[1\]",
        ),
        (
            lambda: balancing.weighted_sample_gradients(
                lambda p, x: p * x, jnp.ones(()), jnp.ones(3), jnp.ones((3, 2)), jnp.ones(3, bool)
            ),
            r"valid: expected shape \[3, 2\]; received \[3\]",
        ),
        (
            lambda: balancing.balanced(num_objectives=3).update(
                jnp.ones((2, 3)), balancing.balanced(num_objectives=3).init(None)
            ),
            r"gradients: expected leaves \[3, ...\]; received 2 in front",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(call, line):
    with pytest.raises(InputError, match=line) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_gradients_are_refused_where_the_compiler_gets_them_wrong(monkeypatch):
    monkeypatch.setattr(platform, "jaxlib_version", lambda: "0.10.2")
    monkeypatch.setattr(platform, "_too_late", True)
    with pytest.raises(InputError, match="expected to be imported before JAX is used"):
        balancing.losses_and_gradients(lambda p: p, jnp.ones(3))
    with pytest.raises(InputError, match="expected to be imported before JAX is used"):
        balancing.weighted_sample_gradients(
            lambda p, x: p * x, jnp.ones(()), jnp.ones(3), jnp.ones((3, 2))
        )


def _examples():
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(4), ids=["jax", "linen", "nnx", "many"])
def test_examples_of_the_guide_run(number, capsys):
    examples = _examples()
    assert len(examples) == 4
    names: dict = {}
    exec(compile(examples[number], f"{GUIDE.name} example {number}", "exec"), names)
    losses = np.asarray(names["losses"])
    assert np.isfinite(losses).all() and capsys.readouterr().out
    if "y" in names:
        # Both targets are explained better than by nothing.
        assert (losses < np.mean(np.square(names["y"]), axis=0)).all()


def test_public_names_are_imported_when_they_are_used():
    assert sorted(marble_jax.__all__) == sorted(marble_jax._HOMES)
    for name in marble_jax.__all__:
        assert getattr(marble_jax, name).__doc__, name
    assert set(marble_jax.__all__) <= set(dir(marble_jax))
    with pytest.raises(AttributeError, match="no attribute 'balances'"):
        _ = marble_jax.balances
    code = (
        "import sys, marble_jax; assert 'jax' not in sys.modules and 'optax' not in sys.modules;"
        "marble_jax.balance; assert 'optax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
