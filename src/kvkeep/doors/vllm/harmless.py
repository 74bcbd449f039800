"""The settings of vLLM 0.32 that cannot change a byte of KV, each with the reason: data that people have reviewed.

A name stands for itself and all below it. What is not here is in the identity. Batches differ from step to step in any
engine, and with them how results are rounded: vLLM's own prefix cache allows that, and "batches" means it here.
"""

from __future__ import annotations


def _by_name(groups: dict[str, str]) -> dict[str, str]:
    """Reasons by the names of their group's text."""
    return {name: reason for reason, names in groups.items() for name in names.split()}


NAMES = _by_name(
    {
        "another field of the identity has it": """
            model_config.model model_config.revision model_config.quantization model_config.dtype
            load_config.load_format cache_config.cache_dtype cache_config.kv_cache_layout
            parallel_config.pipeline_parallel_size parallel_config.tensor_parallel_size
            parallel_config.decode_context_parallel_size""",
        "the fingerprints of weights and files are of what was loaded, or hold for one start": """
            model_config.model_weights load_config.model_loader_extra_config load_config.download_dir
            load_config.device load_config.pt_load_map_location
            model_config._hf_config_revision model_config.config_updated""",
        "how weights are read, not which": """
            load_config.safetensors_load_strategy load_config.safetensors_prefetch_num_threads
            load_config.safetensors_prefetch_block_size load_config.use_tqdm_on_load
            parallel_config.max_parallel_loading_workers parallel_config.enable_ep_weight_filter""",
        "hf_config has what came of it": """
            model_config.hf_overrides model_config.hf_config_path model_config.config_format""",
        "made of quantization, quantization_config, hf_config and the folder's files, which are all in": "quant_config",
        "follows from the architecture": "model_config._model_info",
        "how long a text may be; where that changes RoPE the identity has max_model_len": """
            model_config.max_model_len model_config.original_max_model_len model_config.spec_target_max_model_len""",
        "from text to tokens, which are in the key": """
            model_config.tokenizer model_config.tokenizer_mode model_config.tokenizer_revision
            model_config.skip_tokenizer_init model_config.renderer_num_workers model_config.io_processor_plugin""",
        "sampling and output, after the KV": """
            model_config.seed model_config.return_sampling_mask model_config.max_logprobs model_config.logprobs_mode
            model_config.use_fp64_gumbel model_config.enable_trace_replay model_config.generation_config
            model_config.override_generation_config model_config.logits_processors model_config.pooler_config
            parallel_config.enable_batch_sharded_sampling structured_outputs_config reasoning_config
            watermark_config aux_output_config""",
        "what requests may ask for, and who may ask": """
            model_config.allowed_local_media_path model_config.allowed_media_domains model_config.hf_token
            model_config.enable_prompt_embeds model_config.served_model_name
            model_config.allow_deprecated_quantization
            model_config.multimodal_config.limit_per_prompt model_config.multimodal_config.enable_mm_embeds""",
        "the compilation's mode and its graphs' are in": "model_config.enforce_eager",
        "sleep and memory": """
            model_config.enable_sleep_mode model_config.sleep_preserve_parameter_names model_config.sleep_mode_backend
            model_config.sleep_mode_offload_cudagraph model_config.enable_nccl_comm_suspend
            model_config.enable_cumem_allocator""",
        "caches and transport of images, and what fits": """
            model_config.multimodal_config.mm_processor_cache_gb model_config.multimodal_config.mm_processor_cache_type
            model_config.multimodal_config.mm_shm_cache_max_object_size_mb
            model_config.multimodal_config.skip_mm_profiling model_config.multimodal_config.mm_tensor_ipc
            model_config.multimodal_config.mm_ipc_gpu_memory_gb
            model_config.multimodal_config.mm_encoder_fp8_scale_save_path
            model_config.multimodal_config.mm_encoder_fp8_scale_save_margin
            parallel_config.enable_shm_tensor_arena ec_manager_config""",
        "how much room the cache has": """
            cache_config.gpu_memory_utilization cache_config.num_gpu_blocks cache_config.num_cpu_blocks
            cache_config.num_gpu_blocks_override cache_config.kv_cache_memory_bytes cache_config.kv_cache_size_tokens
            cache_config.kv_cache_max_concurrency cache_config.kv_offloading_size cache_config.kv_offloading_backend""",
        "what vLLM's own cache finds again; chunks and blocks are in other fields": """
            cache_config.enable_prefix_caching cache_config.prefix_caching_hash_algo cache_config.prefix_match_unit
            cache_config.prefix_cache_retention_interval cache_config.hash_block_size
            cache_config.cache_hit_alignment_tokens cache_config.effective_attention_block_size
            cache_config.user_specified_block_size cache_config._block_size_resolved
            cache_config.enable_mamba_shared_prefix_checkpoint
            scheduler_config.disable_hybrid_kv_cache_manager""",
        "batches: who computes when, and with whom": """
            scheduler_config.runner_type scheduler_config.max_num_batched_tokens
            scheduler_config.max_num_scheduled_tokens scheduler_config.max_num_seqs scheduler_config.max_num_active_seqs
            scheduler_config.long_prefill_token_threshold scheduler_config.long_prefill_token_threshold_adaptive
            scheduler_config.max_num_queued_reqs scheduler_config.max_num_queued_tokens
            scheduler_config.enable_chunked_prefill scheduler_config.is_multimodal_model
            scheduler_config.max_num_encoder_input_tokens scheduler_config.encoder_cache_size scheduler_config.policy
            scheduler_config.scheduler_reserve_full_isl scheduler_config.watermark
            scheduler_config.prefill_schedule_interval scheduler_config.async_scheduling
            scheduler_config.stream_interval""",
        "batches: the sizes that are captured or compiled apart": """
            compilation_config.cudagraph_capture_sizes compilation_config.max_cudagraph_capture_size
            compilation_config.cudagraph_num_of_warmups compilation_config.cudagraph_copy_inputs
            compilation_config.cudagraph_specialize_lora compilation_config.compile_ranges_endpoints
            compilation_config.decoder_replay_cudagraph_capture_sizes
            compilation_config.decoder_replay_trim_threshold""",
        "batches: a drafter without KV tries tokens, any other is refused": "speculative_config",
        "how many adapters there is room for": """
            lora_config.max_loras lora_config.max_cpu_loras lora_config.max_lora_cls_labels""",
        "where compiled code lies, how it is saved and what is written of it": """
            compilation_config.debug_dump_path compilation_config.cache_dir compilation_config.local_cache_dir
            compilation_config.compile_cache_save_format""",
        "what a run has found out about itself": """
            compilation_config.enabled_custom_ops compilation_config.disabled_custom_ops compilation_config.traced_files
            compilation_config.compilation_time compilation_config.encoder_compilation_time
            compilation_config.static_forward_context compilation_config.static_all_moe_layers
            parallel_config.is_moe_model instance_id""",
        "warm-up": """
            kernel_config.enable_cutedsl_warmup kernel_config.enable_jit_warmup""",
        "which process this is, where it runs, how processes find each other": """
            parallel_config.data_parallel_size_local parallel_config.data_parallel_rank
            parallel_config.data_parallel_rank_local parallel_config.data_parallel_index
            parallel_config.data_parallel_master_ip parallel_config.data_parallel_rpc_port
            parallel_config.data_parallel_master_port parallel_config.data_parallel_backend
            parallel_config.data_parallel_external_lb parallel_config.data_parallel_hybrid_lb
            parallel_config.dp_sync_interval parallel_config.disable_nccl_for_dp_synchronization
            parallel_config.ray_workers_use_nsight parallel_config.ray_runtime_env parallel_config.placement_group
            parallel_config.distributed_executor_backend parallel_config.master_addr parallel_config.master_port
            parallel_config.node_rank parallel_config.nnodes parallel_config.numa_bind parallel_config.numa_bind_nodes
            parallel_config.numa_bind_cpus parallel_config.assigned_physical_gpu_ids
            parallel_config.distributed_timeout_seconds parallel_config.cpu_distributed_timeout_seconds
            parallel_config.world_size parallel_config.rank parallel_config._data_parallel_master_port_list
            parallel_config._coord_store_port parallel_config._api_process_count parallel_config._api_process_rank
            parallel_config.enable_fault_tolerance parallel_config.fault_tolerance_config
            ec_transfer_config.engine_id ec_transfer_config.ec_ip ec_transfer_config.ec_port
            ec_transfer_config.ec_buffer_device ec_transfer_config.ec_buffer_size
            device_config.device shutdown_timeout""",
        "what is watched, logged and announced": """
            observability_config logging_config profiler_config kv_events_config""",
        "how kvkeep is loaded; what matters of it is in other fields": "kv_transfer_config",
        "env: how vLLM is built; its version is in": """
            env.MAX_JOBS env.NVCC_THREADS env.CMAKE_BUILD_TYPE env.VERBOSE env.CUDA_HOME""",
        "env: a secret": "env.VLLM_API_KEY",
        "env: which cores run it, which is how a batch is divided": """
            env.VLLM_CPU_OMP_THREADS_BIND env.VLLM_CPU_NUM_OF_RESERVED_CPU env.VLLM_CPU_KVCACHE_SPACE""",
        "env: which process this is, how it is started and ended": """
            env.VLLM_WORKER_MULTIPROC_METHOD env.VLLM_ENABLE_V1_MULTIPROCESSING env.VLLM_PROCESS_NAME_PREFIX
            env.VLLM_SERVER_DEV_MODE env.VLLM_DP_RANK env.VLLM_DP_RANK_LOCAL env.VLLM_DP_SIZE
            env.VLLM_KEEP_ALIVE_ON_ENGINE_DEATH env.VLLM_DISABLE_COMPILE_CACHE
            env.VLLM_SKIP_MODEL_NAME_VALIDATION env.VLLM_DO_NOT_TRACK
            env.VLLM_USE_MODELSCOPE env.VLLM_IMAGE_TAG""",
    }
)
"""Why each of these names is left out."""

