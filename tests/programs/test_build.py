"""From configuration to run: what is checked before anything is read, and what is built."""

from __future__ import annotations

import json

import numpy as np
import pytest

from marble_jax.config import Settings, default_config, settings_of
from marble_jax.errors import InputError
from marble_jax.objectives.nft import Nft
from marble_jax.programs import build, check_settings, locations, open_model
from marble_jax.prompts.geneval_metadata import TAGS
from marble_jax.training.batch_sizes import Sizes


def config(**changes):
    """The defaults with `room__key=value` changes."""
    made = default_config()
    for name, value in changes.items():
        *rooms, leaf = name.split("__")
        node = made
        for room in rooms:
            node = node[room]
        node[leaf] = value
    return made


def held_out_prompts(made):
    settings = settings_of(made)
    return locations.held_out_prompts(settings.prompts, settings.evaluation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards__train": ()}, "rewards.train: expected at least one reward; received none"),
        ({"prompts__sources": ()}, "prompts.sources: expected at least one source; received none"),
        (
            {"rewards__heldout": ("imagereward", "ocr")},
            "rewards.heldout: .*not trained on; received 'ocr'",
        ),
        (
            {"harmonize__alpha_floor": 0.25},
            "harmonize.alpha_floor: expected at most 1/5; received 0.25",
        ),
        (
            {"model__attention": "cudnn"},
            "model.attention: expected 'xla', as cudnn needs a GPU and bfloat16; .*on cpu",
        ),
        (
            {"model__attention": "splash"},
            "model.attention: expected 'xla', as splash needs a TPU; .*on cpu",
        ),
        (
            {"reward_schedule__stages": ("ocr:20", "clip:20")},
            "reward_schedule.stages: reward: .*received 'clip'",
        ),
        (
            {"reward_schedule__dropout": 0.5},
            "reward_schedule.dropout_targets: expected some of the rewards .*; received none",
        ),
        (
            {"harmonize__unit": "signal"},
            "harmonize.unit: expected 'gradient' with harmonize.gram=step, .*received 'signal'",
        ),
        (
            {"harmonize__gram": "cleaned", "advantages__scalarize": "gdpo"},
            "harmonize.gram: expected 'step' with advantages.scalarize=gdpo, .*received 'cleaned'",
        ),
        (
            {"harmonize__gram": "cleaned", "harmonize__window": 1.0},
            "harmonize.window: expected above 1 with harmonize.gram=cleaned, .*received 1.0",
        ),
        (
            {"harmonize__balancer": "nash", "harmonize__reward_weights": (1.0, 2.0, 1.0, 1.0, 1.0)},
            r"harmonize.reward_weights: expected none with harmonize.balancer=nash, .*reward_weights=\); received \(1",
        ),
        (
            {"harmonize__balancer": "equal", "harmonize__alpha_floor": 0.1},
            r"harmonize.alpha_floor: expected 0.0 with .*=equal, .*alpha_floor=0.0\); received 0.1",
        ),
        (
            {"harmonize__balancer": "imtl", "harmonize__normalize": False},
            "harmonize.normalize: expected True with harmonize.balancer=imtl, .*received False",
        ),
        (
            {"harmonize__fixed_alpha": (0.2,) * 5},
            "harmonize.fixed_alpha: expected none with harmonize.balancer=marble, .*received",
        ),
        (
            {"harmonize__mode": "upstream", "harmonize__smooth_exact": True},
            "harmonize.smooth_exact: expected False with harmonize.mode=upstream, .*received True",
        ),
        (
            {"advantages__scalarize": "weighted_sum", "harmonize__smooth_exact": True},
            "harmonize.smooth_exact: expected False with advantages.scalarize=weighted_sum",
        ),
        (
            {
                "advantages__scalarize": "gdpo",
                "harmonize__reward_weights": (1.0, 2.0, 1.0, 1.0, 1.0),
            },
            "harmonize.reward_weights: expected none with advantages.scalarize=gdpo, .*reward_weights=; "
            r"advantages.weights are the weights of its rewards\); received \(1.0, 2.0",
        ),
        (
            {"advantages__scalarize": "weighted_sum", "harmonize__balancer": "pcgrad"},
            "harmonize.balancer: expected marble with advantages.scalarize=weighted_sum, .*balancer=marble.*'?pcgrad",
        ),
        (
            {"advantages__scalarize": "weighted_sum", "harmonize__alpha_floor": 0.1},
            "harmonize.alpha_floor: expected 0.0 with advantages.scalarize=weighted_sum, .*received 0.1",
        ),
        (
            {
                "advantages__scalarize": "advantage_sum",
                "harmonize__groups": ("a", "a", "b", "b", "b"),
            },
            "harmonize.groups: expected none with advantages.scalarize=advantage_sum, .*received",
        ),
        (
            {"advantages__scalarize": "gdpo", "advantages__scale": "group"},
            "advantages.scale: expected 'global' with advantages.scalarize=gdpo, .*'group'",
        ),
        (
            {"rollout__merge_adapter": True},
            r"model.dtype: expected 'float32' with rollout.merge_adapter=True, .*received 'bfloat16' "
            r"\(--config.rollout.merge_adapter=False keeps",
        ),
        ({"logging__wandb": "project"}, "logging.wandb: expected the package wandb; received none"),
        (
            {"rollout_policy__schedule": "linear"},
            "rollout_policy.schedule: expected one of copy, linear_capped, delayed_linear",
        ),
        (
            {"rollout_policy__schedule": "delayed_linear", "rollout_policy__cap": 0.5},
            "rollout_policy.cap: expected 0, for the schedule's own 0.999, or a rate beside it .*received 0.5",
        ),
        (
            {"rollout__solver": "heun"},
            "rollout.solver: expected one of euler, dpm1, dpm2, ddim, unipc, flow_sde, dance_sde, cps; "
            "received 'heun'",
        ),
    ],
)
def test_check(changes, message, monkeypatch):
    monkeypatch.setattr(check_settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        check_settings.check_settings(settings_of(config(**changes)))


def test_build_checks_before_it_reads(monkeypatch):
    readers = (
        (locations, "read_directory"),
        (open_model, "find_model"),
        (build, "open_rewards"),
        (build, "open_networks"),
    )
    for module, reader in readers:
        monkeypatch.setattr(module, reader, lambda *a, **k: pytest.fail("something was read"))
    for changes, message in (
        ({"nft__beta": 0.0}, "config.nft.beta"),
        ({"mesh__data": 3}, "mesh: expected data x fsdp"),
        ({"harmonize__fixed_alpha": (1.0,)}, "fixed_alpha: expected one number for each of 5"),
        ({"lora__rank": 0}, "config.lora.rank"),
        ({"rollout__batch_size": 7}, "nearest valid 6"),
        ({}, "prompts.path: expected a directory or 'embedded'; received nothing"),
    ):
        with pytest.raises(InputError, match=message):
            build.build(settings_of(config(**changes)))


def test_names_are_looked_up_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(build, "open_networks", lambda *a, **k: pytest.fail("the model was read"))
    base = {"prompts__path": "embedded", "rewards__path": "embedded"}
    with pytest.raises(
        InputError, match="model: expected a directory or a Hub name .*; received '/nowhere/at/all'"
    ):
        build.build(settings_of(config(**base, model__path="/nowhere/at/all")))
    with pytest.raises(
        InputError, match="reward: expected one of .*received 'pikscore'; did you mean 'pickscore'"
    ):
        made = config(**base, model__path="embedded", rewards__train=("ocr", "pikscore"))
        build.build(settings_of(made))
    with pytest.raises(
        InputError, match="model.path: expected a directory or 'embedded'; received nothing"
    ):
        build.build(settings_of(config(**base)))


def test_frames_that_no_reward_goes_by_are_refused_before_the_model_is_read(monkeypatch):
    monkeypatch.setattr(build, "open_networks", lambda *a, **k: pytest.fail("the model was read"))
    shipped = {f"{room}__path": "embedded_video" for room in ("model", "prompts", "rewards")}
    made = config(
        **shipped,
        prompts__sources=("things",),
        rewards__train=("geneval", "colourfulness", "motion"),
        rewards__frames="every:9",
        model__num_frames=5,
    )
    with pytest.raises(
        InputError, match="rewards.frames: expected count:3 or nothing, .*received 'every:9'$"
    ):
        build.build(settings_of(made))


def test_resolve_path(tmp_path):
    resolve_path = locations.resolve_path
    assert (resolve_path("embedded", "pipeline") / "model_index.json").is_file()
    assert resolve_path(str(tmp_path), "rewards") == tmp_path
    with pytest.raises(
        InputError, match="rewards.path: expected a directory or 'embedded'; received nothing"
    ):
        resolve_path("", "rewards")


def test_held_out_prompts_may_come_from_other_sources():
    made = config(evaluation__num_prompts=6, prompts__path="embedded", prompts__sources=("ocr",))
    assert {p.source for p in held_out_prompts(made)} == {"ocr"}
    made.evaluation.sources = ("general", "geneval")
    assert {p.source for p in held_out_prompts(made)} == {"general", "geneval"}


def test_fewer_held_out_prompts_than_sources_are_refused():
    made = config(evaluation__num_prompts=2, prompts__path="embedded")
    with pytest.raises(
        InputError,
        match="evaluation.num_prompts: expected at least 3, one for each source .*; received 2$",
    ):
        held_out_prompts(made)


def _geneval_files(folder, tags):
    (folder / "geneval").mkdir(parents=True)
    thing = [{"class": "cat", "count": 1}]
    lines = []
    for number, tag in enumerate(tags):
        lines.append(json.dumps({"prompt": f"a thing {number}", "tag": tag, "include": thing}))
    (folder / "geneval" / "test_metadata.jsonl").write_text("\n".join(lines))


def test_held_out_prompts_of_a_file_sorted_by_kind_are_of_every_kind(tmp_path):
    """6 kinds of 10 prompts one after the other: of 12 prompts, every fifth. Shuffled, the first 12 as they come."""
    kinds = [tag for tag in TAGS for _ in range(10)]
    _geneval_files(tmp_path / "sorted", kinds)
    _geneval_files(tmp_path / "mixed", kinds[::10] * 10)
    made = config(
        evaluation__num_prompts=12,
        prompts__path=str(tmp_path / "sorted"),
        prompts__sources=("geneval",),
    )
    assert [p.text for p in held_out_prompts(made)] == [f"a thing {i}" for i in range(0, 60, 5)]
    made.prompts.path = str(tmp_path / "mixed")
    assert [p.text for p in held_out_prompts(made)] == [f"a thing {i}" for i in range(12)]


@pytest.mark.parametrize(("name", "count"), [("embedded", 420), ("embedded_video", 240)])
def test_the_shipped_pipelines_evaluate_on_the_first_prompts_of_each_file(name, count):
    by_source = locations.read_prompts(name, "test")
    made = config(
        evaluation__num_prompts=count, prompts__path=name, prompts__sources=tuple(by_source)
    )
    expected = []
    for source in sorted(by_source):
        expected += by_source[source][: count // len(by_source)]
    assert held_out_prompts(made) == expected


def test_held_out_prompts_come_in_equal_shares():
    made = config(evaluation__num_prompts=10, prompts__path="embedded")
    prompts = held_out_prompts(made)
    counts = {name: sum(p.source == name for p in prompts) for name in made.prompts.sources}
    assert sorted(counts.values()) == [3, 3, 4] and len(prompts) == 10
    assert prompts == held_out_prompts(made)


def test_a_run_of_the_embedded_pipeline():
    """One real build, on the one reward without weights."""
    made = config(
        model__path="embedded",
        model__dtype="float32",
        model__height=64,
        model__width=64,
        model__max_sequence_length=12,
        prompts__path="embedded",
        rewards__path="embedded",
        rewards__train=("geneval",),
        rewards__heldout=("ocr",),
        rollout__prompts_per_step=3,
        rollout__images_per_prompt=4,
        rollout__batch_size=12,
        rollout__num_steps=4,
        training__micro_batch_size=6,
        training__timestep_fraction=0.5,
        harmonize__chunk_size=100,
        rollout_policy__schedule="delayed_linear",
        rollout_policy__delay=3,
        rollout_policy__rate=0.25,
    )
    run = build.build(settings_of(made))
    assert isinstance(run.settings, Settings)
    assert run.sizes == Sizes(12, 1, 2, 24, 4)
    assert run.collector.latent_shape == run.evaluator.latent_shape == (8, 8, 16)
    assert run.collector.scorer.names == ("geneval",) and run.evaluator.scorer.names == (
        "geneval",
        "ocr",
    )
    recipe = run.recipe
    assert recipe.harmonization.num_rewards == 1
    assert (recipe.micro_batching.size, recipe.micro_batching.chunk_size) == (6, 6)
    assert len(recipe.timesteps.sigmas) == 4 and recipe.timesteps.sigmas[0] == 1.0
    assert recipe.timesteps.num_trained == 2
    assert recipe.objective == Nft(beta=0.1, clip=5.0, kl_weight=1e-4)
    decay = recipe.averages.rollout_decay
    assert [float(decay(s)) for s in (3, 4, 5)] == [0.0, 0.25, 0.5]
    assert int(run.state.step) == 0 and set(run.train_prompts) == {"general", "geneval", "ocr"}
    cond = run.collector.encode(["a red circle", "a star", "a red circle"])
    np.testing.assert_array_equal(cond["embeds"][0], cond["embeds"][2])
    run.collector.scorer.close()
    run.evaluator.scorer.close()
    with pytest.raises(
        InputError,
        match="model.height: expected a multiple of 16 up to the model's 256 pixels; received 512 "
        r"\(nearest valid 256\)",
    ):
        made.model.height = made.model.width = 512
        build.build(settings_of(made))


def test_text_embeddings_leave_no_encoder_in_memory(tmp_path, capsys):
    """With a cache every text of a run is on disk before the transformer is loaded; the next run loads no encoder."""
    made = config(
        model__path="embedded",
        model__dtype="float32",
        model__max_sequence_length=6,
        prompts__embedding_cache=str(tmp_path),
    )
    root, family = open_model.locate(settings_of(made).model)
    texts = ["a red star", "fog", "a red star"]

    def text_embeddings():
        settings = settings_of(made)
        folder = settings.prompts.embedding_cache
        return open_model.text_embeddings(root, family, settings.model, folder, texts)

    encode = text_embeddings()
    assert "text embeddings: 2 of 2 prompts to encode" in capsys.readouterr().out
    assert not encode.loaded and len(list(tmp_path.glob("*/*.npz"))) == 2
    again = text_embeddings()
    np.testing.assert_array_equal(again(texts)["embeds"], encode(texts)["embeds"])
    assert not again.loaded and not encode.loaded and capsys.readouterr().out == ""
    made.prompts.embedding_cache = ""
    kept = text_embeddings()
    assert kept.loaded
    np.testing.assert_array_equal(kept(texts)["embeds"], encode(texts)["embeds"])


@pytest.mark.parametrize(
    ("chosen", "shared", "processes", "folder"),
    [
        ("auto", "gs://bucket/run/embeddings", 2, "gs://bucket/run/embeddings"),
        ("auto", "gs://bucket/run/embeddings", 1, locations.OWN_EMBEDDINGS),
        # A tool that opens a run has no folder to share.
        ("auto", "", 2, locations.OWN_EMBEDDINGS),
        ("/mine", "gs://bucket/run/embeddings", 2, "/mine"),
        ("", "gs://bucket/run/embeddings", 2, ""),
    ],
)
def test_hosts_share_text_embeddings_unless_told_otherwise(
    monkeypatch, chosen, shared, processes, folder
):
    monkeypatch.setattr(locations.distributed, "is_single_process", lambda: processes == 1)
    assert locations.embedding_folder(chosen, shared) == folder


def test_prompts_of_steps_that_are_done_are_not_encoded(monkeypatch):
    """Those of evaluations and the negative prompt are, at every start."""
    shipped = {f"{room}__path": "embedded" for room in ("model", "prompts", "rewards")}
    made = config(
        **shipped,
        model__height=64,
        model__width=64,
        model__max_sequence_length=12,
        prompts__embedding_cache="auto",
        rewards__train=("geneval",),
        rollout__prompts_per_step=3,
        rollout__images_per_prompt=4,
        rollout__batch_size=12,
        rollout__guidance_scale=2.0,
        rollout__negative_prompt="blurred",
        training__num_steps=3,
        training__micro_batch_size=12,
        evaluation__num_prompts=3,
    )
    asked = []

    class Asked(Exception):
        pass

    def text_embeddings(root, family, settings, folder, texts):
        asked.append((folder, texts))
        raise Asked

    monkeypatch.setattr(build, "text_embeddings", text_embeddings)
    for done in range(4):
        with pytest.raises(Asked):
            build.build(settings_of(made), done)
    evaluated = [prompt.text for prompt in held_out_prompts(made)] + ["blurred"]
    drawn = [texts[len(evaluated) :] for _, texts in asked]
    assert all(folder == locations.OWN_EMBEDDINGS for folder, _ in asked)
    assert all(texts[: len(evaluated)] == evaluated for _, texts in asked)
    # Three prompts a step, the later ones of which an earlier step may have drawn, too.
    assert drawn[3] == [] and len(drawn[2]) == 3 and set(drawn[2]) < set(drawn[1]) < set(drawn[0])


def test_ready_made_prompts_need_no_directory():
    made = config(prompts__path="generated", evaluation__num_prompts=9)
    assert {p.source for p in held_out_prompts(made)} == {"general", "ocr", "geneval"}
    assert len(locations.read_prompts("generated", "train", ("ocr",))["ocr"]) == 6000
