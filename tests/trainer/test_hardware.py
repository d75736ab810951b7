"""Words for hardware, and what they mean on this machine."""

import pytest
import torch

from detr_exp.trainer.hardware import Hardware, cpu_has_bf16


def hardware(**changes) -> Hardware:
    settings = dict(
        device="cpu",
        amp=None,
        eval_amp=None,
        channels_last="auto",
        gradient_checkpointing=False,
        compile=False,
        threads=None,
    )
    return Hardware(**(settings | changes))


@pytest.mark.parametrize("word", [None, False, "off", "none", "false", "null"])
def test_values_for_no_mixed_precision(word):
    assert hardware(amp=word).amp_dtype is None


def test_bf16_and_channels_last_go_together_on_a_cpu():
    assert hardware(amp="bf16").memory_format is torch.channels_last
    assert hardware(amp=None).memory_format is torch.contiguous_format
    assert hardware(amp="bf16", channels_last=False).memory_format is torch.contiguous_format


def test_products_by_onednn_go_with_channels_last_and_are_told():
    assert hardware(products="onednn").memory_format is torch.channels_last
    assert hardware(products="onednn").describe().endswith("channels-last, products by oneDNN")
    assert hardware(products="onednn", channels_last=False).memory_format is torch.contiguous_format


def test_auto_uses_bf16_only_where_the_processor_multiplies_it():
    assert hardware(amp="auto").amp_dtype is (torch.bfloat16 if cpu_has_bf16() else None)


@pytest.mark.parametrize("there", [False, True])
def test_a_processor_without_bf16_is_told(monkeypatch, there):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: there)
    assert ("bf16 (not in this processor" in hardware(amp="bf16").describe()) != there
    assert "not in this processor" not in hardware(amp="auto").describe()


def test_auto_device_exists():
    torch.zeros(1, device=hardware(device="auto").torch_device)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"amp": "fp17"}, r"trainer\.hardware\.amp is 'fp17'"),
        ({"amp": "fp16"}, r"trainer\.hardware\.amp=bf16"),
        ({"products": "mkl"}, r"trainer\.hardware\.products is 'mkl'; use auto, torch or onednn"),
        ({"device": "tpu9x"}, r"trainer\.hardware\.device"),
    ],
)
def test_wrong_values_name_the_override(changes, words):
    with pytest.raises(ValueError, match=words):
        hardware(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_missing_cuda_is_reported():
    with pytest.raises(ValueError, match="no CUDA device"):
        hardware(device="cuda")
