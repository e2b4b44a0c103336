"""Draws the figure and writes the tables of entropy_control.md, from the library's own gradients.

python docs/entropy_control.py
"""

import functools
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import epo_kernels as ek

PAGE = Path(__file__).with_suffix(".md")
PICTURE = PAGE.with_suffix(".png")

MEAN = 1.0  # H̄ of the history, in nats
LOW, HIGH = 0.5, 2.0  # the band, relative to the mean
VOCABULARY = 64  # log 64 = 4.16 nats at most
STARTS, STEPS, RATE = (0.2, 3.0), 1000, 0.05  # for tokens trained by a control alone

# λ is 1 throughout, so that the push is in units of λ. The paper's β is 2 at its first step.
_BONUS = ek.EPOConfig(entropy_coeff=1.0)
CONTROLS = {
    "none": (_BONUS, 1.0),
    "indicator, α 0.1 (published code)": (replace(_BONUS, penalty="indicator"), 1.0),
    "hinge, α 0.1, β 2 (paper)": (replace(_BONUS, penalty="hinge"), 2.0),
    "gate, α 0.1": (replace(_BONUS, penalty="gate"), 1.0),
    "hinge, α 2 (restoring)": (replace(_BONUS, penalty="hinge", penalty_alpha=2.0), 1.0),
    "quadratic, α 2": (replace(_BONUS, penalty="quadratic", penalty_alpha=2.0), 1.0),
}


def pushes(entropies: Tensor, cfg: ek.EPOConfig, phase_weight: float, low: float = LOW) -> Tensor:
    """-∂loss/∂H of each entropy (N,) separately, in units of λ: if positive, the update raises it."""
    entropy = entropies[:, None].clone().requires_grad_()
    nothing = torch.zeros_like(entropies[:, None])
    lower, upper = torch.full_like(nothing, low * MEAN), torch.full_like(nothing, HIGH * MEAN)
    out = ek.epo_loss_from_log_probs(
        nothing,
        entropy,
        None,
        nothing,
        torch.ones_like(nothing, dtype=torch.bool),
        cfg,
        entropy_bounds=(lower, upper),
        penalty_weight=phase_weight,
        normalizer=1.0,
    )
    (gradient,) = torch.autograd.grad(out.loss, entropy)
    return -gradient[:, 0]


@functools.cache
def courses(cfg: ek.EPOConfig, phase_weight: float) -> Tensor:
    """(STEPS, starts) entropies of tokens trained by the control alone, by gradient descent on their logits."""
    logits = torch.stack([logits_of_entropy(start) for start in STARTS])[:, None].requires_grad_()
    lower, upper = torch.full((len(STARTS), 1), LOW * MEAN), torch.full((len(STARTS), 1), HIGH * MEAN)
    entropies = []
    for _ in range(STEPS):
        out = ek.epo_loss(
            logits,
            torch.zeros(len(STARTS), 1, dtype=torch.int64),
            None,
            torch.zeros(len(STARTS)),
            torch.ones(len(STARTS), 1, dtype=torch.bool),
            cfg,
            entropy_bounds=(lower, upper),
            penalty_weight=phase_weight,
            normalizer=1.0,
        )
        (gradient,) = torch.autograd.grad(out.loss, logits)
        with torch.no_grad():
            logits -= RATE * gradient
        entropies.append(out.entropy[:, 0])
    return torch.stack(entropies)


def logits_of_entropy(entropy: float) -> Tensor:
    """Logits (VOCABULARY,) with that entropy: one token stands out, by an amount found by bisection."""
    shape = torch.zeros(VOCABULARY)
    shape[0] = 1.0
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        _, found = ek.log_probs_and_entropy(middle * shape[None], torch.zeros(1, dtype=torch.int64))
        low, high = (middle, high) if float(found) > entropy else (low, middle)
    return low * shape


def push_table() -> str:
    points = {"below, 0.2": 0.2, "inside, 1": 1.0, "above, 2.5": 2.5, "far above, 4": 4.0}
    rows = [[f"{push:+.2f}" for push in pushes(torch.tensor([*points.values()]), *of)] for of in CONTROLS.values()]
    return _table(["control \\ entropy", *points], CONTROLS, rows)


def rest_table() -> str:
    """The steps from below up to the band, and the final entropy of a token that starts above."""
    rows = []
    for control in CONTROLS.values():
        up, down = courses(*control).unbind(dim=1)
        rows.append([str(int((up < LOW * MEAN).sum())), f"{down[-100:].mean():.2f}"])
    return _table(["control", "steps from 0.2 nats to the band", "from 3 nats, after 1,000 steps"], CONTROLS, rows)


def scope_table() -> str:
    """A turn whose mean equals the history's, token by token."""
    entropy = torch.tensor([[0.0, 0.1, 0.3, 3.6]])
    rows = []
    for scope in ("token", "segment"):
        own = entropy.clone().requires_grad_()
        out = ek.epo_loss_from_log_probs(
            torch.zeros_like(own),
            own,
            None,
            torch.zeros_like(own),
            torch.ones_like(own, dtype=torch.bool),
            replace(CONTROLS["hinge, α 2 (restoring)"][0], band_scope=scope),
            entropy_bounds=(torch.full_like(own, LOW * MEAN), torch.full_like(own, HIGH * MEAN)),
            normalizer=1.0,
        )
        rows.append([f"{-push:+.2f}" for push in torch.autograd.grad(out.loss, own)[0][0].tolist()])
    return _table(["scope \\ entropy", *(f"{value:g}" for value in entropy[0].tolist())], ("token", "segment"), rows)


def phase_table() -> str:
    rows = [[f"{ek.phase_weight(step, 150, name):.3f}" for step in (0, 37, 75, 76, 149)] for name in SCHEDULES]
    return _table(["schedule \\ step of 150", "0", "37", "75", "76", "149"], SCHEDULES, rows)


SCHEDULES = ("constant", "paper", "official")
TABLES = {"push": push_table, "rest": rest_table, "scope": scope_table, "phase": phase_table}


def written(page: str) -> str:
    """The page with its tables regenerated."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        page = re.sub(f"{begin}.*?{end}", lambda _, m=make, b=begin, e=end: f"{b}\n{m()}\n{e}", page, flags=re.DOTALL)
    return page


def draw(path: Path) -> None:
    """Left: the push as a function of the entropy. Right: the entropy of a token trained by each control alone."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    entropies = torch.linspace(0.01, 4, 800)
    for (name, control), style in zip(CONTROLS.items(), ("-", "--", "-", "-", "-", "-"), strict=True):
        (line,) = left.plot(entropies, pushes(entropies, *control), style, label=name)
        right.plot(courses(*control), style, color=line.get_color())
    left.set(xlabel="entropy of a token (nats)", ylabel="push on it, in units of λ", ylim=(-3.2, 3.6))
    right.set(xlabel="steps of gradient descent", ylabel="entropy (nats)")
    left.axhline(0, color="0.5", linewidth=0.8)
    left.axvspan(LOW * MEAN, HIGH * MEAN, color="0.92", zorder=0)
    right.axhspan(LOW * MEAN, HIGH * MEAN, color="0.92", zorder=0)
    left.legend(fontsize=8)
    left.set_title("What the entropy term does to an entropy", fontsize=10)
    right.set_title("A token that nothing else moves, from 0.2 and from 3 nats", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _table(head, names, rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join([name, *row])} |" for name, row in zip(names, rows, strict=True))])


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    draw(PICTURE)
