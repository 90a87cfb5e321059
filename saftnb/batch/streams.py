"""A cell's printed text as one output for each stream, progress bars as their last state.

In place of nbclient's `coalesce_streams`, whose pattern takes time quadratic in the length of a line.
"""

from collections.abc import Sequence

from nbformat import NotebookNode


def coalesced(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """All text of a stream in the place of its first piece, stdout before stderr where they meet."""
    pieces: dict[str, list[str]] = {}
    kept: list[NotebookNode] = []
    for output in outputs:
        if output["output_type"] != "stream":
            kept.append(output)
            continue
        if output["name"] not in pieces:
            kept.append(output)
        pieces.setdefault(output["name"], []).append(output["text"])
    for output in kept:
        if output["output_type"] == "stream":
            output["text"] = settled("".join(pieces[output["name"]]))
    for i in range(len(kept) - 1):
        if [one.get("name") for one in kept[i : i + 2]] == ["stderr", "stdout"]:
            kept[i : i + 2] = kept[i + 1], kept[i]
    return kept


def settled(text: str) -> str:
    """What a terminal shows in the end: of each line what follows its last carriage return."""
    return "\n".join(line[line.rfind("\r", 0, max(0, len(line) - 1)) + 1 :] for line in text.split("\n"))
