"""A prefix that is loaded layer by layer in real vLLM, each layer held back: `overlap.py MODEL kvkeep 1`; facts as JSON.

The copy of a layer ends only once the layer before it runs; an engine that waited for more than the layer at hand would
stand still until the limit.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path

from hazards import P, Run
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvkeep.engine.copies.copies import Kind
from kvkeep.telemetry import by_flat_name

LIMIT_S = 20.0


def hold_layers_back(_: object) -> None:
    """In the worker: each layer's copy waits for the layer before it."""
    half = get_kv_transfer_group().worker
    transfer = half.copies.transfers[Kind.CHUNK]
    runs = [threading.Event() for _ in transfer.shard.ranges]
    inner, waiting = transfer.scatter, half.wait_layer

    def scatter(lease, blocks, sums, layers=None):
        number = layers.start if layers is not None else 0
        assert not number or runs[number - 1].wait(LIMIT_S), f"layer {number - 1} does not run"
        return inner(lease, blocks, sums, layers)

    def wait_layer(name):
        waiting(name)
        runs[half._ranges[name]].set()

    transfer.scatter, half.wait_layer = scatter, wait_layer


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    run = Run(sys.argv[1], True, 1, load="sync", transfer_mode="layerwise", trace_path=str(folder / "trace.json"))
    cold = run.ask(P)
    run.restore()
    run.llm.collective_rpc(hold_layers_back)
    warm = run.ask(P)
    figures = by_flat_name(run.connector.figures.rows())
    run.engine.engine_core.shutdown()
    (file,) = folder.iterdir()
    spans = [one for one in json.loads(file.read_text())["traceEvents"] if one["ph"] == "X"]
    print("FACTS " + json.dumps({"cold": cold, "warm": warm, "spans": spans, "figures": figures}), flush=True)


if __name__ == "__main__":
    main()
