"""A run's export: every library that is to open the folder draws our images, and a failure leaves no trace."""

import importlib.resources
import json
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sd3_lora as lora
from etils import epath
from hub_server import TOKEN, served
from huggingface_hub import constants
from loaded_pipeline import load_pipeline
from safetensors.numpy import load_file, save_file

from marble_jax.config import flatten, settings_of
from marble_jax.console import Console
from marble_jax.errors import InputError
from marble_jax.families.descriptions import Size
from marble_jax.families.sd3 import transformer
from marble_jax.families.sd3.config import MMDiTConfig
from marble_jax.families.sd3.family import FAMILY
from marble_jax.flow.policy_sampler import make_sampler
from marble_jax.harmonize.registry import balancer_of
from marble_jax.policies import TRAINED_POLICIES
from marble_jax.programs import build, export, export_folder, verify
from marble_jax.programs.export import ExportOptions, PeriodicExports
from marble_jax.programs.export_folder import new_folder
from marble_jax.storage.checkpoint import Checkpoints
from marble_jax.storage.images import save_png
from marble_jax.storage.workdir import Workdir
from marble_jax.training.optimizer import make_optimizer
from marble_jax.training.state import initial_state

ROOT = Path(__file__).parents[2]
BASE = Path(str(importlib.resources.files("marble_jax") / "embedded" / "pipeline"))
SHAPES = transformer.abstract_params(
    transformer.MMDiT(
        MMDiTConfig.from_dict(json.loads((BASE / "transformer" / "config.json").read_text()))
    )
)
SPEC = lora.LoraSpec(4, 12.0)
PROMPT, TOKENS, STEPS = 'a sign saying "LM" in green on white', 12, verify.NUM_STEPS
FILES = {
    "README.md",
    "export.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
}


def random_adapter(seed):
    """A strong adapter: images change by far more than the tolerance, at half strength too."""
    rng = np.random.default_rng(seed)
    names = [layer.name for layer in lora.target_layers(SHAPES)]
    blank = lora.unstack(lora.init_adapter(jax.random.key(0), SHAPES, SPEC))
    return lora.stack(
        {
            n: (
                rng.normal(0, 0.25, blank[n][0].shape).astype(np.float32),
                rng.normal(0, 0.03, blank[n][1].shape).astype(np.float32),
            )
            for n in names
        },
        SHAPES,
    )


POLICIES = {"current": 1, "rollout": 2, "ema": 3, "best": 4}


def export_run(path, out, **options):
    export.export_run(path, out, ExportOptions(**options))


def smoke_config():
    config = runpy.run_path(str(ROOT / "configs" / "embedded.py"))["get_config"]("smoke")
    config.lora.update(rank=SPEC.rank, alpha=SPEC.alpha)
    config.rewards.update(train=("geneval",), heldout=())
    config.harmonize.reward_weights = ()
    return config


def state_of(config, step, best_score=0.5):
    settings = settings_of(config)
    state = initial_state(
        random_adapter(0),
        make_optimizer(settings.training),
        1,
        balancer_of(settings.harmonize, settings.rewards.train).init(1),
        0,
    )
    return state.replace(
        step=jnp.int32(step),
        best_step=jnp.int32(step - 1),
        best_score=jnp.float32(best_score),
        **{name: random_adapter(seed) for name, seed in POLICIES.items()},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run of seven steps, evaluated after six, with a checkpoint of each policy's own adapter."""
    path, config = tmp_path_factory.mktemp("runs") / "run", smoke_config()
    workdir = Workdir(str(path))
    workdir.claim(flatten(config))
    workdir.write_json(
        "run.json",
        {
            "name": "a run",
            "method": "MARBLE",
            "rewards": ["geneval"],
            "heldout_rewards": [],
            "config": flatten(config),
        },
    )
    for step, policy, mean in ((0, "base", 0.25), (6, "ema", 0.75)):
        interval = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}
        workdir.append(
            workdir.evaluations,
            {
                "step": step,
                "policy": policy,
                "num_prompts": 9,
                "scores": {"geneval": interval | {"count": 8}},
                **({"gain": {"geneval": interval | {"mean": 0.5}}} if step else {}),
            },
        )
        save_png(
            workdir.samples / f"step_{step:06d}" / "00.png", np.full((8, 8, 3), step * 20, np.uint8)
        )
    workdir.write_json("samples/prompts.json", [{"prompt": "two | red\ncircles", "seed": 0}])
    checkpoints = Checkpoints(workdir.checkpoints)
    for step in (5, 7):
        checkpoints.save(step, state_of(config, step))
    checkpoints.close()
    return path


