"""OpenCLIP itself, where it is installed; torchvision's CUDA build refuses to load beside a CPU torch for want of two
operators that its transforms do not use, so they are declared first."""
import importlib.util

import pytest


@pytest.fixture(scope="session")
def open_clip():
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("open_clip") is None or importlib.util.find_spec("torchvision") is None:
        pytest.skip("open_clip and torchvision are not installed")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip

    open_clip.declared = library  # must outlive the session
    return open_clip
