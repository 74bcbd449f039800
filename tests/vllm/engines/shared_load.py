"""A load that fails while another request begins with the same text: `shared_load.py MODEL first|again 1`.

The disk tier is where KVKEEP_DISK_PATH says. `first` keeps P, lets its load fail, and takes P's request away before it
has computed anything again; LONG goes on. `again` is another start over the same disk. Facts as JSON.
"""

from __future__ import annotations

import json
import sys

from hazards import LONG, P, Run

from kvkeep.telemetry import by_flat_name


def main() -> None:
    run = Run(sys.argv[1], True, 1)
    if sys.argv[2] == "first":
        run.ask(P)
        run.forget()
        run.arm([0, 1])
        goes, stays = run.add(P), run.add(LONG, answer=24)
        run.step()
        run.engine.abort_request([run.internal(goes)], internal=True)
        run.finish()
        answer = run.answers[stays]
    else:
        answer = run.ask(LONG, answer=24)
    facts = {"long": answer, "stats": run.stats(), "figures": by_flat_name(run.connector.figures.rows())}
    print("FACTS " + json.dumps(facts), flush=True)
    run.engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
