"""OpenCLIP itself, where it is installed.

It needs torchvision, whose CUDA build refuses to load beside a CPU torch for want of two operators that transforms do
not use. They are declared before anything (transformers is the first) imports it.
"""

import importlib.util

import pytest

if importlib.util.find_spec("torchvision") and importlib.util.find_spec("torch"):
    import torch

    DECLARED = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            DECLARED.define(
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


@pytest.fixture(scope="session")
def open_clip():
    pytest.importorskip("torch")
    if (
        importlib.util.find_spec("open_clip") is None
        or importlib.util.find_spec("torchvision") is None
    ):
        pytest.skip("open_clip and torchvision are not installed")
    import open_clip

    return open_clip
