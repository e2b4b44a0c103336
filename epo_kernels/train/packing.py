"""Packing: several sequences in one row of tokens, with a shared prompt stored only once.

Episodes of a group start alike: their first prompts are equal, and so are later ones as long as the episodes take the
same path. A row then contains the prompt once, followed by the responses, each of which attends to the prompt and to
itself::

    row       p0 p1 p2  a0 a1  b0  |  q0 q1  c0 c1
    position   0  1  2   3  4   3  |   0  1   2  3
    branch     0  0  0   1  1   2  |   0  0   1  1
    block      0  0  0   0  0   0  |   1  1   1  1

A token attends to earlier tokens in its block whose branch is 0 or its own. Hidden states equal those of each sequence
on its own, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Sequences = Sequence[tuple[list[int], list[int]]]  # (prompt, response) token ids


@dataclass
class Row:
    """A row of tokens. The last token of a response predicts nothing and is not included.

    Attributes:
        ids, positions, blocks, branches: one entry per token.
        places: for each sequence, the row positions of the tokens that predict its response.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)
    prompt: list[int] | None = None  # of the last block
    prompt_end: int = 0

    def added_length(self, prompt: list[int], response: list[int]) -> int:
        """Number of tokens that a sequence would add."""
        return len(response) - 1 + (0 if prompt == self.prompt else len(prompt))

    def append(self, prompt: list[int], response: list[int]) -> None:
        if prompt != self.prompt:
            self._append(prompt, 0, self.blocks[-1] + 1 if self.blocks else 0, 0)
            self.prompt, self.prompt_end = prompt, len(self.ids)
        start = len(self.ids)
        self._append(response[:-1], len(prompt), self.blocks[-1], self.branches[-1] + 1)
        self.places.append([self.prompt_end - 1, *range(start, len(self.ids))])

    def _append(self, ids: list[int], position: int, block: int, branch: int) -> None:
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.blocks += [block] * len(ids)
        self.branches += [branch] * len(ids)


def lay_out(sequences: Sequences, width: int | None) -> list[Row]:
    """Rows of at most `width` tokens with the sequences in order; None: one row per sequence."""
    rows: list[Row] = []
    for prompt, response in sequences:
        if not rows or width is None or len(rows[-1].ids) + rows[-1].added_length(prompt, response) > width:
            rows.append(Row())
        rows[-1].append(prompt, response)
    return rows


def pack(sequences: Sequences, width: int) -> list[list[int]]:
    """Indices of the sequences, row by row, in an order that `lay_out` turns into no more rows than that.

    First-fit decreasing: sequences with the same prompt form a block, as long as it fits a row. Each block, longest
    first, goes into the first row with enough room.
    """
    shared: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, _) in enumerate(sequences):
        shared.setdefault(tuple(prompt), []).append(index)
    blocks: list[tuple[int, list[int]]] = []  # tokens, members
    for members in shared.values():
        prompt_length = len(sequences[members[0]][0])
        blocks.append((prompt_length, []))
        for index in members:
            added = len(sequences[index][1]) - 1
            if blocks[-1][1] and blocks[-1][0] + added > width:
                blocks.append((prompt_length, []))
            length, chosen = blocks[-1]
            blocks[-1] = length + added, [*chosen, index]
    rows: list[list[int]] = []
    room: list[int] = []
    for length, members in sorted(blocks, key=lambda block: (-block[0], block[1][0])):
        row = next((number for number, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row] += members
        room[row] -= length
    return rows


def visibility(rows: Sequence[Row], width: int) -> Tensor:
    """(rows, 1, width, width) bool: whether the row token attends to the column token. Padding attends to padding."""
    blocks, branches = (torch.zeros(len(rows), width, dtype=torch.int32) for _ in range(2))
    blocks -= 1
    for number, row in enumerate(rows):
        blocks[number, : len(row.ids)] = torch.tensor(row.blocks, dtype=torch.int32)
        branches[number, : len(row.ids)] = torch.tensor(row.branches, dtype=torch.int32)
    same_block = blocks[:, :, None] == blocks[:, None, :]
    on_the_way = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    return (same_block & on_the_way).tril()[:, None]
