"""Megatron-core on a CPU over gloo.

Megatron-core speaks CUDA in a few fixed places: `device="cuda"` in tensor factories, `torch.cuda.current_device()`, streams and events,
`Tensor.cuda()` and one check of `Tensor.type()`. `install()` gives Megatron's own modules a stand-in for the name `torch` that answers
these for a CPU and passes everything else through, so nothing outside Megatron sees a difference and ordinary tensor operations cost
nothing. Pipelines, layouts, schedules and checkpoints then run the very code that a cluster runs.

Only `parallel.startup` imports this module, and only for a run on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")

_MEGATRON_MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.models.gpt",
    "megatron.core.transformer.multi_latent_attention",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.experts",
)
"""Imported before the stand-in is put in place; each pulls in what it needs."""


def _on_cpu(device: Any) -> Any:
    return _CPU if str(device).startswith("cuda") else device


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


class _Stream:
    """A CUDA stream or event on a device that finishes each operation before the next."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    wait_stream = wait_event = wait = synchronize = record = _nothing

    def record_event(self, *args: Any, **kwargs: Any) -> _Stream:
        return self

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _no_stream(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


class _Overlay(types.ModuleType):
    """A module that answers some names itself and passes all others to the module beneath."""

    def __init__(self, beneath: types.ModuleType, **answers: Any) -> None:
        super().__init__(beneath.__name__)
        self.__dict__.update(answers)
        self.__dict__["_beneath"] = beneath

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_beneath"], name)
        self.__dict__[name] = value  # later look-ups cost one dictionary access
        return value


def _torch_for_megatron() -> types.ModuleType:
    cuda = _Overlay(
        torch.cuda,
        current_device=lambda: _CPU,
        device_count=lambda: 1,
        synchronize=lambda *a, **k: None,
        empty_cache=lambda: None,
        Stream=_Stream,
        Event=_Stream,
        stream=_no_stream,
        current_stream=lambda *a: _Stream(),
        default_stream=lambda *a: _Stream(),
        get_rng_state=lambda *a, **k: torch.get_rng_state(),
        set_rng_state=lambda state, *a, **k: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        get_device_capability=lambda *a: (8, 0),
        default_generators=[torch.default_generator],
        nvtx=types.SimpleNamespace(range_push=lambda *a: None, range_pop=lambda *a: None),
    )
    factories = ("zeros", "ones", "empty", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like")
    return _Overlay(torch, cuda=cuda, **{name: _factory_on_cpu(getattr(torch, name)) for name in factories})


def _import_megatron() -> list[types.ModuleType]:
    """Import the parts of megatron-core that training uses; return every loaded module of it."""
    with _nothing_compiled(), _absent("wandb"):
        from megatron.core.jit import disable_jit_fuser

        disable_jit_fuser()
        for name in _MEGATRON_MODULES:
            module = importlib.import_module(name)
            for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
                if name in ("megatron.core.tensor_parallel", "megatron.core.optimizer", "megatron.core.distributed"):
                    with contextlib.suppress(ImportError):  # optional parts (FSDP, torch-native) need packages that may be absent
                        importlib.import_module(f"{name}.{info.name}")
    return [module for name, module in list(sys.modules.items()) if name.startswith("megatron.core") and module is not None]


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """`torch.compile` as a decorator that leaves functions alone: the compiler takes 1.5 s to import and 5-20 s in the first step."""

    def leave_alone(function: Any = None, **kwargs: Any) -> Any:
        return function if function is not None else leave_alone

    compile_, torch.compile = torch.compile, leave_alone  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


@contextlib.contextmanager
def _absent(package: str) -> Iterator[None]:
    """Importing `package` fails. For what Megatron's inference engine, unused here, imports if it is there: 0.6 s of every rank."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def _patch_megatron_without_transformer_engine() -> None:
    """Places where megatron-core 0.16.1 takes Transformer Engine or a GPU for granted."""
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    multi_latent_attention.HAVE_TE = False  # true there even when TE is absent
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    def as_host_value(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    # Megatron's own leaves split sizes as tensors when they already are on the CPU; the collectives need host values.
    token_dispatcher.maybe_move_tensor_to_cpu = as_host_value
    megatron_random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)


def _patch_tensor_methods() -> None:
    """`.cuda()` stays where it is, and `.type()` satisfies the gradient clipper's check for 'torch.cuda.FloatTensor'."""
    plain_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_as_on_cuda  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]


_installed = False


def install() -> None:
    """Make megatron-core run on the CPU in this process. Call before anything else imports megatron-core."""
    global _installed
    if _installed:
        return
    if "megatron.core.transformer" in sys.modules:
        raise RuntimeError("megatron-core was imported before the CPU backend was installed; call parallel.startup.start first")
    stand_in = _torch_for_megatron()
    for module in _import_megatron():
        if module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = stand_in
    _patch_megatron_without_transformer_engine()
    _patch_tensor_methods()
    _installed = True
