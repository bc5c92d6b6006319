"""Settings of the network: the frozen model, its adapter, and the devices that they lie on."""

from __future__ import annotations

import dataclasses

from marble_jax.config.keys import key


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The frozen diffusion model."""

    path: str = key(
        "",
        "diffusers-layout directory, of this machine or gs:// or s3://, hub id, or 'embedded' or 'embedded_video' "
        "for a shipped tiny pipeline",
        "path",
    )
    # Of the frozen network alone: adapters, optimiser and the solve for alpha are float32 whatever is said here.
    dtype: str = key(
        "bfloat16",
        "matmul dtype of the transformer; float32 is multiplied as float32, not in TF32 or passes of bfloat16",
        "bfloat16|float32",
    )
    # The difference of two policies' velocities is what training turns on, and rounding is most of it early on.
    stream_dtype: str = key(
        "compute",
        "dtype of the token streams between layers and of the head: that of model.dtype ('compute') or "
        "float32, which makes the difference of two policies' velocities two to three times as exact "
        "beside bfloat16, and the streams twice as large",
        "compute|float32",
    )
    # How a step is computed, and nothing that it computes beyond rounding: attention, remat and unroll.
    attention: str = key(
        "auto",
        "attention implementation: cudnn is fused and needs a GPU and bfloat16, splash is fused and "
        "needs a TPU, auto takes what fits the machine (in float32 and on a CPU xla), einsum is the reference",
        "xla|cudnn|splash|auto|einsum",
        resumable=True,
    )
    remat: str = key(
        "none",
        "what the backward pass recomputes: nothing, all of a block, all but its products with weights, or "
        "all but the outputs of its dense layers and of its attention (norms and activations)",
        "none|full|dots|products",
        resumable=True,
    )
    unroll: int = key(
        1,
        "transformer blocks compiled into one iteration of the loop over them: more run faster and "
        "take longer to compile",
        ">= 1",
        resumable=True,
    )
    height: int = key(512, "height of the images", "pixels, [1, 16384]", "paper")
    width: int = key(512, "width of the images", "pixels, [1, 16384]", "paper")
    num_frames: int = key(1, "frames of a clip; an image has one", "frames, [1, 16384]")
    max_sequence_length: int = key(
        128,
        "tokens a prompt, of the text encoder that takes any number",
        "tokens, [1, 65536]",
        "paper",
    )
    embedded_guidance: float = key(
        0.0,
        "guidance scale that a guidance-distilled model takes as an input, such as 3.5; 0: none, for a "
        "model that takes none",
        "[0, 1000]",
    )
    omit_text_encoders: tuple[str, ...] = key(
        (), "text encoders left out, by component name (see the model's model_index.json)"
    )


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """The adapter that is trained."""

    rank: int = key(32, "rank of every adapter", ">= 1", "paper")
    alpha: float = key(64.0, "adapter output is scaled by alpha / rank", "(0, 1000000]", "paper")
    targets: tuple[str, ...] = key(
        (),
        "adapted modules, by the end of their diffusers name; empty: the family's attention "
        "projections",
        "-",
        "paper",
    )
    init: str = key(
        "",
        "LoRA to start from, of this rank: PEFT directory, exported folder, .safetensors file or hub "
        "id; the reference of divergence and gains stays the base model without it",
        "path",
    )


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """The devices of a run and what they split."""

    # All of them may change on resumption: a checkpoint holds whole arrays, whatever devices wrote it.
    data: int = key(
        -1,
        "devices that split the batch alone; -1, here or for one of the next two: all that are left",
        "devices",
        resumable=True,
    )
    fsdp: int = key(
        1,
        "devices that split the batch and the base weights, which are gathered layer by layer",
        "devices",
        resumable=True,
    )
    tensor: int = key(
        1,
        "devices that split heads and hidden units and work on the same samples",
        "devices",
        resumable=True,
    )
