"""`python -m torture [part ...]`: runs parts, each of which writes its section of docs/torture.md.

Without parts those that take ten minutes together on two cores; TORTURE=hours makes them take so much longer.
"""

import logging
import os
import sys
import time
import warnings

import torch

from torture import page


def main(parts: list[str]) -> None:
    """Runs parts."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    times = max(1, round(float(os.environ.get("TORTURE", "0")) * 6))
    for part in parts or ("fuzz", "kill", "state", "ranks"):
        start = time.monotonic()
        # Here, for each imports much that the others do without.
        if part == "fuzz":
            from torture import fuzz

            text = fuzz.run(1000 * times)
        elif part == "kill":
            from torture import kill

            text = kill.run(2 * times)
        elif part == "state":
            from torture import state

            text = state.run()
        elif part == "ranks":
            from torture import ranks

            text = ranks.run(200 * times)
        elif part == "soak":
            from torture import soak

            text = soak.run(10_000 * times)
        elif part == "mutation":
            from torture import mutation

            text = mutation.run(60 * times)
        else:
            raise SystemExit(f"A part is one of {', '.join(page.ORDER).lower()}, got {part!r}.")
        page.put(part.title(), text, time.monotonic() - start)
        print(f"## {part.title()}\n\n{text}\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
