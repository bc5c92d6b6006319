"""Published layouts with tiny random weights, and PyTorch scorers of the same folders and image files."""

from __future__ import annotations

import json

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.models.blip.modeling_blip_text import BlipTextModel

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
SIZE, WIDTH, LENGTH = 32, 24, 12
PROMPTS = ["a cat", "a bad cab", "dad at a bat"]
LETTERS = ["a", "b", "c", "d", "t"]
VOCAB = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
HEAD_LAYERS = (0, 2, 4, 6, 7)


def image_files(folder):
    """Three PNG files, one wide, one tall by an odd margin, one small: paths in the order of PROMPTS."""
    rng, paths = np.random.default_rng(0), []
    for i, (height, width) in enumerate([(48, 75), (83, 50), (20, 20)]):
        coarse = rng.integers(0, 256, (5, 5, 3), np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16
        )
        noisy = np.clip(smooth + rng.integers(-40, 40, smooth.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{i}.png")
        Image.fromarray(noisy).save(paths[-1])
    return paths


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def spread(model, factor=4.0):
    """Larger random weights: with the default start all embeddings nearly coincide."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
            elif "logit_scale" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_clip_tokenizer(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(VOCAB)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"shortest_edge": SIZE},
                "crop_size": {"height": SIZE, "width": SIZE},
                "resample": 3,
                "image_mean": MEAN.flatten().tolist(),
                "image_std": STD.flatten().tolist(),
            }
        )
    )
    return folder


def write_clip(folder, seed=0, pickled=False):
    """A Hugging Face CLIPModel directory: config, weights, tokenizer, preprocessor_config.json."""
    torch.manual_seed(seed)
    tower = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
    )
    config = transformers.CLIPConfig(
        text_config=dict(
            tower,
            vocab_size=len(VOCAB),
            max_position_embeddings=LENGTH,
            bos_token_id=10,
            eos_token_id=11,
        ),
        vision_config=dict(tower, image_size=SIZE, patch_size=8),
        projection_dim=WIDTH,
        logit_scale_init_value=4.0,
    )
    model = spread(transformers.CLIPModel(config))
    write_clip_tokenizer(folder)
    model.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


class Block(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)}
        )

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp.c_proj(nn.functional.gelu(self.mlp.c_fc(self.ln_2(x))))


class Blocks(nn.Module):
    def __init__(self, layers, width, heads):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads, 4 * width) for _ in range(layers)])

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClipVision(nn.Module):
    def __init__(self, width, heads, layers, patch):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.1)
        self.positional_embedding = nn.Parameter(torch.randn((SIZE // patch) ** 2 + 1, width) * 0.1)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(layers, width, heads)
        self.proj = nn.Parameter(torch.randn(width, WIDTH) * 0.1)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = (
            torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
            + self.positional_embedding
        )
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """OpenCLIP's `CLIP` with its parameter names; heads are 64 wide, as the file alone does not say."""

    def __init__(self, width=64, heads=1, layers=2, patch=8):
        super().__init__()
        self.visual = OpenClipVision(width, heads, layers, patch)
        self.transformer = Blocks(layers, width, heads)
        self.token_embedding = nn.Embedding(len(VOCAB), width)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, width) * 0.1)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, WIDTH) * 0.1)
        self.logit_scale = nn.Parameter(torch.tensor(4.0))

    def encode_image(self, x):
        return self.visual(x)

    def encode_text(self, ids):
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


def write_hpsv2(folder, tokenizer_folder):
    """xswu/HPSv2 as published: one training checkpoint, nothing beside it; the tokenizer is the base model's."""
    torch.manual_seed(2)
    model = spread(OpenClip(), 2.0)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    write_clip_tokenizer(tokenizer_folder)
    return model


def mlp(width):
    widths = (width, 20, 16, 8, 4, 1)
    layers = dict(zip(map(str, HEAD_LAYERS), (nn.Linear(a, b) for a, b in zip(widths, widths[1:]))))
    return spread(nn.ModuleDict({"layers": nn.ModuleDict(layers)}))


def apply_mlp(head, x):
    for layer in head["layers"].values():
        x = layer(x)
    return x[:, 0]


def write_aesthetic_head(path):
    torch.manual_seed(3)
    head = mlp(WIDTH)
    torch.save(head.state_dict(), path)
    return head


BERT_WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "cat",
    "bad",
    "cab",
    "dad",
    "at",
    "bat",
]