GLOBS = {
    "model_config.hf_*config*._name_or_path": "a path or an id, of the model or a part of it",
    "model_config.hf_*config*.transformers_version": "which library read the configuration; what it read is in",
    "model_config.hf_*config*.id2label": "names of classes, after the KV",
    "model_config.hf_*config*.label2id": "names of classes, after the KV",
    "compilation_config.inductor_compile_config.*_custom_*pass": "an object made of pass_config, which is in",
    "env.VLLM_*_PORT": "how processes find each other",
    "env.VLLM_*_HOST": "how processes find each other",
    "env.VLLM_PORT": "how processes find each other",
    "env.VLLM_DIST_IDENT": "how processes find each other",
    "env.VLLM_*_IP": "how processes find each other",
    "env.VLLM_LOG*": "what is logged",
    "env.VLLM_CONFIGURE_LOGGING": "what is logged",
    "env.VLLM_DEBUG_*": "what is logged",
    "env.VLLM_*USAGE*": "what vLLM's makers are told",
    "env.VLLM_*TIMEOUT*": "how long something may take",
    "env.VLLM_*CACHE_ROOT": "where files lie",
    "env.VLLM_*CACHE_DIR": "where files lie",
    "env.VLLM_CONFIG_ROOT": "where files lie",
    "env.VLLM_RPC_BASE_PATH": "where files lie",
    "env.S3_*": "a secret, or where a storage is",
    "env.*CUDA_VISIBLE_DEVICES": "which of the devices",
    "env.VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME": "how processes find each other; drawn by chance",
    "env.MOONCAKE_*": "how processes find each other",
    "env.LOCAL_RANK": "which process this is",
    "env.NO_COLOR": "what is logged",
    "env.LD_LIBRARY_PATH": "where libraries lie; vLLM's version is in",
}
"""Why names of these forms are left out."""
