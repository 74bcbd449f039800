"""What a rank says of the adapters that vLLM loads, with vLLM's own classes; no engine is started."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from kvkeep.doors.vllm.loaded import Expected, LoadedAdapter, Resident
from kvkeep.engine.plan import LoadOp, StepPlan, Trip

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's import warns

CONFIG = SimpleNamespace()


def layer(**changed: Any) -> Any:
    import torch
    from vllm.lora.lora_weights import LoRALayerWeights

    parts = {"module_name": "q_proj", "rank": 2, "lora_alpha": 4, "scaling": 2.0}
    tensors = {"lora_a": torch.arange(8.0).reshape(2, 4), "lora_b": torch.ones(4, 2, dtype=torch.bfloat16)}
    return LoRALayerWeights(**{**parts, **tensors, **changed})


def adapter(number: int = 1, layers: dict[str, Any] | None = None, **more: Any) -> Any:
    from vllm.lora.lora_model import LoRAModel

    return LoRAModel(number, 2, layers if layers is not None else {"q_proj": layer()}, **more)


def digest(*of: Any, **more: Any) -> str:
    return digest_of_model(adapter(*of, **more))


def digest_of_model(model: Any) -> str:
    from kvkeep.doors.vllm.adapters import _named, digest_of

    parts = _named(model)
    return digest_of(parts) if parts is not None else ""


def test_all_that_an_adapter_is_counts_and_its_number_does_not():
    import torch
    from vllm.lora.lora_weights import LoRAFullModuleWeights, PackedLoRALayerWeights

    other = torch.arange(8.0).reshape(2, 4)
    other[1, 3] += 1e-6
    head = LoRAFullModuleWeights("score", torch.ones(2, 2))
    packed = PackedLoRALayerWeights(
        "qkv", 2, [4, None], [torch.ones(2, 4), None], [torch.ones(4, 2), None], [1.0, None]
    )
    found = [
        digest(1),
        digest(1, {"q_proj": layer(lora_a=other)}),
        digest(1, {"q_proj": layer(lora_a=torch.arange(8.0).reshape(4, 2))}),
        digest(1, {"q_proj": layer(lora_a=torch.arange(8.0).reshape(2, 4).view(torch.int32))}),
        digest(1, {"q_proj": layer(lora_b=torch.ones(4, 2))}),
        digest(1, {"q_proj": layer(scaling=1.0)}),
        digest(1, {"k_proj": layer()}),
        digest(1, {"q_proj": layer(), "k_proj": layer()}),
        digest(1, {"q_proj": packed}),
        digest(1, modules_to_save={"score": head}),
        digest(1, is_3d_lora_weight=True),
    ]
    assert len({*found}) == len(found)
    assert "" not in found
    assert digest(1) == digest(2)


def test_a_tensor_counts_as_it_is_read_and_not_as_it_lies_in_memory():
    import torch

    turned = torch.arange(8.0).reshape(2, 4).T.contiguous().T
    assert not turned.is_contiguous()
    assert digest(1, {"q_proj": layer(lora_a=turned)}) == digest(1)


def test_what_is_not_known_to_be_an_adapters_whole_content_has_no_digest():
    assert digest(1, {"q_proj": layer(lora_alpha=object())}) == ""


class Engine:
    """As much of an engine's rank as loads adapters: vLLM's loader, with files that are what `layers` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
        from vllm.lora.worker_manager import WorkerLoRAManager

        self.layers: dict[str, Any] = {"q_proj": layer()}
        self.more: dict[str, Any] = {}
        self.loader = WorkerLoRAManager.__new__(WorkerLoRAManager)
        self.loader.lora_config = config
        self.here: dict[int, Any] = {}
        self.loader._adapter_manager = SimpleNamespace(list_adapters=lambda: self.here)
        self.loader.files = self

    def load(self, number: int) -> str:
        from vllm.lora.request import LoRARequest

        self.here[number] = self.loader._load_adapter(LoRARequest(f"name {number}", number, "/path"))
        return digest(number, self.layers)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch):
    """Makes engines; what vLLM loads from is theirs."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    def load(loader: Any, request: Any) -> Any:
        return adapter(request.lora_int_id, loader.files.layers, **loader.files.more)

    monkeypatch.setattr(WorkerLoRAManager, "_load_adapter", load)
    return lambda config: Engine(monkeypatch, config)


def rank_of(config: Any, rank: int = 0, jobs: list[Callable[[], None]] | None = None) -> Any:
    """A rank's half; what it has done on a thread is done at once, or put into `jobs`."""
    from kvkeep.doors.vllm.adapters import RankAdapters

    def at_once(job: Callable[[], None]) -> bool:
        job()
        return True

    def queued(job: Callable[[], None]) -> bool:
        jobs.append(job)
        return True

    return RankAdapters(rank, config, at_once if jobs is None else queued)


