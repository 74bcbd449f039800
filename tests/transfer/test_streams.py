"""The streams of a CUDA device, with torch's streams and events played: what is launched in which order, what is waited for."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from kvkeep.transfer.device.streams import CudaStream


class Played:
    """torch.cuda as far as a stream uses it; `said` is what happened."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.inside = "compute"
        outer = self

        class Stream:
            def __init__(self, _device: object = None, name: str = "ours") -> None:
                self.name = name

            def wait_event(self, event: Event) -> None:
                outer.said.append(f"{self.name} waits for {event.at}")

            def synchronize(self) -> None:
                outer.said.append(f"{self.name} is waited for")

        class Event:
            at = "nothing"

            def __init__(self, blocking: bool = False) -> None:
                self.blocking = blocking

            def record(self, stream: Stream) -> None:
                self.at = stream.name

            def query(self) -> bool:
                return False

            def synchronize(self) -> None:
                outer.said.append(f"an event of {self.at} is waited for")

        @contextmanager
        def within(stream: Stream):
            outer.inside, before = stream.name, outer.inside
            yield
            outer.inside = before

        self.Stream, self.Event, self.stream = Stream, Event, within
        self.current_stream = lambda _device: Stream(name=outer.inside)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    one = Played()
    for name in ("Stream", "Event", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(one, name))
    return one


def test_a_batch_runs_behind_the_compute_stream_which_waits_for_it_only_where_it_is_ordered(played: Played):
    event = CudaStream(torch.device("cpu")).run(lambda: played.said.append(f"copies on {played.inside}"))
    assert played.said == ["ours waits for compute", "copies on ours"]
    assert not event.done()
    event.order()
    event.wait()
    assert played.said[2:] == ["compute waits for ours", "an event of ours is waited for"]


def test_what_was_launched_before_a_launch_failed_is_over_before_anybody_knows(played: Played):
    def start() -> None:
        played.said.append("the first part")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        CudaStream(torch.device("cpu")).run(start)
    assert played.said == ["ours waits for compute", "the first part", "ours is waited for"]
