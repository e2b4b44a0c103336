"""Every field of GRPOConfig is served, refused, or none of the loss's business; what is refused names its cure."""

import dataclasses

import pytest
from trl import GRPOConfig

from epo_kernels.defaults import BAND
from epo_kernels.integrations.trl import EPOTrainer, EPOTrainerConfig
from tests.integrations.trl.pairs import length_reward, settings

# What the loss reads, here or through TRL's batch.
SERVED = """
    loss_type epsilon epsilon_high delta beta use_bias_correction_kl entropy_coef temperature cast_lm_head_to_fp32
    num_iterations steps_per_generation gradient_accumulation_steps per_device_train_batch_size max_completion_length
    vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min vllm_importance_sampling_cap mask_truncated_completions use_vllm
    router_aux_loss_coef importance_sampling_level top_entropy_quantile off_policy_mask_threshold
    use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
    sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg
"""

# One value alone goes; or what belongs to a refused one.
REFUSED = """
    torch_compile torch_compile_backend torch_compile_mode ds3_gather_for_generation log_multimodal
"""

# Generation, rewards, data, logs, optimisation: TRL and transformers read these before the loss or after it.
# use_liger_kernel is layers alone in TRL 1.16; label smoothing isn't read by TRL's loss either.
INDIFFERENT = """
    model_init_kwargs trust_remote_code disable_dropout num_generations num_generations_eval shuffle_dataset
    pad_to_multiple_of generation_batch_size top_p top_k min_p generation_kwargs chat_template_kwargs
    repetition_penalty cache_implementation vllm_mode vllm_model_impl vllm_enable_sleep_mode
    vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
    vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size reward_weights
    multi_objective_aggregation scale_rewards sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
    max_tool_calling_iterations log_completions num_completions_to_print log_unique_prompts log_completions_hub_repo
    use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
    accelerator_config adam_beta1 adam_beta2 adam_epsilon auto_find_batch_size average_tokens_across_devices
    batch_eval_metrics bf16 bf16_full_eval data_seed dataloader_drop_last dataloader_in_order
    dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
    ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval do_predict do_train enable_jit_checkpoint
    eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy
    eval_use_gather_object fp16 fp16_full_eval fsdp fsdp_config full_determinism gradient_checkpointing
    gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision
    hub_strategy hub_token ignore_data_skip include_for_metrics include_num_input_tokens_seen label_names
    label_smoothing_factor learning_rate length_column_name liger_kernel_config load_best_model_at_end local_rank
    log_level log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_steps
    logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps metric_for_best_model
    neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules output_dir parallelism_config
    per_device_eval_batch_size prediction_loss_only project push_to_hub remove_unused_columns report_to
    restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node save_only_model
    save_steps save_strategy save_total_limit seed skip_memory_metrics tf32 torch_empty_cache_steps
    trackio_bucket_id trackio_space_id trackio_static_space_id train_sampling_strategy use_cache use_cpu
    use_liger_kernel warmup_steps weight_decay
"""


def test_the_band_has_the_defaults_of_driver_and_verl(tmp_path):
    args = EPOTrainerConfig(**settings(tmp_path))
    named = {
        name: getattr(args, "entropy_coef" if name == "entropy_coeff" else name) for name in dataclasses.asdict(BAND)
    }
    assert named == dataclasses.asdict(BAND)


def test_every_field_is_known():
    known = [*SERVED.split(), *REFUSED.split(), *INDIFFERENT.split()]
    assert len(known) == len(set(known))
    assert set(known) == {field.name for field in dataclasses.fields(GRPOConfig)}


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, bnpo, .* got 'ppo'"),
        ({"importance_sampling_level": "turn"}, "importance_sampling_level must be one of token, sequence"),
        ({"delta": 1.0}, "delta must be above 1.*delta=None"),
        ({"top_entropy_quantile": 0.2, "band_scope": "segment"}, "band_scope must be 'token'.*band_scope='token'"),
        ({"use_adaptive_entropy": True, "entropy_coef_min": 2.0}, "entropy_coef_min must be at most"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be .* got 0.0"),
        ({"loss_type": "vespo", "vespo_k_pos": -1.0}, "vespo_k_pos must be .* got -1.0"),
        ({"torch_compile": True}, "torch_compile=False"),
        ({"epsilon": 1.5}, "epsilon must be .* got 1.5"),
        ({"epsilon_high": -0.1}, "epsilon_high must be .* got -0.1"),
        ({"penalty": "wall"}, "penalty must be one of none, hinge"),
        ({"penalty_alpha": -1.0}, "penalty_alpha must be"),
        ({"band_scope": "turn"}, "band_scope must be one of token, segment"),
        ({"band_low": 3.0}, "low <= high"),
        ({"history_scope": "task"}, "scope must be one of turn, global"),
        ({"history_weighting": "step mean"}, "weighting must be one of token, step"),
        ({"history_window": 0}, "window must be an int of at least 1"),
        ({"phase_schedule": "cosine"}, "schedule must be one of constant, paper, official"),
        ({"phase_horizon": -3}, "total_steps must be at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals(tmp_path, changes, cure):
    with pytest.raises(ValueError, match=cure):
        EPOTrainerConfig(**settings(tmp_path, **changes))


def test_a_field_set_later_is_checked_too(folder, tmp_path):
    args = EPOTrainerConfig(**settings(tmp_path))
    args.loss_type = "ppo"
    with pytest.raises(ValueError, match="loss_type"):
        EPOTrainer(folder, length_reward, args)


def test_trls_own_config_is_refused(folder, tmp_path):
    with pytest.raises(TypeError, match=r"EPOTrainerConfig .* got GRPOConfig"):
        EPOTrainer(folder, length_reward, GRPOConfig(**settings(tmp_path)))


def test_the_defaults_are_the_papers():
    args = EPOTrainerConfig("EPO", bf16=False, use_cpu=True)
    assert (args.penalty, args.entropy_coef, args.band_low, args.band_high) == ("hinge", 1e-3, 0.0, 2.0)


def test_the_command_line_knows_the_settings(tmp_path):
    """Scripts that parse their settings with transformers' parser, as TRL's own do, get ours."""
    from trl import TrlParser

    line = f"--output_dir {tmp_path} --penalty quadratic --band_high 1.5 --history_window 20 --bf16 False --use_cpu"
    (args,) = TrlParser(EPOTrainerConfig).parse_args_and_config(line.split())
    assert (args.penalty, args.band_high, args.history_window) == ("quadratic", 1.5, 20)
