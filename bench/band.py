"""The series on the entropy band, fixed before any of its runs: the benchmark, two regimes, the arms, the candidates.

The arms differ in the entropy term alone: no arm has a KL term, which the paper's settings contain. Every arm with an
entropy term gets the same number of tuning runs, on seeds from 100 on. The candidate whose sampled success on the
held-out panel is highest after training (mean over the tuning seeds) is taken, by rule and not by hand.
"""

from __future__ import annotations

SEEDS = tuple(range(10))
TUNING_SEEDS = (100, 101)
NO_TERM = "no entropy term"

# Walks of 30 rooms; a novice demonstrates, so what night means is learned from reward alone.
BENCHMARK = (
    "model.name_or_path=nano",
    "env.options.length=30",
    "env.options.spare_turns=16",
    "env.options.signs=6",
    "env.options.temptation=0.15",
    "rollout.history=0",
    "rollout.max_response_tokens=4",
    "algorithm.name=gigpo",
    "algorithm.gamma=0.95",
    "algorithm.groups=8",
    "checkpoint.every=0",
    "evaluate.panels=[iid]",
    "evaluate.decoding=[sampled]",
    "evaluate.every=0",
)
REGIMES = {
    "stable": ("optim.lr=3e-4", "steps=40", "model.warm_start.epochs=10"),
    "collapse": ("optim.lr=1e-3", "steps=40", "model.warm_start.epochs=10"),
}

_NONE = ("loss.penalty=none",)
_BAND = ("loss.history_weighting=step", "loss.history_includes_current=false")
_AROUND = ("loss.band_scope=segment", "loss.band_low=0.5", "loss.band_high=2")
_COEFFS = tuple(f"loss.entropy_coeff={value}" for value in ("3e-4", "1e-3", "3e-3"))
_TARGETS = tuple(f"loss.entropy_target={value}" for value in (0.1, 0.2, 0.3))
ARMS: dict[str, tuple[str, ...]] = {
    NO_TERM: (*_NONE, "loss.entropy_coeff=0"),
    "bonus only": _NONE,
    # The published code and the paper compare single tokens with a band from 0 to twice the history's mean.
    "published indicator": (
        "loss.penalty=indicator",
        "loss.penalty_alpha=0.05",
        "loss.phase_schedule=official",
        "loss.history_weighting=step",
        "loss.history_includes_current=true",
    ),
    "paper's hinge": ("loss.penalty=hinge", "loss.penalty_alpha=0.05", "loss.phase_schedule=paper", *_BAND),
    # A band with a lower bound, for the mean entropy of a turn.
    "restoring hinge": (
        "loss.penalty=hinge",
        "loss.penalty_alpha=2",
        "loss.phase_schedule=constant",
        *_BAND,
        *_AROUND,
    ),
    "quadratic": (
        "loss.penalty=quadratic",
        "loss.penalty_alpha=2",
        "loss.phase_schedule=constant",
        *_BAND,
        *_AROUND,
    ),
    "gate": ("loss.penalty=gate", "loss.penalty_alpha=0.1", "loss.phase_schedule=constant", *_BAND, *_AROUND),
    "target entropy": (*_NONE, "loss.entropy_coeff=0", "loss.entropy_rule=step", "loss.entropy_coeff_delta=2e-4"),
}
CANDIDATES = {arm: _TARGETS if arm == "target entropy" else _COEFFS for arm in ARMS if arm != NO_TERM}


def tuning_arm(arm: str, candidate: str) -> str:
    """Name of the arm of a tuning series that tries `candidate`."""
    return f"{arm}, {candidate.removeprefix('loss.')}"


TUNING_ARMS = {
    tuning_arm(arm, candidate): (*ARMS[arm], candidate)
    for arm, candidates in CANDIDATES.items()
    for candidate in candidates
}
