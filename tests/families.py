"""Tiny random models of the model types of transformers that people may take as a planner."""

import dataclasses
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# the values of a setting, where a model type has one of that name
SIZES = {
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "max_seq_len": 512,
    "initializer_range": 0.2,
    "init_std": 0.2,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    # latent attention
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 8,
    # windows, shorter than the rows
    "sliding_window": 8,
    "attention_chunk_size": 8,
    # layers with a state
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_n_groups": 2,
    "mamba_ngroups": 2,
    "n_groups": 2,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
}

S, F, L = "sliding_attention", "full_attention", "linear_attention"
WINDOWS = {"layer_types": [S, F]}  # every second layer sees a window
MULTI_HEAD = {"num_key_value_heads": 4}
VISION = {"image_size": 16, "patch_size": 4}
TOWER = {"depth": 1, "patch_size": 4, "out_hidden_size": 32}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
# rotary embeddings that depend on the longest row so far
REFUSED = {"llama dynamic": r"talks.jsonl:1: \d+ tokens, and the model has 40 positions"}
# their linear layers are of a class of their own
WITHOUT_ADAPTERS = ("falcon", "falcon alibi", "falcon new")
# each row needs a pass of its own: states, convolutions, a choice of tokens, chunks, ALiBi, ...
SINGLE = (
    "axk2",
    "bamba",
    "bloom",
    "deepseek_v32",
    "deepseek_v4",
    "doge",
    "falcon alibi",
    "falcon_h1",
    "falcon_mamba",
    "glm_moe_dsa",
    "granitemoehybrid",
    "hy_v4",
    "inkling_text",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "llama4_text",
    "llama4",
    "mamba",
    "mamba2",
    "minimax",
    "minimax_m3_vl_text",
    "nemotron_h",
    "olmo_hybrid",
    "phi3 longrope",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp_text",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
    "zamba",
    "zamba2",
    "zaya",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
FAMILIES = {
    "afmoe": WINDOWS,
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "axk1": MULTI_HEAD,
    "axk2": MULTI_HEAD,
    "bamba": {"attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {**WINDOWS, "logit_scale": 1.0},
    "cohere2_moe": {**WINDOWS, "logit_scale": 1.0},
    "cohere_compass_text": {**WINDOWS, "logit_scale": 1.0, "rope_parameters": {S: MROPE, F: MROPE}},
    "cwm": {"layer_types": [F, S], "rope_parameters": ROPE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2},
        "rope_parameters": ROPE,
    },
    "deepseek_v2": MULTI_HEAD,
    "deepseek_v3": MULTI_HEAD,
    "deepseek_v32": MULTI_HEAD,
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", S],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "num_hidden_layers": 3,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "index_topk": 4,
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    "diffllama": {},
    "doge": {"keep_window_size": 16, "sliding_window": None},
    "dots1": {**WINDOWS, "n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": WINDOWS,
    "exaone_moe": WINDOWS,
    "falcon": {},
    "falcon alibi": {"alibi": True, "multi_query": False, "num_kv_heads": 4},
    "falcon new": {"new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 64},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": WINDOWS,
    "gemma3_text": WINDOWS,
    "gemma3": {
        "text_config": WINDOWS,
        "vision_config": VISION,
        "mm_tokens_per_image": 16,
        "image_token_index": 3,
    },
    "gemma3n_text": {
        "layer_types": [S, F, S, F],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 600,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "layer_types": [S, F],
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 600,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_text shared": {
        "layer_types": [S, F, S, F],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 600,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_text moe": {
        "layer_types": [S, F],
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "gemma4": {
        "text_config": {
            "layer_types": [S, F],
            "global_head_dim": 16,
            "vocab_size_per_layer_input": 600,
            "hidden_size_per_layer_input": 8,
        },
        "vision_config": {"position_embedding_size": 16, "patch_size": 4, "num_key_value_heads": 4},
        "audio_config": {"subsampling_conv_channels": [4, 4], "output_proj_dims": 32},
        "image_token_id": 3,
    },
    "gemma4_unified_text": {"layer_types": [S, F], "global_head_dim": 16},
    "gemma4_unified": {
        "text_config": {"layer_types": [S, F], "global_head_dim": 16},
        "vision_config": {
            "patch_size": 4,
            "mm_embed_dim": 16,
            "mm_posemb_size": 16,
            "output_proj_dims": 16,
        },
        "audio_config": {"audio_embed_dim": 16},
        "image_token_id": 3,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": MULTI_HEAD,
    "glm_moe_dsa": {
        **MULTI_HEAD,
        "num_hidden_layers": 3,
        "indexer_types": ["full", "full", "shared"],
    },
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": WINDOWS,
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granite_swa": WINDOWS,
    "granitemoe": {},
    "granitemoe_swa": WINDOWS,
    "granitemoehybrid": {"layer_types": [L, F], "position_embedding_type": "rope"},
    "granitemoeshared": {},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {**MULTI_HEAD, "num_hidden_layers": 3, "indexer_types": ["full", "full", "shared"]},
    "hyperclovax": {},
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 8,
        "d_rel": 4,
        "rel_extent": 64,
        "logits_mup_width_multiplier": 1.0,
    },
    "jais2": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {
        **MULTI_HEAD,
        "layer_types": [L, F],
        "linear_head_dim": 8,
        "linear_num_heads": 2,
    },
    "laguna": WINDOWS,
    "lfm2": {"layer_types": ["conv", F], "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", F]},
    "llama": {},
    "llama dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "max_position_embeddings": 40,
    },
    "llama llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "rope_theta": 10000.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 48,
        }
    },
    "llama yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 48,
        }
    },
    "llama4_text": {
        "no_rope_layers": [1, 0],
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 48,
    },
    "llama4": {
        "auto": "AutoModelForImageTextToText",
        "text_config": {
            "no_rope_layers": [1, 0],
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 48,
        },
        "vision_config": {
            **VISION,
            "intermediate_size": 128,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        "image_token_index": 3,
    },
    "longcat_flash": {**MULTI_HEAD, "num_layers": 1, "zero_expert_num": 2},
    "mamba": {},
    "mamba2": {"num_heads": 8},
    "mellum": WINDOWS,
    "mimo_v2_flash": {"layer_types": [F, S]},
    "minicpm3": MULTI_HEAD,
    "minimax": {"layer_types": [F, L], "block_size": 8},
    "minimax_m2": {},
    "minimax_m3_vl_text": {
        "layer_types": [F, "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "dense_intermediate_size": 48,
        "rotary_dim": 4,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": WINDOWS,
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "mistral3": {
        "auto": "AutoModelForImageTextToText",
        "text_config": {"model_type": "ministral3"},
        "vision_config": {"model_type": "pixtral", **VISION},
        "image_token_index": 3,
    },
    "mllama": {
        "auto": "AutoModelForImageTextToText",
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            **VISION,
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
        "image_token_index": 3,
    },
    "modernbert-decoder": {"layer_types": [F, S], "local_attention": 16},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {"moe_shared_expert_intermediate_size": 16},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOWS,
    "olmo_hybrid": {"layer_types": [L, F]},
    "olmoe": {},
    "opt": {"word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phi3 longrope": {
        "sliding_window": None,
        "original_max_position_embeddings": 40,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 4.0, 6.0, 8.0],
            "original_max_position_embeddings": 40,
        },
    },
    "phi4_multimodal": {
        "vision_config": {**VISION, "hidden_size": 16, "crop_size": 16},
        "audio_config": {
            "num_blocks": 1,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 8,
            "input_size": 16,
        },
        "sliding_window": None,
    },
    "phimoe": {"sliding_window": None},
    "qwen2": {},
    "qwen2 windows": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": MROPE},
        "auto": "AutoModelForImageTextToText",
        "vision_config": {**TOWER, "window_size": 8, "fullatt_block_indexes": [0]},
        "image_token_id": 3,
    },
    "qwen3_vl": {
        "auto": "AutoModelForImageTextToText",
        "vision_config": {**TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        "image_token_id": 3,
    },
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": [L, F]},
    "qwen3_5_text": {"layer_types": [L, F]},
    "qwen3_5_moe_text": {"layer_types": [L, F]},
    "qwen3_5": {
        "auto": "AutoModelForImageTextToText",
        "text_config": {"layer_types": [L, F]},
        "vision_config": {**TOWER, "num_position_embeddings": 16},
        "image_token_id": 3,
    },
    "qwen3_5_moe": {
        "auto": "AutoModelForImageTextToText",
        "text_config": {"layer_types": [L, F]},
        "vision_config": {**TOWER, "num_position_embeddings": 16},
        "image_token_id": 3,
    },
    "qwen4_exp_text": {
        "layer_types": [L, "indexed_attention"],
        "hc_lowrank": 8,
        "hc_count": 2,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "attention_window_size": 8,
        "num_key_value_heads": 1,
        "w_init_variance_scale": 1.0,
    },
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0], "sliding_window": None},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": WINDOWS,
    "xglm": {},
    "xlstm": {"hidden_size": 64},
    "youtu": MULTI_HEAD,
    "zamba": {
        "layers_block_type": [L, "hybrid", L, "hybrid"],
        "num_hidden_layers": 4,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": [L, "hybrid", L, "hybrid"],
        "num_hidden_layers": 4,
        "n_mamba_heads": 8,
        "num_key_value_heads": 4,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid_sliding", "hybrid"],
        "router_hidden_size": 16,
    },
}


