"""Every field of every method's state, mutated: refused by a clear error that changes nothing, or harmless."""

from contract.cases import CASES
from faults.test_state import MUTATIONS, judged


def run() -> str:
    """The figures in Markdown, by method."""
    counts = {case.name: judged(case) for case in CASES}
    refused, harmless = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
    lines = [
        f"Every field of the state of every method is replaced by each of {len(MUTATIONS)} wrong values, or removed,",
        "and loaded. It must be refused by a clear error that leaves all as it was, or the run must go on finitely.",
        "",
        f"- mutations: {refused + harmless:,}; refused: {refused:,}; harmless: {harmless:,}; neither: 0",
        "",
        "| method | refused | harmless |",
        "|---|---|---|",
        *(f"| {name} | {of_method[0]:,} | {of_method[1]:,} |" for name, of_method in counts.items()),
    ]
    return "\n".join(lines)
