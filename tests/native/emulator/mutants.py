"""Faults planted in copies of csrc, all in one program: `python mutants.py csrc out` writes sources where each can be
chosen at run time. tests/native/test_emulated_cuda.py runs them, and wants each found by what it says here."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One statement replaced by another. symptom: a regular expression of what must be said of it."""

    name: str
    old: str
    new: str
    symptom: str
    file: str = "cuda_ring.cuh"


MUTANTS = (
    Mutant(
        "st.async in a cluster of one block",
        "    if (ranks == 1) {",
        "    if (false) {",
        "st.async is undefined in a cluster of one block",
    ),
    Mutant(
        "a tile's slot is refilled while lanes still read it",
        "            __syncwarp();  // every lane has read the tile, in both passes\n",
        "",
        "a bulk load writes .* without any order after the read",
    ),
    Mutant(
        "messages and decisions are overwritten while lanes still read them",
        "        __syncwarp();  // every lane has read messages and decision; one may send for the next row\n",
        "",
        "without any order after the read",
    ),
    Mutant(
        "the token's gradient is stored by a lane that hasn't written its vector",
        "        const int writer = token_byte / kVectorBytes % kLanes;\n",
        "        const int writer = (token_byte / kVectorBytes + 1) % kLanes;\n",
        "without any order after the write",
    ),
    Mutant(
        "nobody waits for the block's decision",
        "        wait_for_block(&shared.decided[set], parity);\n",
        "",
        "without any order after the write|that nobody has initialised",
    ),
    Mutant(
        "nobody waits for a tile",
        "            wait_for_block(&landed[cursor.slot], cursor.parity);\n",
        "",
        "without any order after the write of what the mbarrier",
    ),
    Mutant(
        "the wrong phase of a tile's mbarrier",
        "            wait_for_block(&landed[cursor.slot], cursor.parity);\n",
        "            wait_for_block(&landed[cursor.slot], cursor.parity ^ 1u);\n",
        "wrong parity",
    ),
    Mutant(
        "one set of messages instead of two",
        "        const unsigned set = turn & 1u, parity = (turn >> 1) & 1u;\n",
        "        const unsigned set = 0, parity = turn & 1u;\n",
        "without any order after the read|may miss a phase|more arrivals|before all its bytes",
    ),
    Mutant(
        "an mbarrier expects too few bytes",
        "    expect_bytes(barrier, bytes);\n",
        "    expect_bytes(barrier, bytes - 16);\n",
        "before all its bytes were there|deadlock",
    ),
    Mutant(
        "an mbarrier expects too many bytes",
        "    expect_bytes(barrier, bytes);\n",
        "    expect_bytes(barrier, bytes + 16);\n",
        "deadlock:.*mbarrier.try_wait at cuda_ring.cuh",
    ),
    Mutant(
        "an acquire of the block's scope for messages of other blocks",
        "    wait_for_cluster(&shared.exchanged[set], parity);\n",
        "    wait_for_block(&shared.exchanged[set], parity);\n",
        "scope .cta where another block arrived",
    ),
    Mutant(
        "mbarriers are not published",
        "        publish_barriers();\n",
        "",
        "fence",
    ),
    Mutant(
        "blocks send before others have initialised their mbarriers",
        "    cluster_barrier();  // every block's mbarriers must exist before any block sends\n",
        "",
        "initialis",
    ),
    Mutant(
        "a tile of more bytes than are left",
        "        const unsigned bytes = left < kTileBytes ? left : kTileBytes;\n",
        "        const unsigned bytes = kTileBytes;\n",
        "which no array and no variable covers|without any order",
    ),
    Mutant(
        "a bulk copy at an address that isn't aligned",
        "        next.from += next.stride;\n",
        "        next.from += next.stride + 4;\n",
        "all three must be multiples of 16",
    ),
    Mutant(
        "a ring that fetches one tile more than it has slots",
        "        for (int i = 0; i < args.slots; ++i) warp.fetch();\n",
        "        for (int i = 0; i <= args.slots; ++i) warp.fetch();\n",
        "more arrivals at the mbarrier",
    ),
    Mutant(
        "an edge that nobody writes back",
        "            Element::store(reinterpret_cast<Stored*>(out) + at_edge, gradient);\n",
        "",
        "leaves unwritten",
    ),
    Mutant(
        "lanes that diverge at a shuffle",
        "        if (holders) y_token = __shfl_sync(kAllLanes, y_token, __ffs(holders) - 1);\n",
        "        if (holders && lane != 31) y_token = __shfl_sync(kAllLanes, y_token, __ffs(holders) - 1);\n",
        "lanes of a warp diverge",
    ),
    Mutant(
        "sums that nobody has stored",
        "    if (leads && warp.lane < kNumSums) shared.sums[warp.lane] = sum;\n",
        "",
        "that nobody has initialised",
    ),
    Mutant(
        "a masked row that is left as it was",
        "        clear_row<Element>(target, counted ? rows.vocab_size : 0, rows.width, worker, workers);\n",
        "",
        "leaves unwritten",
    ),
    Mutant(
        "the sweeps' next row begins while the last one is still read",
        "        __syncthreads();  // the block's shared memory is free for the next row\n",
        "",
        "without any order after the read",
        "cuda_sweeps.cuh",
    ),
    Mutant(
        "the ticket is taken without a fence",
        "        __threadfence();  // releases the block's sums\n",
        "",
        "without any order after the write",
        "cuda_common.cuh",
    ),
)


def plant(source: Path, out: Path) -> None:
    """Each mutant's statement becomes a choice between it and the original."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {path.name: path.read_text() for path in source.iterdir() if path.suffix in (".cu", ".cuh", ".h")}
    choices: dict[tuple[str, str], str] = {}
    for number, mutant in enumerate(MUTANTS, start=1):
        place = mutant.file, mutant.old
        if (found := texts[mutant.file].count(mutant.old)) != 1:
            raise ValueError(f"{mutant.name}: {mutant.old!r} must stand in {mutant.file} once, it does {found} times")
        choices[place] = choice(number, choices.get(place, mutant.old), mutant.new)
    for (file, old), text in choices.items():
        texts[file] = texts[file].replace(old, text)
    declaration = "#pragma once\nnamespace emulator { bool mutated(int number); }\n"
    for name, text in texts.items():
        (out / name).write_text(text.replace("#pragma once\n", declaration, 1))


def choice(number: int, old: str, new: str) -> str:
    """C++ that does `new` where the mutant is chosen: of a condition, of definitions, or of statements."""
    old, new = (re.sub(r"//.*", "", text).strip() for text in (old, new))
    chosen = f"::emulator::mutated({number})"
    if old.startswith("if (") and old.endswith("{"):
        return f"if ({chosen} ? {new[4:-3]} : {old[4:-3]}) {{"
    if old.startswith("const "):
        values = (re.findall(r"(\w+) = ([^,;]+)", text) for text in (old, new))
        defined = ", ".join(f"{name} = {chosen} ? {b} : ({a})" for (name, a), (_, b) in zip(*values, strict=True))
        return f"{old[: old.index(defined.split()[0])]}{defined};\n"
    return f"if ({chosen}) {{ {new} }} else {{ {old} }}\n"


if __name__ == "__main__":
    plant(Path(sys.argv[1]), Path(sys.argv[2]))