@pytest.fixture(scope="module")
def exported(run):
    """(folder, its printed lines): the averaged policy, merged in float32."""
    folder = run.parent / "exported"
    export_run(str(run), str(folder), merge=True, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def ours():
    """Noise [1, h, w, C] and our image of it without and with the averaged adapter.

    T5 is left out: its part of the conditioning knows no adapter."""
    pipeline = load_pipeline(BASE, omit=("text_encoder_3",), lora_scale=SPEC.scale)
    noise = (
        np.random.default_rng(5).normal(size=(1, *pipeline.latent_shape(64, 64))).astype(np.float32)
    )
    sigmas = pipeline.levels(STEPS, pipeline.latent_shape(64, 64))
    sampler = make_sampler(pipeline.velocity, "euler", sigmas)
    cond = pipeline.encode_prompts([PROMPT], TOKENS)
    images = [
        np.asarray(pipeline.decode(sampler(pipeline.params, adapter, cond, jnp.asarray(noise)), 1))
        for adapter in (None, random_adapter(POLICIES["ema"]))
    ]
    assert np.abs(images[1] - images[0]).max() > 0.1
    return noise, *images


@pytest.fixture(scope="module")
def theirs(ours):
    """theirs(change) -> diffusers' image of the same prompt and noise, after `change` to a pipeline with a fresh
    transformer."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        BASE, text_encoder_3=None, tokenizer_3=None
    )
    pipe.set_progress_bar_config(disable=True)
    fresh = diffusers.SD3Transformer2DModel.from_pretrained

    def draw(change):
        pipe.register_modules(transformer=fresh(BASE / "transformer"))
        change(pipe)
        return pipe(
            PROMPT,
            latents=torch.from_numpy(ours[0]).permute(0, 3, 1, 2),
            height=64,
            width=64,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            max_sequence_length=TOKENS,
            output_type="np",
        ).images

    return draw


def upstream(pipe, folder):
    """What MARBLE's evaluation.py does with a checkpoint's lora folder: its own config, then load_adapter over it."""
    import peft

    config = peft.LoraConfig(
        r=SPEC.rank,
        lora_alpha=SPEC.alpha,
        init_lora_weights="gaussian",
        target_modules=list(lora.ATTENTION_TARGETS),
    )
    pipe.transformer = peft.get_peft_model(pipe.transformer, config)
    pipe.transformer.load_adapter(str(folder / "lora"), adapter_name="default", is_trainable=False)
    pipe.transformer.eval()


def peft_reads(pipe, folder):
    import peft

    pipe.transformer = peft.PeftModel.from_pretrained(
        pipe.transformer, str(folder)
    ).merge_and_unload()


def merged_reads(pipe, folder):
    import diffusers

    pipe.register_modules(
        transformer=diffusers.SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    )


READERS = {
    "diffusers": lambda pipe, folder: pipe.load_lora_weights(str(folder)),
    "diffusers, by name": lambda pipe, folder: pipe.load_lora_weights(
        str(folder), weight_name="pytorch_lora_weights.safetensors"
    ),
    "PEFT": peft_reads,
    "upstream's evaluation": upstream,
    "merged": merged_reads,
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_draws_our_images(exported, ours, theirs, reader):
    _, base, wanted = ours
    images = theirs(lambda pipe: READERS[reader](pipe, exported))
    np.testing.assert_allclose(images, wanted, atol=1e-2)
    assert np.abs(images - base).max() > 0.1
    assert np.vdot(images - base, wanted - base) / np.vdot(
        wanted - base, wanted - base
    ) == pytest.approx(1, abs=0.02)


def test_single_file_readers_get_the_right_strength(exported):
    """ComfyUI's and kohya's rule: up @ down, times alpha / rank where there is an alpha, under diffusers' names."""
    tensors = load_file(exported / "pytorch_lora_weights.safetensors")
    wanted = {
        n: SPEC.scale * (a @ b)
        for n, (a, b) in lora.unstack(random_adapter(POLICIES["ema"])).items()
    }
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            alpha = tensors.get(f"{name}.alpha")
            scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
            found[name.removeprefix("transformer.")] = (
                scale * (tensors[f"{name}.lora_B.weight"] @ down).T
            )
    assert set(found) == set(wanted) and len(tensors) == 2 * len(wanted)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-6)