def write_imagereward(folder, tokenizer_folder):
    """THUDM/ImageReward as published: ImageReward.pt and med_config.json; returns (vision, text, head) in PyTorch."""
    torch.manual_seed(4)
    width, hidden = 128, 48
    vision = spread(
        transformers.BlipVisionModel(
            transformers.BlipVisionConfig(
                hidden_size=width,
                intermediate_size=160,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=SIZE,
                patch_size=8,
                layer_norm_eps=1e-6,
                initializer_range=0.04,
            )
        ),
        2.0,
    )
    settings = dict(
        vocab_size=len(BERT_WORDS) + 2,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )
    text_config = transformers.BlipTextConfig(
        **settings,
        encoder_hidden_size=width,
        is_decoder=True,
        pad_token_id=0,
        bos_token_id=0,
        sep_token_id=3,
    )
    text = spread(BlipTextModel(text_config, add_pooling_layer=False), 3.0)
    head = mlp(hidden)
    tensors = {f"mlp.{key}": value for key, value in head.state_dict().items()}
    tensors |= {
        f"blip.text_encoder.{k}": v for k, v in text.state_dict().items() if "position_ids" not in k
    }
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    renamed = (
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("encoder.layers", "blocks"),
        ("self_attn.qkv", "attn.qkv"),
        ("self_attn.projection", "attn.proj"),
        ("layer_norm", "norm"),
        ("post_layernorm", "norm"),
    )
    for key, value in vision.state_dict().items():
        for theirs, published in renamed:
            key = key.replace(theirs, published)
        tensors[f"blip.visual_encoder.{key}"] = value
    for name, size in (("vision", width), ("text", hidden)):
        tensors |= {
            f"blip.{name}_proj.weight": torch.zeros(16, size),
            f"blip.{name}_proj.bias": torch.zeros(16),
        }
    folder.mkdir(parents=True)
    torch.save(tensors, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(
        json.dumps(settings | {"encoder_width": 768, "model_type": "bert"})
    )
    tokenizer_folder.mkdir(parents=True)
    (tokenizer_folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    return vision, text, head


def tensor(image):
    return torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)


def by_pillow(path, crop):
    """Resize to the shortest edge (Pillow, bicubic), centre crop ("floor" or torchvision's "round"), normalise."""
    image = Image.open(path).convert("RGB")
    short = min(image.size)
    width, height = (SIZE * edge // short for edge in image.size)
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    half = (lambda spare: spare // 2) if crop == "floor" else (lambda spare: int(round(spare / 2)))
    left, top = half(width - SIZE), half(height - SIZE)
    return (tensor(np.asarray(small.crop((left, top, left + SIZE, top + SIZE)))) - MEAN) / STD


def by_torch(path, method, fit):
    """Resize the float image with torch, crop (shortest) or pad (longest), normalise."""
    x = tensor(read(path))
    edges = x.shape[1:]
    if fit == "longest":
        height, width = (round(edge * SIZE / max(edges)) for edge in edges)
    else:
        height, width = (int(SIZE * edge / min(edges)) for edge in edges)
    x = nn.functional.interpolate(
        x[None], size=(height, width), mode=method, antialias=True, align_corners=False
    )[0]
    if fit == "longest":
        left, top = (SIZE - width) // 2, (SIZE - height) // 2
        x = nn.functional.pad(x, (left, SIZE - width - left, top, SIZE - height - top))
    else:
        top, left = int(round((height - SIZE) / 2)), int(round((width - SIZE) / 2))
        x = x[:, top : top + SIZE, left : left + SIZE]
    return (x - MEAN) / STD


def clip_ids(prompts):
    """Token ids by hand: letters, the last of a word marked, between start and end, filled up with the end."""
    rows = []
    for prompt in prompts:
        words = [[*word[:-1], f"{word[-1]}</w>"] for word in prompt.split()]
        row = [10, *(VOCAB.index(piece) for word in words for piece in word)][: LENGTH - 1]
        rows.append(row + [11] * (LENGTH - len(row)))
    return torch.tensor(rows)


def bert_ids(prompts):
    rows = [[2, *(BERT_WORDS.index(word) for word in prompt.split()), 3] for prompt in prompts]
    return torch.tensor([row + [0] * (35 - len(row)) for row in rows])


@torch.no_grad()
def clip_cosine(model, pixels, prompts):
    out = model(input_ids=clip_ids(prompts), pixel_values=pixels)
    return (out.image_embeds * out.text_embeds).sum(-1).numpy(), out.image_embeds


def pickscore(model, paths, prompts):
    cosine, _ = clip_cosine(model, torch.stack([by_pillow(p, "floor") for p in paths]), prompts)
    return cosine * model.logit_scale.exp().item() / 26


def clipscore(model, paths, prompts):
    cosine, _ = clip_cosine(
        model, torch.stack([by_torch(p, "bilinear", "shortest") for p in paths]), prompts
    )
    return cosine * model.logit_scale.exp().item() / 100


@torch.no_grad()
def aesthetic(model, head, paths):
    pixels = torch.stack([by_pillow(p, "floor") for p in paths])
    return apply_mlp(head, clip_cosine(model, pixels, ["a"] * len(paths))[1]).numpy()


@torch.no_grad()
def hpsv2(model, paths, prompts):
    image = model.encode_image(torch.stack([by_torch(p, "bicubic", "longest") for p in paths]))
    text = model.encode_text(clip_ids(prompts))
    return (
        (nn.functional.normalize(image, dim=-1) * nn.functional.normalize(text, dim=-1))
        .sum(-1)
        .numpy()
    )


@torch.no_grad()
def imagereward(vision, text, head, paths, prompts):
    states = vision(torch.stack([by_pillow(p, "round") for p in paths])).last_hidden_state
    ids = bert_ids(prompts)
    out = text(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        encoder_hidden_states=states,
        encoder_attention_mask=torch.ones(states.shape[:2]),
        is_decoder=False,
    ).last_hidden_state[:, 0]
    return ((apply_mlp(head, out) - 0.16717362830052426) / 1.0333394966054072).numpy()
