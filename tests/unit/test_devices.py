"""A worker takes its GPU, or says which is missing; it never trains on the CPU instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from starcoder_trainer.devices import take_device
from starcoder_trainer.failures import ConfigurationError, DeviceMissingError, classify


def cuda(monkeypatch: pytest.MonkeyPatch, devices: int) -> list[int]:
    """torch finds so many. Returns where the one that was taken is told."""
    taken: list[int] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def device_files(dev: Path, *names: str) -> Path:
    for name in names:
        (dev / name).touch()
    return dev


def test_a_worker_takes_the_device_of_its_place_in_the_pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = cuda(monkeypatch, 8)
    assert take_device(7, tmp_path, {}) == "nccl"
    assert taken == [7]


def test_a_device_that_was_lost_is_no_error_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda(monkeypatch, 7)
    dev = device_files(tmp_path, *(f"nvidia{i}" for i in range(8)))
    with pytest.raises(DeviceMissingError, match="found 7 CUDA devices in this Pod, expected at least 8") as found:
        take_device(7, dev, {})
    assert classify(found.value) == "DeviceError"


@pytest.mark.parametrize("environ", [{}, {"CUDA_VISIBLE_DEVICES": "0,1"}])
def test_fewer_devices_than_workers_are_the_users_error_where_all_that_were_given_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environ: dict[str, str]
) -> None:
    cuda(monkeypatch, 2)
    dev = device_files(tmp_path, *(f"nvidia{i}" for i in range(8 if environ else 2)))
    with pytest.raises(ConfigurationError, match=r"found 2 .*, expected at least 3 \(workers.gpusPerWorker\)"):
        take_device(2, dev, environ)


def test_where_the_only_gpu_can_not_be_used_nothing_trains_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda(monkeypatch, 0)
    dev = device_files(tmp_path, "nvidia0", "nvidiactl", "nvidia-uvm")
    with pytest.raises(DeviceMissingError, match=r"found .*/nvidia0, and torch .* can use none"):
        take_device(0, dev, {})


@pytest.mark.parametrize("named", ["0,1", "GPU-5c1b2a63-7d4e-1f0a-9b3c-2e8d6f7a9c10", "MIG-1"])
def test_where_no_gpu_of_those_allotted_was_injected_nothing_trains_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str
) -> None:
    cuda(monkeypatch, 0)
    with pytest.raises(DeviceMissingError, match=rf"VISIBLE_DEVICES={named}, .*workers\.runtimeClassName") as found:
        take_device(0, device_files(tmp_path, "nvidiactl"), {"NVIDIA_VISIBLE_DEVICES": named})
    assert classify(found.value) == "DeviceError"


@pytest.mark.parametrize(
    ("files", "environ", "built_for"),
    [
        ((), {}, "13.0"),
        (("nvidiactl", "nvidia-uvm"), {}, "13.0"),
        (("nvidia0",), {"CUDA_VISIBLE_DEVICES": "-1"}, "13.0"),
        (("nvidia0",), {"CUDA_VISIBLE_DEVICES": ""}, "13.0"),
        (("nvidia0",), {}, None),
        ((), {"NVIDIA_VISIBLE_DEVICES": "void"}, "13.0"),
        ((), {"NVIDIA_VISIBLE_DEVICES": "all"}, "13.0"),
        ((), {"NVIDIA_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "-1"}, "13.0"),
        ((), {"NVIDIA_VISIBLE_DEVICES": "0,1"}, None),
    ],
)
def test_the_cpu_is_taken_where_no_gpu_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: tuple[str, ...], environ: dict[str, str], built_for: str
) -> None:
    cuda(monkeypatch, 0)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    assert take_device(0, device_files(tmp_path, *files), environ) == "gloo"