def test_each_load_is_told_at_once_and_its_digest_when_it_is_made(engines):
    import torch

    jobs: list[Callable[[], None]] = []
    rank, engine = rank_of(CONFIG, 3, jobs), engines(CONFIG)
    assert rank.take() == ([], [])
    first = engine.load(1)
    assert rank.take() == ([LoadedAdapter(3, 1, "")], [Resident(3, frozenset({1}))])
    assert rank.take() == ([], [])
    jobs.pop()()
    assert rank.take() == ([LoadedAdapter(3, 1, first)], [])
    assert rank.take() == ([], [])
    engine.layers = {"q_proj": layer(lora_a=torch.zeros(2, 4))}
    second = engine.load(1)
    assert second != first
    rank.take()
    jobs.pop()()
    assert rank.take() == ([LoadedAdapter(3, 1, second)], [])
    del engine.here[1]
    assert rank.take() == ([], [Resident(3, frozenset())])
    assert (rank._digests, rank._loads) == ({}, {})


def test_a_digest_that_comes_after_another_load_is_not_taken_for_that_ones(engines):
    import torch

    jobs: list[Callable[[], None]] = []
    rank, engine = rank_of(CONFIG, 0, jobs), engines(CONFIG)
    engine.load(1)
    rank.take()
    engine.layers = {"q_proj": layer(lora_a=torch.zeros(2, 4))}
    second = engine.load(1)
    jobs.pop()()
    assert rank.take() == ([LoadedAdapter(0, 1, "")], [])
    jobs.pop()()
    assert rank.take() == ([LoadedAdapter(0, 1, second)], [])


def test_a_digest_that_hangs_holds_nobody_up_and_too_many_are_not_made(engines):
    from kvkeep.doors.vllm.adapters import MAX_WAITING, Background

    background, begun, let_go = Background(), threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        let_go.wait(60)

    assert background.later(hang)
    assert begun.wait(60)
    ran: list[int] = []
    taken = [background.later(partial(ran.append, number)) for number in range(MAX_WAITING + 3)]
    assert taken == [True] * MAX_WAITING + [False] * 3
    background.close()
    let_go.set()
    background._thread.join(60)
    assert not background._thread.is_alive()
    assert background._thread.daemon  # one that never comes back does not keep the process
    assert ran == []


def test_what_was_put_off_is_done_in_its_order():
    from kvkeep.doors.vllm.adapters import Background

    background, ran, end = Background(), [], threading.Event()
    for number in range(5):
        assert background.later(partial(ran.append, number))
    background.later(end.set)
    assert end.wait(60)
    assert ran == list(range(5))
    background.close()
    background._thread.join(60)