def settings_of(config_class, changes: dict, vocabulary: int) -> dict:
    """The settings of a configuration and of those inside of it."""
    names = {field.name for field in dataclasses.fields(config_class)}
    settings = {name: value for name, value in SIZES.items() if name in names}
    if "vocab_size" in names:
        settings |= {"vocab_size": vocabulary, "bos_token_id": 1}
        settings |= {"eos_token_id": 2, "pad_token_id": 0}
    settings |= changes
    for name, inner_class in config_class.sub_configs.items():
        inner = changes.get(name, {})
        if inner_class is AutoConfig and "model_type" in inner:
            inner_class = CONFIG_MAPPING[inner["model_type"]]
        elif inner_class is AutoConfig:  # transformers 5.20: also where there is one class
            inner_class = type(getattr(config_class(), name))
        settings[name] = settings_of(inner_class, inner, vocabulary)
    return settings


def make_family(name: str, tokenizer):
    """A random model of the family."""
    changes = dict(FAMILIES[name])
    auto_class = getattr(transformers, changes.pop("auto", "AutoModelForCausalLM"))
    config_class = CONFIG_MAPPING[name.split()[0]]
    config = config_class(**settings_of(config_class, changes, len(tokenizer)))
    torch.manual_seed(0)
    model = auto_class.from_config(config, dtype=torch.float32)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and not tensor.any():  # biases
            torch.nn.init.normal_(tensor, std=0.1)
    return model.eval()


def save_family(folder: Path, name: str, tokenizer) -> None:
    model = make_family(name, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if hasattr(model.config, "vision_config"):
        for file in PROCESSOR_FILES:
            (folder / file).write_text("{}")
