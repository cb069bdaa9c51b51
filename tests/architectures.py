"""Tiny random models of many architectures, for tests/test_architectures.py and scripts/architectures."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

POSITIONS = 512
SHAPE = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "eos_token_id": 256,
    "pad_token_id": 257,
    "bos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64, "mamba_expand": 2}
CONVOLUTION = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
WINDOW = {"sliding_window": 6}
HYBRID = ["sliding_attention", "full_attention"]

# What differs from SHAPE, by transformers' model_type.
ARCHITECTURES: dict[str, dict] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, **WINDOW},
    "gemma3_text": {"head_dim": 8, **WINDOW, "layer_types": HYBRID},
    "gemma4_text": {"head_dim": 8, **WINDOW, "layer_types": HYBRID, "vocab_size_per_layer_input": 261, "hidden_size_per_layer_input": 8},
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "phi3": {},
    "smollm3": {},
    "olmo2": {},
    "olmo3": {**WINDOW, "layer_types": HYBRID},
    "olmo_hybrid": {**LINEAR, "linear_num_key_heads": 4},
    "granite": {},
    "granitemoehybrid": {**MAMBA, **EXPERTS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "cohere2": {**WINDOW, "layer_types": HYBRID},
    "glm4": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8, **WINDOW, **EXPERTS},
    "deepseek_v3": {**LATENT, **EXPERTS},
    "deepseek_v32": {**LATENT, **EXPERTS, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "kimi_linear": {
        **LATENT,
        **EXPERTS,
        "num_hidden_layers": 4,
        "linear_attn_config": {
            "full_attn_layers": [4],
            "kda_layers": [1, 2, 3],
            "head_dim": 8,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        "head_dim": 8,
    },
    "lfm2": CONVOLUTION,
    "lfm2_moe": {**CONVOLUTION, **EXPERTS, "num_dense_layers": 1},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2},
    "falcon_mamba": {"state_size": 8},
    "jamba": {
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "zamba2": {
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
    "falcon_h1": {**MAMBA, "lm_head_multiplier": 0.5},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "head_dim": 8,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
        "attention_window_size": 6,
        "lru_width": 32,
        "head_dim": 8,
    },
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"embedding_dim": 32, "num_blocks": 2, "num_heads": 4, "qk_dim_factor": 0.5, "chunk_size": 16},
    "minimax": {"head_dim": 8, **EXPERTS},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 6},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "opt": {},
    "bloom": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": POSITIONS},
    "falcon": {},
    "xglm": {},
    "ctrl": {},
    "bert": {},
}
WITHOUT_HEADS = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")


def settings(name: str, **options: object):
    """The config of the tiny model, without options that the architecture does not have."""
    shape = {key: value for key, value in SHAPE.items() if name not in WITHOUT_HEADS or not key.startswith(("num_a", "num_k", "max_"))}
    return AutoConfig.for_model(name, **{**shape, **ARCHITECTURES[name], **options})


def random_architecture(name: str, seed: int = 0, **options: object) -> PreTrainedModel:
    """A model in eval mode with random weights, whose distributions are far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings(name, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()
