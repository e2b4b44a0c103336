"""Driver, TRL and verl share one set of band defaults; TRL's side is in tests/integrations/trl/test_settings.py."""

from dataclasses import asdict

import epo_kernels as ek
from epo_kernels.defaults import BAND
from epo_kernels.integrations.verl_keys import EPOSettings
from epo_kernels.train.config import LossConfig

LOSS = ("entropy_coeff", "penalty", "penalty_alpha", "smooth_coeff", "band_scope")


def test_they_are_the_papers_second_version():
    loss = ek.EPOConfig(**{name: getattr(BAND, name) for name in LOSS}, kl_coeff=0.01)
    assert loss == ek.EPOConfig.paper("alfworld")
    assert (BAND.band_low, BAND.band_high, BAND.phase_schedule) == (0, 2, "paper")
    assert (BAND.history_scope, BAND.history_weighting, BAND.history_window) == ("turn", "step", None)
    assert not BAND.history_includes_current


def test_the_driver_has_them():
    loss = asdict(LossConfig())
    assert {name: loss[name] for name in asdict(BAND)} == asdict(BAND)


def test_verl_has_them():
    of_verl_itself = ("entropy_coeff", "history_includes_current")  # a key of the actor; there is no such choice
    keys = asdict(EPOSettings())
    expected = {name: value for name, value in asdict(BAND).items() if name not in of_verl_itself}
    assert {name: keys[name] for name in expected} == expected
    assert set(keys) - set(expected) == {"policy_loss", "num_turns", "turns"}
