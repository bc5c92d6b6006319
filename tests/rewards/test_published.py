"""The published models' folders with tiny random weights, scored from image files here and by PyTorch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from marble_jax.errors import InputError
from marble_jax.rewards import base
from marble_jax.rewards.models.aesthetic import AestheticReward
from marble_jax.rewards.models.clip_reward import FORMULAS, CLIPReward
from marble_jax.rewards.models.encoder import HPS_FILES, ClipEncoder
from marble_jax.rewards.models.imagereward import STD, ImageReward
from marble_jax.rewards.models.tokenizer import openclip_text

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch_twins as twins  # noqa: E402  (needs torch)

BF16 = {
    "pickscore": 0.02,
    "clipscore": 0.02,
    "hpsv2": 0.02,
    "aesthetic": 0.02,
    "imagereward": 0.005,
}
"""Largest error of a score in bfloat16, in units of the largest score its formula allows: factor times cosine 1 for the
CLIP scores, length of the embedding times length of the affine head for the other two."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def paths(root):
    return twins.image_files(root)


@pytest.fixture(scope="module")
def clip(root):
    return twins.write_clip(root / "clip")


@pytest.fixture(scope="module")
def references(root, paths, clip):
    """name -> (make the reward in a dtype, PyTorch's scores of the files)."""
    head = twins.write_aesthetic_head(root / "sac+logos+ava1-l14-linearMSE.pth")
    hps = twins.write_hpsv2(root / "hps", root / "tokenizer")
    blip = twins.write_imagereward(root / "imagereward", root / "bert")

    def hps_encoder(dtype):
        return ClipEncoder.load(root / "hps", dtype, root / "tokenizer", HPS_FILES)

    return {
        "pickscore": (
            lambda dtype: CLIPReward.load("pickscore", root / "clip", "pickscore", dtype),
            twins.pickscore(clip, paths, twins.PROMPTS),
        ),
        "clipscore": (
            lambda dtype: CLIPReward.load("clipscore", root / "clip", "clipscore", dtype),
            twins.clipscore(clip, paths, twins.PROMPTS),
        ),
        "hpsv2": (
            lambda dtype: CLIPReward("hpsv2", hps_encoder(dtype), "hpsv2"),
            twins.hpsv2(hps, paths, twins.PROMPTS),
        ),
        "aesthetic": (
            lambda dtype: AestheticReward.load(
                "aesthetic", root / "clip", root / "sac+logos+ava1-l14-linearMSE.pth", dtype
            ),
            twins.aesthetic(clip, head, paths),
        ),
        "imagereward": (
            lambda dtype: ImageReward.load(
                "imagereward", root / "imagereward", root / "bert", dtype
            ),
            twins.imagereward(*blip, paths, twins.PROMPTS),
        ),
    }


def scores(reward, paths, prompts=twins.PROMPTS):
    """One call an image, as they differ in size."""
    results = [
        base.score(reward, jnp.asarray(twins.read(path), jnp.float32)[None] / 255, [prompt], [{}])
        for path, prompt in zip(paths, prompts)
    ]
    assert all(result.valid.all() for result in results)
    return np.concatenate([result.values for result in results])


@pytest.mark.parametrize("name", sorted(BF16))
def test_scores_equal_pytorchs_from_the_files(references, paths, name):
    make, want = references[name]
    got = scores(make(jnp.float32), paths)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert np.ptp(want) > 0.01 * np.abs(want).max()


@pytest.mark.parametrize("name", sorted(BF16))
def test_bfloat16_stays_within_the_stated_error(references, paths, name):
    make, want = references[name]
    reward = make(jnp.bfloat16)
    if name in FORMULAS:
        unit = float(reward.formula.factor(np.exp(4.0)))
    else:  # a CLIP embedding has length 1, a layer-normed state of width D about sqrt(D)
        head = reward.params["head"]["weight"]
        unit = np.linalg.norm(head) * (1 if name == "aesthetic" else len(head) ** 0.5 / STD)
    assert 0 < abs(scores(reward, paths[:1])[0] - want[0]) < BF16[name] * unit


