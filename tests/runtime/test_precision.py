"""What `--amp` means on each device, decided without one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from runtime.precision import Precision, _warn_of_emulation, choose_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_without_amp_it_is_fp32_everywhere() -> None:
    for device in (CPU, GPU):
        assert choose_precision(False, "auto", device) == Precision(device, None)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_a_named_format_is_taken_as_asked(
    name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.precision.bf16_gradients_are_sound", lambda: True)
    assert choose_precision(True, name, device) == Precision(device, dtype)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_a_gpu_is_bf16_where_it_computes_in_it(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert choose_precision(True, "auto", GPU) == Precision(GPU, dtype)
    assert asked == [False], "emulated bf16 is slower than fp32"


@pytest.mark.parametrize(
    ("has_onednn", "native", "is_sound", "dtype"),
    [
        (True, True, True, torch.bfloat16),
        (True, True, False, None),
        (True, False, True, None),
        (False, True, True, None),
    ],
)
def test_auto_on_a_cpu_is_bf16_or_fp32_with_a_note(
    has_onednn: bool, native: bool, is_sound: bool, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    monkeypatch.setattr("runtime.precision.bf16_gradients_are_sound", lambda: is_sound)
    chosen = choose_precision(True, "auto", CPU)
    assert (chosen.device, chosen.dtype) == (CPU, dtype)
    assert ("computing in fp32" in chosen.note) is (dtype is None)
    assert ("wrong gradients" in chosen.note) is not is_sound


@pytest.mark.parametrize(("name", "factor"), [("bf16", 500), ("fp16", 350)])
@pytest.mark.parametrize("native", [True, False])
def test_a_format_that_a_cpu_emulates_is_warned_of_once(
    name: str, factor: int, native: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"bf16": "fp16", "fp16": "bf16"}[name]
    monkeypatch.setattr(f"runtime.precision.cpu_computes_{name}", lambda: native)
    monkeypatch.setattr(f"runtime.precision.cpu_computes_{other}", lambda: not native)
    monkeypatch.setattr("runtime.precision.bf16_gradients_are_sound", lambda: True)
    _warn_of_emulation.cache_clear()
    for device, amp in ((CPU, True), (CPU, True), (GPU, True), (CPU, False)):
        choose_precision(amp, name, device)
    warning = (
        f"warning: --amp_dtype {name}: this CPU has no {name} arithmetic and emulates it, about {factor} times slower "
        "than fp32; use --amp_dtype auto\n"
    )
    assert capsys.readouterr().err == ("" if native else warning)


def test_bf16_by_name_warns_of_wrong_gradients_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.precision.bf16_gradients_are_sound", lambda: False)
    assert "wrong gradients" in choose_precision(True, "bf16", CPU).note
    assert choose_precision(True, "bf16", GPU).note == ""


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_format_and_keeps_weights(dtype: torch.dtype | None) -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with Precision(CPU, dtype).autocast():
        assert layer(x).dtype == (dtype or torch.float32)
    assert layer.weight.dtype == torch.float32
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "scales"), [(None, False), (torch.bfloat16, False), (torch.float16, True)])
def test_only_fp16_needs_a_scaler(dtype: torch.dtype | None, scales: bool) -> None:
    scaler = Precision(CPU, dtype).make_scaler()
    assert scaler.is_enabled() is scales
    loss = torch.tensor(2.0)
    assert (scaler.scale(loss).item() > 2.0) is scales
    assert scaler._device == "cpu"
