"""What is wrong with a machine's GPUs is said in one line, before anything is downloaded. No GPU is needed."""
import sys
import time
from contextlib import nullcontext

import pytest
import torch

from config import Config
from control import preflight, preflight_gpu
from control.preflight_gpu import check_compiler, check_gpus, try_gpus
from models import footprint
from record.provenance import hardware
from transport.process import alone

WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def config(**more):
    return Config(**dict(gpus=1, rollouts=1, teachers=1, learners=1, engine="hf", teacher_engine="hf") | more)


@WITHOUT_CUDA
def test_a_gpu_that_cannot_be_used_is_refused_in_a_process_of_its_own():
    with pytest.raises(ValueError, match=r"^--gpus 1: GPU 0 cannot be used: .+; torch \S+ is built (with|for).+driver"
                                         r".+\(--gpus 0 runs on the CPU\)$"):
        check_gpus(config())
    assert not torch.cuda.is_initialized()


def test_without_gpus_no_process_is_started(monkeypatch):
    monkeypatch.setattr(preflight_gpu, "alone", None)
    check_gpus(config(gpus=0, engine="vllm"))


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors for a GPU are made on the CPU."""
    make = torch.ones
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (7, 5))
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **how: make(*shape, **how))
    return monkeypatch


def test_a_gpu_that_is_too_old_for_bf16_is_refused_and_serves_float32(fake_gpu):
    try_gpus(config(), None, "cuda:0", torch.float32)
    with pytest.raises(ValueError, match=r"GPU 0 cannot be used in bf16.+ is 7\.5,.+ 8\.0 .+--dtype float32"):
        try_gpus(config(), None, "cuda:0", torch.bfloat16)


def test_every_gpu_is_tried_and_the_wrong_one_is_named(fake_gpu):
    fake_gpu.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    try_gpus(config(gpus=3), None, "cuda:0,1,2", torch.bfloat16)

    def broken(*shape, device, **how):
        x = torch.zeros(*shape, **how) + 1
        return x * (2 if device == "cuda:2" else 1)
    fake_gpu.setattr(torch, "ones", broken)
    with pytest.raises(ValueError, match="GPU 2 cannot be used: it multiplies wrongly"):
        try_gpus(config(gpus=3), None, "cuda:0,1,2", torch.bfloat16)


def test_a_compiler_is_looked_for_where_triton_looks(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(preflight_gpu, "alone", lambda *args, **how: None)
    for flag, more in (("--engine", dict(engine="vllm")), ("--teacher-engine", dict(teacher_engine="vllm"))):
        with pytest.raises(ValueError, match=f"^{flag} vllm: no C compiler.+gcc or clang.+{flag} hf needs none"):
            check_gpus(config(**more))
    check_gpus(config())
    for name in ("cc", "gcc"):                           # Triton does not look for cc
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        with pytest.raises(ValueError, match="no C compiler") if name == "cc" else nullcontext():
            check_compiler("--engine")
    for named in ("/nowhere/cc", "ccache gcc"):          # it takes CC as it is
        monkeypatch.setenv("CC", named)
        with pytest.raises(ValueError, match=f"no C compiler was found .{named}."):
            check_compiler("--engine")
    monkeypatch.setenv("CC", sys.executable)
    check_compiler("--engine")


def test_gpus_that_do_not_answer_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(preflight_gpu, "try_gpus", sleep)
    monkeypatch.setattr(preflight_gpu, "LIMIT_S", 0.5)
    with pytest.raises(ValueError, match="--gpus 1: no answer from the GPUs within 0.5 s; torch"):
        check_gpus(config())


def sleep(cfg, data, device, dtype):
    time.sleep(60)


def test_gpus_are_tried_before_anything_is_read_or_downloaded(monkeypatch):
    class Tried(Exception):
        pass

    def tried(cfg):
        raise Tried
    monkeypatch.setattr(preflight, "check_gpus", tried)
    monkeypatch.setattr(preflight, "load_task", None)
    monkeypatch.setattr(preflight, "check_models", None)
    with pytest.raises(Tried):
        preflight.prepare(config(student="nobody/none", teacher="nobody/none", task="none.jsonl"))


def test_the_names_and_the_memory_of_gpus_come_from_nvidia_smi(monkeypatch, tmp_path):
    """CUDA in the parent would take a part of every GPU."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$1" in\n *memory.free*) echo "1000, 2000"; echo "1500, 2000";;\n'
                    ' *name*) echo "A GPU, GPU-12ab"; echo "B GPU, GPU-34cd";;\n'
                    ' *driver*) echo "580.1"; echo "580.1";;\nesac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(torch.cuda, "get_device_name", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware()["gpus"] == ["A GPU", "B GPU"]
    for visible, names in {"1": ["B GPU"], "1,0": ["B GPU", "A GPU"], "GPU-34": ["B GPU"], "": [], "0,7,1": ["A GPU"],
                           "GPU-": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert hardware()["gpus"] == names, visible
    free = footprint.free_gb()
    mib = 2 ** 20 / 1e9
    assert (free["cuda:0"], free["cuda:1"], free["gpu"]) == pytest.approx((1000 * mib, 1500 * mib, 2000 * mib))
    assert "NVIDIA driver 580.1" in preflight_gpu.installed()
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert hardware()["gpus"] == [] and "no NVIDIA driver answers" in preflight_gpu.installed()


def test_a_process_of_its_own_passes_the_line_on():
    with pytest.raises(ValueError, match="one line"):
        alone(refuse, config(), None, "cpu")


def refuse(cfg, data, device, dtype):
    raise ValueError("one line")
