"""The real Intel extension on a convolutional network and on an encoder without convolutions; see
`make test-ipex`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from preheat.compilation.closeness import compare
from preheat.compilation.router import Router
from preheat.compilation.targets import build_router
from preheat.config.pt2 import Pt2Config

pytestmark = pytest.mark.skipif(
    find_spec("intel_extension_for_pytorch") is None,
    reason=(
        "intel-extension-for-pytorch needs torch 2.8 and an environment of its own: make test-ipex"
    ),
)


def resnet() -> tuple[nn.Module, torch.Tensor]:
    from transformers import ResNetConfig, ResNetModel

    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2]}
    return ResNetModel(ResNetConfig(**sizes)), torch.rand(2, 3, 64, 64)


def bert() -> tuple[nn.Module, torch.Tensor]:
    from transformers import BertConfig, BertModel

    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    return BertModel(BertConfig(vocab_size=100, **sizes)), torch.randint(100, (2, 24))


def routed(module: nn.Module, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Router:
    monkeypatch.setenv("TS_IPEX_ENABLE", "true")
    return build_router("module", module, Pt2Config(), dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [resnet, bert])
def test_it_serves_what_eager_float32_gives(
    make: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, inputs = make()
    module.eval()
    with torch.inference_mode():
        expected = module(inputs).last_hidden_state
    module.to(dtype)
    router = routed(module, dtype, monkeypatch)
    assert router.backends[0].engine == "ipex" and router.channels_last is (make is resnet)
    given = inputs if inputs.dtype == torch.int64 else inputs.to(dtype)
    with torch.inference_mode():
        module(given)
        router.freeze()
        router.start_run()
        result = module(given).last_hidden_state
        module(given[:1])  # any shape: nothing is compiled
    assert router.run.engines == {"ipex"} and router.run.unwarmed == router.run.fallbacks == 0
    assert result.dtype == dtype
    assert (
        compare(result, expected).share
        < {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    )
