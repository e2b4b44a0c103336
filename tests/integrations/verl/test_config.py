"""The keys: the command line of docs/verl.md through verl's own config, and what is refused."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import verl
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import FSDPActorConfig, McoreActorConfig
from verl.workers.engine_workers import ActorRolloutRefWorker

import epo_kernels as ek
from epo_kernels.integrations.verl import EngineLoss
from epo_kernels.integrations.verl_keys import EPOSettings
from tests.integrations.verl.harness import actor_config, batch_of, episodes, forward_of_its_own

PAGE = Path(__file__).parents[3] / "docs" / "verl.md"
EPO = "actor_rollout_ref.actor.policy_loss.epo"
HINGE = ["actor_rollout_ref.actor.policy_loss.loss_mode=epo", f"+{EPO}.penalty=hinge"]
ENGINE = [
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
    "actor_rollout_ref.actor.entropy_coeff=0.1",
    "actor_rollout_ref.actor.optim.total_training_steps=10",  # as the trainer sets it
]


def composed(overrides):
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(config_dir=str(folder), version_base=None):
        return compose("ppo_trainer", overrides=overrides)


def actor_of(overrides):
    return omega_conf_to_dataclass(composed([*ENGINE, *overrides]).actor_rollout_ref.actor)


def overrides_of_the_page():
    """What the page's command line says after `python -m verl.trainer.main_ppo`, and its environment variable."""
    block = re.search(r"```\n(export VERL_USE_EXTERNAL_MODULES=.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    export, command = block.split("\n", 1)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    return shlex.split(export, comments=True)[1], words[3:]


def test_the_command_line_of_the_page_trains(model_path, tmp_path):
    """Its overrides through verl's config into verl's actor worker, with the model and the sizes of a test."""
    export, overrides = overrides_of_the_page()
    assert export == "VERL_USE_EXTERNAL_MODULES=epo_kernels.integrations.verl"
    small = [
        f"actor_rollout_ref.model.path={model_path}",
        "+actor_rollout_ref.model.load_tokenizer=false",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
        "actor_rollout_ref.actor.optim.total_training_steps=10",
        "actor_rollout_ref.actor.optim.lr=0.001",
    ]
    worker = ActorRolloutRefWorker(composed([*overrides, *small]).actor_rollout_ref, role="actor")
    with forward_of_its_own(worker):
        worker.init_model()
    steps = []
    for _ in range(2):
        output = worker.update_actor(batch_of(episodes()))
        steps.append({name: values[0] for name, values in tensordict_utils.get(output, "metrics").items()})
    assert steps[0]["epo/band_low_share"] == steps[0]["epo/band_high_share"] == 0  # nothing is known yet
    assert steps[1]["actor/entropy_loss"] != steps[0]["actor/entropy_loss"]  # it learns
    worker.save_checkpoint(str(tmp_path))
    saved = torch.load(tmp_path / "epo_entropy_history.pt", weights_only=True)
    assert saved["num_turns"] == 30
    assert saved["num_steps"] == 2


def test_the_pages_way_into_a_running_ray_cluster():
    (override,) = re.findall(r"`(\+ray_kwargs\S+)`", PAGE.read_text())
    environment = composed([override]).ray_kwargs.ray_init.runtime_env.env_vars
    assert environment == {"VERL_USE_EXTERNAL_MODULES": "epo_kernels.integrations.verl"}


def test_the_page_names_every_key_and_no_other():
    keys = re.search(r"under `policy_loss\.epo`: (.*?)\.\s", PAGE.read_text(), re.DOTALL).group(1)
    assert re.findall(r"`(\w+)`", keys) == list(EPOSettings.__dataclass_fields__)


def test_the_pages_settings_of_the_paper():
    words = re.search(r"for ScienceWorld add\s+`(.*?)`", PAGE.read_text(), re.DOTALL).group(1).split()
    overrides = [f"+{EPO}.{word}" for word in words]
    verls = ["entropy_coeff=0.001", "use_kl_loss=true", "kl_loss_coef=0.01"]
    actor = actor_of([HINGE[0], *overrides, *(f"actor_rollout_ref.actor.{word}" for word in verls)])
    settings = EPOSettings.of(actor.policy_loss.epo)
    assert settings.loss_config(actor, actor.loss_agg_mode) == ek.EPOConfig.paper("scienceworld")
    assert (settings.band_low, settings.band_high) == (0, 2)
    assert (settings.history_weighting, settings.phase_schedule) == ("step", "paper")


@pytest.mark.parametrize(("engine", "kind"), [("dp", FSDPActorConfig), ("megatron", McoreActorConfig)])
def test_the_keys_arrive_for_every_engine(engine, kind):
    actor = actor_of([f"model_engine={engine}", *HINGE, f"+{EPO}.band_low=0.5", f"+{EPO}.history_window=4"])
    assert isinstance(actor, kind)
    settings = EngineLoss(actor).settings
    assert (settings.penalty, settings.band_low, settings.history_window) == ("hinge", 0.5, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*HINGE, f"+{EPO}.penalty_alhpa=2"], "epo.penalty_alhpa is no key of EPO; did you mean 'penalty_alpha'"),
        ([*HINGE, f"+{EPO}.xyz=2"], "epo.xyz is no key of EPO; known: policy_loss, penalty"),
        ([*HINGE[:1], f"+{EPO}.penalty=hing"], "penalty must be one of none, hinge"),
        ([*HINGE, f"+{EPO}.policy_loss=gspi"], "policy_loss must be one of vanilla, dppo_tv, .* got 'gspi'"),
        (
            [*HINGE, f"+{EPO}.policy_loss=kl_cov", "actor_rollout_ref.actor.policy_loss.kl_cov_ratio=2.0"],
            r"policy_loss.kl_cov_ratio must be in \(0, 1\], got 2.0",
        ),
        ([*HINGE, f"+{EPO}.band_low=3"], "low and high must satisfy"),
        ([*HINGE, f"+{EPO}.num_turns=0"], "num_turns must be an int of at least 1"),
        ([*HINGE, f"+{EPO}.phase_schedule=cosine"], "schedule must be one of"),
        (HINGE[1:], "epo is set, but not used: .*loss_mode is 'vanilla', it must be 'epo'"),
    ],
)
def test_bad_keys_are_refused_where_verl_checks_its_config(overrides, message):
    with pytest.raises(InstantiationException, match=message):
        actor_of(overrides)


def test_what_cannot_be_served_names_verls_key():
    with pytest.raises(ValueError, match=r"set entropy_coeff \(.*\), or .*epo\.penalty=none"):
        EngineLoss(actor_config())
    EngineLoss(actor_config(epo={"penalty": "none"}))
    with pytest.raises(ValueError, match=r"kl_loss_type must be one of kl, .* got 'k3\+'"):
        EngineLoss(actor_config(epo={"penalty": "none"}, use_kl_loss=True, kl_loss_type="k3+"))
    actor = actor_config(entropy_coeff=0.1)  # phase_schedule=paper by default
    actor.optim._mutable_fields.add("total_training_steps")
    actor.optim.total_training_steps = -1
    with pytest.raises(ValueError, match="phase_horizon must be set"):
        EngineLoss(actor)