def test_a_file_that_is_written_to_later_changes_nothing_that_was_loaded(engines, tmp_path):
    """The loader of safetensors gives the file's own pages, and on a CPU vLLM computes with them."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
    from vllm.lora.lora_weights import LoRAFullModuleWeights, PackedLoRALayerWeights

    file = tmp_path / "adapter.safetensors"
    save_file({name: torch.ones(64, 64) for name in "abcdef"}, file)
    with safe_open(file, framework="pt") as opened:
        pages = {name: opened.get_tensor(name) for name in "abcdef"}
    packed = PackedLoRALayerWeights("qkv", 2, [4, None], [pages["c"], None], [pages["d"], None], [1.0, None])
    rank, engine = rank_of(CONFIG), engines(CONFIG)
    engine.layers = {"q_proj": layer(lora_a=pages["a"], lora_b=pages["b"]), "qkv": packed}
    engine.more = {"modules_to_save": {"score": LoRAFullModuleWeights("score", pages["e"], pages["f"])}}
    engine.load(1)
    loaded = rank.take()[0][-1]
    with file.open("r+b") as written:
        written.seek(file.stat().st_size // 2)
        written.write(bytes(file.stat().st_size // 2))
    assert digest_of_model(engine.here[1]) == loaded.digest


def test_loads_of_another_engine_in_the_process_are_its_own(engines):
    other_config = SimpleNamespace()
    rank, other = rank_of(CONFIG), rank_of(other_config)
    engine = engines(other_config)
    loaded = engine.load(1)
    assert rank.take() == ([], [])
    assert other.take() == ([LoadedAdapter(0, 1, ""), LoadedAdapter(0, 1, loaded)], [Resident(0, frozenset({1}))])
    del other
    gc.collect()
    engine.load(2)
    assert rank.take() == ([], [])


def test_a_load_for_what_another_adapter_computes_fails_and_no_other_does(engines):
    import torch

    rank, engine = rank_of(CONFIG), engines(CONFIG)
    right = engine.load(1)
    rank.take()
    ops = {name: LoadOp(b"boot", name, 0, 0, blocks=()) for name in ("right", "wrong", "absent", "plain")}
    plan = StepPlan(1, b"boot", loads=tuple(ops.values()), trips=tuple(Trip(9, (op, op)) for op in ops.values()))
    expected = {"right": Expected(1, (right,)), "wrong": Expected(1, ("ff",)), "absent": Expected(2, (right,))}
    assert plan.loaded == set(ops)

    def held() -> set[str]:
        checked = rank.checked(plan, expected)
        assert (checked.step, checked.boot) == (1, b"boot")
        loads = {op.request for op in checked.loads if op.boot}
        assert loads == {op.request for trip in checked.trips for op in trip.loads if op.boot}
        return loads

    assert held() == {"right", "plain"}
    engine.layers = {"q_proj": layer(lora_a=torch.zeros(2, 4))}
    engine.load(1)  # in place, after the step was planned
    assert held() == {"plain"}
    rank.take()
    assert held() == {"plain"}
    assert rank.checked(plan, {}) is plan


def test_an_engine_without_adapters_is_left_alone(engines):
    from vllm.lora.worker_manager import WorkerLoRAManager

    before = WorkerLoRAManager._load_adapter
    rank = rank_of(None)
    assert WorkerLoRAManager._load_adapter is before
    assert rank.take() == ([], [])


def test_a_request_with_an_adapter_counts_from_its_arrival_on_among_those_that_may_read_a_load():
    """What its digests begin with is decided later; a step's own load must know by then that it is shared."""
    from kvkeep.doors.vllm.chain import Requests
    from kvkeep.doors.vllm.connector import KVKeepConnector

    arrived: list[tuple[str, list[int]]] = []
    connector: Any = object.__new__(KVKeepConnector)
    connector._own_cache, connector._requests = None, Requests()
    connector.planner = SimpleNamespace(announce=lambda name, tokens: arrived.append((name, tokens)))
    request = SimpleNamespace(request_id="adapted", all_token_ids=[1, 2, 3], lora_request=SimpleNamespace())
    connector.on_new_request(request)
    assert arrived == [("adapted", [1, 2, 3])]