def test_a_batch_scores_as_its_images_do(references, paths):
    make, _ = references["imagereward"]
    reward, image = make(jnp.float32), twins.read(paths[0]).astype(np.float32) / 255
    both = base.score(reward, np.stack([image, 1 - image]), twins.PROMPTS[:2], [{}] * 2).values
    alone = base.score(reward, 1 - image[None], twins.PROMPTS[1:2], [{}]).values
    np.testing.assert_allclose(both[1:], alone, rtol=1e-4)


def test_a_pickled_folder_equals_its_safetensors(root, paths, clip):
    twins.write_clip(root / "pickled", pickled=True)
    got, want = (
        scores(CLIPReward.load("p", root / name, "clipscore"), paths[:1])
        for name in ("pickled", "clip")
    )
    np.testing.assert_array_equal(got, want)


def test_openclip_config_and_safetensors(root, paths, references):
    """The same weights as an OpenCLIP folder with its config: heads are then read, not inferred."""
    import torch
    from safetensors.torch import save_file

    folder = twins.write_clip_tokenizer(root / "openclip")
    weights = torch.load(root / "hps" / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    save_file(
        {k: v.contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors"
    )
    tower = {"layers": 2, "width": 64}
    settings = {
        "embed_dim": twins.WIDTH,
        "vision_cfg": {**tower, "image_size": twins.SIZE, "patch_size": 8},
        "text_cfg": {
            **tower,
            "context_length": twins.LENGTH,
            "vocab_size": len(twins.VOCAB),
            "heads": 1,
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    got = scores(CLIPReward.load("h", folder, "hpsv2"), paths[:1])
    np.testing.assert_allclose(got, references["hpsv2"][1][:1], rtol=1e-4)
    settings["text_cfg"]["heads"] = 4
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    assert abs(scores(CLIPReward.load("h", folder, "hpsv2"), paths[:1]) - got) > 1e-4


def test_one_tower_is_run_once_a_batch(root, clip, references, monkeypatch):
    encoder = ClipEncoder.load(root / "clip")
    calls, run = [], encoder._compiled_image_features
    monkeypatch.setattr(
        encoder,
        "_compiled_image_features",
        lambda params, pixels: calls.append(len(pixels)) or run(params, pixels),
    )
    head = root / "sac+logos+ava1-l14-linearMSE.pth"
    rewards = [
        CLIPReward("pickscore", encoder, "pickscore"),
        AestheticReward.load("aesthetic", encoder, head),
        CLIPReward("again", encoder, "pickscore"),
    ]
    images = jnp.asarray(np.random.default_rng(0).random((2, 32, 32, 3)), jnp.float32)
    shared = [base.score(reward, images, twins.PROMPTS[:2], [{}] * 2).values for reward in rewards]
    assert calls == [2]
    np.testing.assert_array_equal(shared[0], shared[2])
    base.score(CLIPReward("clipscore", encoder, "clipscore"), images, twins.PROMPTS[:2], [{}] * 2)
    assert calls == [2, 2]  # another preprocessing is another input
    other = base.score(rewards[0], 1 - images, twins.PROMPTS[:2], [{}] * 2).values
    assert calls == [2, 2, 2] and np.all(other != shared[0])
    host = np.asarray(images)  # may be written to between calls, so nothing is kept for it
    for _ in range(2):
        np.testing.assert_allclose(
            base.score(rewards[0], host, twins.PROMPTS[:2], [{}] * 2).values, shared[0]
        )
    assert len(calls) == 5


def test_openclip_text():
    assert openclip_text("a  cat &amp;amp; dog ") == "a cat & dog"
    pytest.importorskip("ftfy")
    assert openclip_text("a \u201ccat\u2019s\u201d caf\u00e9") == 'a "cat\'s" caf\u00e9'


def test_openclip_text_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    assert openclip_text("plain &lt;text&gt;") == "plain <text>"
    with pytest.raises(
        InputError, match="expected the package ftfy for prompts beyond ASCII such as 'caf"
    ):
        openclip_text("caf\u00e9 number two")


def test_scores_equal_openclips(open_clip, root, paths):
    """OpenCLIP's own model and preprocessing code in place of the twin."""
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    torch.manual_seed(7)
    model = twins.spread(
        open_clip.model.CLIP(
            embed_dim=twins.WIDTH,
            vision_cfg=dict(layers=2, width=64, patch_size=8, image_size=twins.SIZE),
            text_cfg=dict(
                context_length=twins.LENGTH,
                vocab_size=len(twins.VOCAB),
                width=64,
                heads=1,
                layers=2,
            ),
        ),
        2.0,
    )
    folder = twins.write_clip_tokenizer(root / "real_openclip")
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    transform = image_transform_v2(PreprocessCfg(size=twins.SIZE), is_train=False)
    with torch.no_grad():
        image = model.encode_image(
            torch.stack([transform(Image.open(p)) for p in paths]), normalize=True
        )
        text = model.encode_text(twins.clip_ids(twins.PROMPTS), normalize=True)
    encoder = ClipEncoder.load(folder)
    reward = CLIPReward("x", encoder, "hpsv2")
    reward.preprocess = encoder.preprocess(
        crop="round"
    )  # OpenCLIP's own transform; HPSv2.1's differs from it
    np.testing.assert_allclose(scores(reward, paths), (image * text).sum(-1).numpy(), rtol=1e-4)


def test_tokenizer_equals_openclips(open_clip, tmp_path):
    """With the published vocabulary, which open_clip carries, on the shipped and on awkward prompts."""
    import gzip

    pytest.importorskip("ftfy")
    theirs = open_clip.tokenizer.SimpleTokenizer()
    words = {
        w.replace("<start_of_text>", "<|startoftext|>").replace("<end_of_text>", "<|endoftext|>"): i
        for w, i in theirs.encoder.items()
    }
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    merges = (
        gzip.open(open_clip.tokenizer.default_bpe())
        .read()
        .decode()
        .split("\n")[1 : 49152 - 256 - 2 + 1]
    )
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    from marble_jax.rewards.models.tokenizer import load_tokenize

    ours = load_tokenize(tmp_path, 77, clean=openclip_text)
    prompts = [
        "A photo of 3 cats, isn't it?",
        "caf\u00e9 \u201cquoted\u201d",
        "x " * 100,
        "&lt;b&gt; Tab\there",
        "",
        "\u65e5\u672c \u043c\u0438\u0440 \U0001f600!",
        "it's o'clock 12:30pm #1 (best)",
    ]
    for got, want in zip(ours(prompts), theirs(prompts).numpy()):
        end = want.argmax() + 1
        np.testing.assert_array_equal(got[:end], want[:end])


def test_damaged_folders(root, tmp_path, references):
    import torch

    with pytest.raises(
        InputError, match="expected a directory of a CLIP model; received no such directory"
    ):
        ClipEncoder.load(tmp_path / "nowhere")
    with pytest.raises(
        InputError, match="expected weights of a CLIP model, one of .*; received an empty directory"
    ):
        ClipEncoder.load(tmp_path)
    with pytest.raises(
        InputError,
        match="expected ImageReward.safetensors or ImageReward.pt; received no such file",
    ):
        ImageReward.load("i", tmp_path)
    tensors = torch.load(root / "imagereward" / "ImageReward.pt", weights_only=True)

    def folder(name, change):
        (tmp_path / name).mkdir()
        for file in (root / "imagereward" / "med_config.json", root / "bert" / "vocab.txt"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        torch.save(change(dict(tensors)), tmp_path / name / "ImageReward.pt")
        return tmp_path / name

    without = "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"
    with pytest.raises(
        InputError, match=f"expected tensor '{without}'; received a file without it"
    ):
        ImageReward.load(
            "i", folder("missing", lambda t: {k: v for k, v in t.items() if k != without})
        )
    with pytest.raises(
        InputError,
        match="expected only the tensors of this config; received 'blip.itm_head.weight'",
    ):
        ImageReward.load(
            "i", folder("extra", lambda t: t | {"blip.itm_head.weight": torch.zeros(2)})
        )
    bad = "blip.visual_encoder.blocks.0.attn.qkv.weight"
    with pytest.raises(
        InputError, match=rf"'{bad}': expected shape \(384, 128\); received \(128, 384\)"
    ):
        ImageReward.load("i", folder("turned", lambda t: t | {bad: t[bad].T.contiguous()}))
    with pytest.raises(
        InputError, match="exactly the tensors mlp.layers.0.weight .*; missing: mlp.layers.4.bias"
    ):
        ImageReward.load(
            "i",
            folder("headless", lambda t: {k: v for k, v in t.items() if k != "mlp.layers.4.bias"}),
        )
