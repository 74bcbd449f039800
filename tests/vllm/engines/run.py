"""Runs one engine from beginning to end and writes its facts: `python run.py JOB.json`.

A job: {"scenario", "model", "keep" (kvkeep's settings, null: no kvkeep), "options" (vLLM's), "folder" (where the
adapters are), "facts" (the file to write)}. The process ends without cleaning up where "shutdown" is false.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import scenarios
from engine import Engine


def main(job: dict) -> None:
    """Asks everything that the scenario asks."""
    engine = Engine(Path(job["model"]), job["keep"], job["options"])
    folder = (Path(job["folder"]),) if "adapter" in job["scenario"] else ()
    getattr(scenarios, job["scenario"])(engine, *folder)
    engine.finish(shutdown=job["shutdown"])
    Path(job["facts"]).write_text(json.dumps(engine.facts))
    if not job["shutdown"]:
        os._exit(0)  # as if it was killed: nobody says goodbye


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