def test_merged_weights_are_the_bases_but_for_the_adapted_layers(run, exported, tmp_path):
    base = load_file(BASE / "transformer" / "diffusion_pytorch_model.safetensors")
    export_run(str(run), str(tmp_path / "out"), merge=True)
    merged = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    deltas = {
        f"{n}.weight": SPEC.scale * (a @ b).T
        for n, (a, b) in lora.unstack(random_adapter(POLICIES["ema"])).items()
    }
    assert set(merged) == set(base) and set(deltas) < set(base)
    for name, tensor in merged.items():
        wanted = (
            base[name] if name not in deltas else (base[name].astype(np.float32) + deltas[name])
        )
        assert tensor.dtype == base[name].dtype
        np.testing.assert_allclose(
            tensor.astype(np.float32),
            wanted.astype(tensor.dtype).astype(np.float32),
            rtol=1e-3,
            err_msg=name,
        )
    wide = load_file(exported / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in wide.values()} == {np.dtype(np.float32)}
    export_run(str(run), str(tmp_path / "half"), merge=True, dtype="bfloat16")
    half = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for name, tensor in half.items():  # rounded once, from float32
        np.testing.assert_array_equal(tensor, wide[name].astype(ml_dtypes.bfloat16), err_msg=name)


def pairs_in(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {k.removeprefix("base_model.model."): v for k, v in tensors.items()}


@pytest.mark.parametrize("policy", TRAINED_POLICIES)
def test_policies(run, tmp_path, policy):
    export_run(str(run), str(tmp_path / "out"), policy=policy)
    found = pairs_in(tmp_path / "out")
    for name, (a, b) in lora.unstack(random_adapter(POLICIES[policy])).items():
        np.testing.assert_array_equal(found[f"{name}.lora_A.weight"], a.T)
        np.testing.assert_array_equal(found[f"{name}.lora_B.weight"], b.T)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (record["policy"], record["step"]) == (policy, 6 if policy == "best" else 7)
    assert record["lora"]["rank"] == SPEC.rank and record["verified"] is None


def test_another_checkpoint(run, tmp_path):
    export_run(str(run), str(tmp_path / "out"), step=5)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["step"] == 5
    with pytest.raises(InputError, match=r"checkpoint: expected one of \[5, 7\] in .*; received 6"):
        export_run(str(run), str(tmp_path / "other"), step=6)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_only_targets_are_written():
    """Layers that merely fill up a stacked run would be unknown keys to PEFT."""
    spec = lora.LoraSpec(4, 12.0, ("transformer_blocks.1.attn.to_q",))
    adapter = lora.init_adapter(jax.random.key(0), SHAPES, spec)
    assert len(lora.unstack(adapter)) > 1
    pairs = export_folder.exported_pairs(FAMILY, adapter, SHAPES, spec)
    assert set(pairs) == {"transformer_blocks.1.attn.to_q"}


def test_the_folder_and_its_card(exported):
    from huggingface_hub import ModelCard

    files = {str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()}
    assert files == FILES | {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "images/00_before.png",
        "images/00_after.png",
    }
    config = json.loads((exported / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 12, "LORA")
    assert sorted(config["target_modules"]) == sorted(lora.ATTENTION_TARGETS)
    card = ModelCard.load(exported / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers"
    assert "base_model" not in card.data.to_dict() and {"lora", "diffusers"} <= set(card.data.tags)
    assert card.data.to_dict()["widget"] == [
        {"text": "two | red\ncircles", "output": {"url": "images/00_after.png"}}
    ]
    assert "| geneval | 0.2500 | 0.7500 | +0.5000 [+0.6500, +0.8500] | 8 |" in card.text
    assert "scores of the averaged policy after step 6" in card.text
    assert (
        "| two &#124; red circles | ![before](images/00_before.png) | ![after](images/00_after.png) |"
        in card.text
    )
    assert "rank 4, alpha 12, 39 layers" in card.text and 'subfolder="transformer"' in card.text
    assert (exported / "images" / "00_after.png").stat().st_size > 0


@pytest.mark.parametrize(
    "path, base, said",
    [
        (
            "stabilityai/stable-diffusion-3.5-medium",
            "stabilityai/stable-diffusion-3.5-medium",
            "Stability AI Community",
        ),
        ("/models/mine", None, "the licence of the base model applies"),
    ],
)
def test_cards_for_other_base_models(run, path, base, said):
    from huggingface_hub import ModelCard

    from marble_jax.programs.model_card import model_card

    config = smoke_config()
    config.model.path = path
    settings = settings_of(config)
    facts = export_folder.facts_of(settings, FAMILY, Workdir(str(run)), {}, "current", 7)
    text, _ = model_card(facts, None, merged=False)
    card = ModelCard(text)
    assert card.data.to_dict().get("base_model") == base and said in text
    assert f'from_pretrained("{base or "mine"}"' in text and "/models" not in text
    assert (
        (card.data.license_name == "stabilityai-ai-community")
        if base
        else card.data.license is None
    )


def test_a_run_without_records_has_a_card(tmp_path):
    config = smoke_config()
    workdir = Workdir(str(tmp_path / "run"))
    workdir.claim(flatten(config))
    from marble_jax.programs.model_card import model_card

    facts = export_folder.facts_of(settings_of(config), FAMILY, workdir, {}, "ema", 0)
    text, images = model_card(facts, None, merged=False)
    assert "Not evaluated." in text and images == {}


@pytest.fixture(scope="module")
def drawn():
    """Our side of a verification of the averaged policy is drawn once for all tests."""
    kept, draw = [], verify._our_images

    def once(drawing, adapter):
        if not kept:
            kept.append(draw(drawing, adapter))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_our_images", once)
        yield


def needs_verification():
    for name in verify.PACKAGES:
        pytest.importorskip(name)


def test_verification_says_what_it_saw(run, drawn, tmp_path, capsys):
    needs_verification()
    export_run(str(run), str(tmp_path / "out"), merge=True, verify=True)
    lines = capsys.readouterr().out
    for reader in ("diffusers", "PEFT", "merged"):
        assert f"{reader:10} largest difference 0.0" in lines
    record = json.loads((tmp_path / "out" / "export.json").read_text())["verified"]
    assert record["effect"] > 0.1 and set(record["readers"]) == {"diffusers", "PEFT", "merged"}
    for reader in ("diffusers", "PEFT"):
        assert record["readers"][reader]["difference"] < 1e-3
        assert record["readers"][reader]["strength"] == pytest.approx(1, abs=1e-3)
    assert "| PEFT |" in (tmp_path / "out" / "README.md").read_text()


def halved(folder):
    file = folder / "pytorch_lora_weights.safetensors"
    tensors = {k: v / 2 if "lora_B" in k else v for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def peft_names(folder):
    """PEFT's names in diffusers' file: loads without an error, and does nothing."""
    shutil.copy(folder / "adapter_model.safetensors", folder / "pytorch_lora_weights.safetensors")


def other_alpha(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 24}))


def broken(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"1234")


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            halved,
            r"diffusers drew another one \(largest difference 0.\d+, strength 0\.[3-6]\d\); nothing was written",
        ),
        (peft_names, "received: diffusers drew as if there were no LoRA; nothing was written"),
        (other_alpha, r"received: PEFT drew another one"),
        (broken, "expected PEFT to open the export; received SafetensorError"),
    ],
)
def test_verification_finds_what_users_suffer_from(
    run, drawn, tmp_path, monkeypatch, damage, message
):
    needs_verification()
    write = export.write_lora

    def damaged(folder, pairs, facts, family):
        write(folder, pairs, facts, family)
        damage(folder)

    monkeypatch.setattr(export, "write_lora", damaged)
    with pytest.raises(InputError, match=message) as error:
        export_run(str(run), str(tmp_path / "out"), verify=True)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_effect_is_not_verified(tmp_path, monkeypatch):
    needs_verification()
    image = np.full((1, 1, 64, 64, 3), 0.5, np.float32)
    ours = verify.OurImages(np.zeros((1, 8, 8, 16)), {}, image, image + 1e-4)
    monkeypatch.setattr(verify, "_our_images", lambda drawing, adapter: ours)
    drawing = verify.Drawing(BASE, FAMILY, PROMPT, Size(64, 64), TOKENS, SPEC.scale)
    blank = lora.init_adapter(jax.random.key(0), SHAPES, SPEC)
    with pytest.raises(
        InputError,
        match="expected an adapter that changes a pixel by 0.001 or more; .*without effect",
    ):
        verify.verify(epath.Path(tmp_path), drawing, blank, Console())


def test_a_base_that_diffusers_cannot_open(exported, tmp_path):
    needs_verification()
    drawing = verify.Drawing(tmp_path, FAMILY, PROMPT, Size(64, 64), TOKENS, SPEC.scale)
    with pytest.raises(
        InputError, match="--verify: expected a base model that diffusers opens; received "
    ):
        next(verify._readings(epath.Path(exported), drawing, None))


def test_verification_needs_its_libraries(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        verify.importlib.util, "find_spec", lambda name: None if name == "peft" else name
    )
    with pytest.raises(
        InputError,
        match=r"expected the packages torch, diffusers, peft; received no peft \(pip insta",
    ):
        export_run(str(run), str(tmp_path / "out"), verify=True)


def test_places_that_are_taken(run, exported, tmp_path):
    before = {p: p.read_bytes() for p in exported.rglob("*") if p.is_file()}
    with pytest.raises(
        InputError, match=r"exported: expected a new folder; received one that exists \(--overwrite"
    ):
        export_run(str(run), str(exported))
    with pytest.raises(InputError, match="checkpoint: expected one of"):
        export_run(str(run), str(exported), step=3, overwrite=True)
    assert before == {p: p.read_bytes() for p in exported.rglob("*") if p.is_file()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all my work")
    with pytest.raises(
        InputError, match=r"expected an earlier export to overwrite \(with export.json\); received"
    ):
        export_run(str(run), str(tmp_path / "mine"), overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "all my work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        InputError, match="file/out: expected a writable place with room; received Not a directory"
    ):
        export_run(str(run), str(tmp_path / "file" / "out"))
    with pytest.raises(
        InputError, match=r"--merge: expected an --out on this machine; received 'gs://x/y'"
    ):
        export_run(str(run), "gs://x/y", merge=True)


def test_overwriting_replaces_the_whole_folder(run, tmp_path):
    (tmp_path / "out").mkdir()  # an empty one is free
    export_run(str(run), str(tmp_path / "out"))
    (tmp_path / "out" / "stale").write_text("x")
    export_run(str(run), str(tmp_path / "out"), policy="current", overwrite=True)
    assert {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    } == (FILES | {"images/00_before.png", "images/00_after.png"})
    assert json.loads((tmp_path / "out" / "export.json").read_text())["policy"] == "current"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_two_renames_is_undone(tmp_path):
    """The old export stands beside its place, the new one is complete: the old one comes back."""
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "export.json").write_text("old")
    (tmp_path / ".out.partial").mkdir()
    with (
        pytest.raises(InputError, match="expected a new folder"),
        new_folder(epath.Path(tmp_path / "out")),
    ):
        pass
    assert (tmp_path / "out" / "export.json").read_text() == "old"
    with new_folder(epath.Path(tmp_path / "out"), overwrite=True) as folder:
        assert not any(folder.iterdir())
        (folder / "export.json").write_text("new")
        assert (tmp_path / "out" / "export.json").read_text() == "old"
    assert (tmp_path / "out" / "export.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_goes_to_the_hub_when_it_is_complete(run, tmp_path, monkeypatch, capsys):
    with served() as (hub, root):
        monkeypatch.setattr(constants, "ENDPOINT", root)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        options = {"push_to_hub": "me/lora", "private": True}
        with pytest.raises(InputError, match="--push_to_hub: expected to write .*no valid token"):
            export_run(str(run), str(tmp_path / "out"), **options)
        # Refused before anything was written.
        assert not list(tmp_path.iterdir()) and not hub.files
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        export_run(str(run), str(tmp_path / "out"), **options)
        files, (message,) = hub.files["model", "me/lora"], hub.messages["model", "me/lora"]
    there = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(files) == set(map(str, there)) and "pytorch_lora_weights.safetensors" in files
    assert all((tmp_path / "out" / name).read_bytes() == files[name] for name in files)
    assert message.startswith("ema after step ") and f"Hub: {root}" in capsys.readouterr().out
    with pytest.raises(InputError, match="--push_to_hub: expected an --out on this machine"):
        export_run(str(run), "gs://bucket/out", **options)


def test_periodic_exports(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    config, workdir = smoke_config(), Workdir(str(tmp_path / "run"))
    config.export.update(keep=2)
    exports = PeriodicExports(settings_of(config), FAMILY, workdir, SHAPES, Console())
    for step in (2, 4, 6, 6, 8):  # a resumed run comes by a step again
        exports(state_of(config, step))
    assert exports.steps() == [6, 8]
    assert {p.name for p in exports.folder.iterdir()} == {"step_000006", "step_000008"}
    found = pairs_in(exports.folder / "step_000008")
    a, _ = lora.unstack(random_adapter(POLICIES["ema"]))["transformer_blocks.0.attn.to_q"]
    np.testing.assert_array_equal(found["transformer_blocks.0.attn.to_q.lora_A.weight"], a.T)
    assert "export: " in capsys.readouterr().out
    config.export.policy = "best"
    exports = PeriodicExports(settings_of(config), FAMILY, workdir, SHAPES, Console())
    exports(state_of(config, 10, best_score=-np.inf))
    assert (
        "export after step 10 failed, training goes on: export.policy: expected one that the run has"
        in (capsys.readouterr().out)
    )
    exports(state_of(config, 12))
    assert json.loads((exports.folder / "step_000012" / "export.json").read_text())["step"] == 11


def test_training_goes_on_from_an_export(run, exported):
    """`lora.init` of a build: all policies start as the exported one, whatever the seed."""
    config = smoke_config()
    config.seed, config.lora.init = 77, str(exported)
    built = build.build(settings_of(config))
    built.collector.scorer.close()
    built.evaluator.scorer.close()
    wanted = lora.unstack(random_adapter(POLICIES["ema"]))
    for policy in ("current", "rollout", "ema"):
        for name, (a, b) in lora.unstack(getattr(built.state, policy)).items():
            np.testing.assert_allclose(a, wanted[name][0])
            np.testing.assert_allclose(b, wanted[name][1], rtol=1e-6)
    config.lora.rank = 8
    with pytest.raises(
        InputError, match=r"lora.init: .*expected lora.rank = 8; received rank 4 .*set lora.rank=4"
    ):
        build.build(settings_of(config))
