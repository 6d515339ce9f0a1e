"""The table of tiny random bases: one line for each family, made by transformers from a configuration.

Every base is as small as its family allows and wide enough for rank 4. `Family.options` are entries of the family's
own configuration; what many families share is in the dictionaries below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch

from fedspan.models.encoder_decoder import is_encoder_decoder

VOCAB = len(tiny.SPECIAL) + len(tiny.CHARACTERS)
WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT: dict[str, Any] = {**WIDE, "max_position_embeddings": 64, "type_vocab_size": 2}
LLAMA: dict[str, Any] = {**WIDE, "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
PARAMETERS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
VIT: dict[str, Any] = {**WIDE, "image_size": 16, "patch_size": 8}
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "embedding_size": 8}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
_T5GEMMA: dict[str, Any] = {**LLAMA, "vocab_size": VOCAB, "query_pre_attn_scalar": 8, "sliding_window": 64, **tiny.ENDS}
T5GEMMA = {"encoder": _T5GEMMA, "decoder": _T5GEMMA, "dropout_rate": 0.0}
MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "expand": 2, "time_step_rank": 4}
MAMBA2 = {**MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}


@dataclass(frozen=True, slots=True)
class Family:
    """One line of the table."""

    name: str
    kind: str
    """`instruction`, `classification` or `image`."""
    layers: str
    """The kind of layers that it stands for."""
    options: Mapping[str, Any] = field(default_factory=dict)
    model_type: str = ""
    """transformers' name of its configuration; none: as `name`."""
    dtype: str = "float32"
    """Of the files, and of the base in memory."""
    fast: bool = False
    """Part of every run of the tests."""
    end: bool = False
    """Its classifier looks for the end token, which the tokenizer writes."""
    side: int = 16
    """Height and width of the images."""
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the section `adapter`, for the methods that train one."""

    def config(self) -> Any:
        """Return its configuration."""
        from transformers import AutoConfig

        given = {"vocab_size": VOCAB, **tiny.ENDS} if self.kind != "image" else {"num_channels": 3, "num_labels": 2}
        return AutoConfig.for_model(self.model_type or self.name, **{**given, **self.options})

    @property
    def answers(self) -> bool:
        """Whether its encoder reads the prompt and its decoder writes the answer."""
        return self.kind == "instruction" and is_encoder_decoder(self.config())

    def save(self, folder: Path) -> Path:
        """Write the base, the same every time, and its tokenizer or image processor."""
        import transformers as t

        auto = {
            "instruction": t.AutoModelForSeq2SeqLM if self.answers else t.AutoModelForCausalLM,
            "classification": t.AutoModel,
            "image": t.AutoModelForImageClassification,
        }[self.kind]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = auto.from_config(self.config())
            _spread(model)
        model.to(getattr(torch, self.dtype)).save_pretrained(str(folder))
        size = {"height": self.side, "width": self.side}
        processor = t.ViTImageProcessor(size=size) if self.kind == "image" else _tokenizer(self.end)
        processor.save_pretrained(str(folder))
        return folder


def _tokenizer(end: bool) -> Any:
    from tokenizers import processors

    made = tiny.tokenizer()
    if end:
        special = [("<s>", 1), ("</s>", 2)]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=special
        )
    return made


@torch.no_grad()
def _spread(model: Any) -> None:
    """Make the weights so large that every layer matters: a family's own start is nearly the identity or zero."""
    for name, parameter in model.named_parameters():
        several = parameter.ndim == 3 and "experts" in name
        if (parameter.ndim == 2 or several) and parameter.dtype == torch.float32:
            parameter.copy_(torch.randn_like(parameter) * 0.7 / parameter.shape[-1] ** 0.5)


def _decoder(name: str, options: Mapping[str, Any], layers: str = "decoder", **more: Any) -> Family:
    return Family(name, "instruction", layers, options, **more)


def _writer(name: str, options: Mapping[str, Any], layers: str = "encoder-decoder", **more: Any) -> Family:
    return Family(name, "instruction", layers, options, end=True, **more)


def _encoder(name: str, options: Mapping[str, Any], layers: str = "encoder", **more: Any) -> Family:
    return Family(name, "classification", layers, options, **more)


def _vision(name: str, options: Mapping[str, Any], layers: str = "vision", **more: Any) -> Family:
    return Family(name, "image", layers, options, **more)


def _towers(kind: str) -> dict[str, Any]:
    text = {**TEXT, "vocab_size": VOCAB, "projection_dim": 16}
    return {"text_config": text, "vision_config": {**VIT, "projection_dim": 16}, "projection_dim": 16}


FAMILIES = (
    _decoder("llama", LLAMA, fast=True),
    _decoder("llama, tied embeddings", {**LLAMA, "tie_word_embeddings": True}, "tied", model_type="llama", fast=True),
    _decoder("llama, bfloat16", LLAMA, "half precision", model_type="llama", dtype="bfloat16"),
    _decoder("llama, float16", LLAMA, "half precision", model_type="llama", dtype="float16"),
    _decoder("mistral", LLAMA),
    _decoder("qwen2", LLAMA),
    _decoder("qwen3", LLAMA),
    _decoder("gemma", LLAMA, "tied"),
    _decoder("gemma2", LLAMA, "tied"),
    _decoder("gemma3_text", LLAMA, "tied"),
    _decoder("phi", WIDE),
    _decoder("phi3", LLAMA),
    _decoder("stablelm", LLAMA),
    _decoder("olmo2", LLAMA),
    _decoder("cohere", LLAMA, "tied"),
    _decoder("granite", LLAMA),
    _decoder("starcoder2", LLAMA),
    _decoder("smollm3", LLAMA),
    _decoder("falcon", {**WIDE, "max_position_embeddings": 64}),
    _decoder("gpt2", {**GPT, **STILL}, "transposed", fast=True),
    _decoder("gpt2 with dropout", GPT, "transposed", model_type="gpt2"),
    _decoder("gpt_neo", {**WIDE, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}),
    _decoder("gpt_neox", {**TEXT, "rotary_pct": 1.0}),
    _decoder("gptj", {**GPT, **STILL, "rotary_dim": 4}),
    _decoder("codegen", {**GPT, **STILL, "rotary_dim": 4, "n_head": 4}),
    _decoder("opt", {**WIDE, "ffn_dim": 24, "max_position_embeddings": 64, "word_embed_proj_dim": 16, "dropout": 0.0}),
    _decoder("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    _decoder("mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}),
    _decoder("biogpt", {**WIDE, "max_position_embeddings": 64}),
    _decoder("ctrl", {"n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    _decoder("mixtral", {**LLAMA, **EXPERTS}, "experts", fast=True),
    _decoder("qwen2_moe", {**LLAMA, **EXPERTS, "shared_expert_intermediate_size": 12}, "experts", fast=True),
    _decoder(
        "mixtral with experts", {**LLAMA, **EXPERTS}, "experts", fast=True, model_type="mixtral", adapter=PARAMETERS
    ),
    _decoder(
        "qwen2_moe with experts",
        {**LLAMA, **EXPERTS, "shared_expert_intermediate_size": 12},
        "experts",
        model_type="qwen2_moe",
        adapter=PARAMETERS,
    ),
    _decoder(
        "gpt_oss with experts", {**LLAMA, **EXPERTS}, "experts", fast=True, model_type="gpt_oss", adapter=PARAMETERS
    ),
    _decoder(
        "qwen3_moe with one parameter",
        {**LLAMA, **EXPERTS},
        "experts",
        model_type="qwen3_moe",
        adapter={"target_parameters": ["down_proj"]},
    ),
    _decoder("qwen3_moe", {**LLAMA, **EXPERTS}, "experts"),
    _decoder("olmoe", {**LLAMA, **EXPERTS}, "experts"),
    _decoder("granitemoe", {**LLAMA, **EXPERTS}, "experts"),
    _decoder("gpt_oss", {**LLAMA, **EXPERTS}, "experts"),
    _decoder(
        "deepseek_v3",
        {
            **LLAMA,
            **EXPERTS,
            "num_key_value_heads": 2,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "qk_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 4,
        },
        "experts",
    ),
    _decoder("mamba", MAMBA, "state-space", fast=True),
    _decoder("mamba2", MAMBA2, "state-space"),
    _decoder("falcon_mamba", MAMBA, "state-space"),
    _decoder("rwkv", {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 64}, "state-space", fast=True),
    _decoder(
        "zamba2",
        {
            **LLAMA,
            "num_key_value_heads": 2,
            "mamba_d_state": 4,
            "mamba_headdim": 8,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 4,
            "layers_block_type": ["mamba", "hybrid"],
            "attention_head_dim": 16,
        },
        "state-space",
    ),
    _decoder(
        "jamba",
        {
            **LLAMA,
            **EXPERTS,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        "state-space",
    ),
    _decoder(
        "recurrent_gemma",
        {**LLAMA, "lru_width": 16, "block_types": ["recurrent", "attention"], "attention_window_size": 32},
        "state-space",
    ),
    _writer("t5 for generation", {**T5, "dropout_rate": 0.0}, model_type="t5", fast=True),
    _writer("t5 for generation with dropout", T5, model_type="t5"),
    _writer("t5 for generation, bfloat16", T5, "half precision", model_type="t5", dtype="bfloat16"),
    _writer("mt5 for generation", {**T5, "dropout_rate": 0.0}, model_type="mt5"),
    _writer("bart for generation", {**SEQ2SEQ, "decoder_start_token_id": 2, "dropout": 0.0}, model_type="bart"),
    _writer("pegasus for generation", {**SEQ2SEQ, "decoder_start_token_id": 0, "dropout": 0.0}, model_type="pegasus"),
    _writer("t5gemma for generation", T5GEMMA, model_type="t5gemma"),
    _encoder("bert", TEXT, fast=True),
    _encoder(
        "bert with unreached layers",
        {**TEXT, "is_decoder": True, "add_cross_attention": True},
        "no gradient",
        model_type="bert",
        fast=True,
    ),
    _encoder("bert, bfloat16", TEXT, "half precision", model_type="bert", dtype="bfloat16"),
    _encoder("roberta", {**TEXT, "max_position_embeddings": 66}),
    _encoder("distilbert", {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64}),
    _encoder("albert", {**TEXT, "embedding_size": 8}, "shared", fast=True),
    _encoder("electra", {**TEXT, "embedding_size": 8}),
    _encoder("deberta", TEXT),
    _encoder("deberta-v2", TEXT),
    _encoder("deberta-v2 with convolution", {**TEXT, "conv_kernel_size": 3}, "convolution", model_type="deberta-v2"),
    _encoder("mpnet", TEXT),
    _encoder("modernbert", {**TEXT, "global_attn_every_n_layers": 2}),
    _encoder("convbert", {**TEXT, "embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 3}, "convolution"),
    _encoder("squeezebert", {**TEXT, "embedding_size": 16}, "convolution"),
    _encoder("mobilebert", {**TEXT, "embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8}),
    _encoder("ibert", TEXT),
    _encoder("fnet", TEXT, "sees padding", fast=True),
    _encoder("nystromformer", {**TEXT, "num_landmarks": 64, "segment_means_seq_len": 64}, "sees padding"),
    _encoder("big_bird", TEXT),
    _encoder("longformer", {**TEXT, "attention_window": 4}),
    _encoder(
        "longformer without dropout",
        {**TEXT, "attention_window": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        model_type="longformer",
    ),
    _encoder(
        "funnel",
        {
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 24,
            "block_sizes": [1, 1],
            "architectures": ["FunnelModel"],
        },
    ),
    _encoder("rembert", {**TEXT, "input_embedding_size": 8, "output_embedding_size": 8}),
    _encoder("roformer", {**TEXT, "embedding_size": 16}),
    _encoder("megatron-bert", TEXT),
    _encoder("xlm", {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64, "pad_index": 0}),
    _encoder("flaubert", {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64, "pad_index": 0}),
    _encoder("xlnet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}, "sequence first"),
    _encoder(
        "xlnet without dropout",
        {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "dropout": 0.0, "summary_last_dropout": 0.0},
        "sequence first",
        model_type="xlnet",
        fast=True,
    ),
    _encoder("canine", {**TEXT, "max_position_embeddings": 64, "local_transformer_stride": 4, "num_hash_buckets": 64}),
    _encoder("llama classifier", LLAMA, "decoder", model_type="llama"),
    _encoder("gpt2 classifier", {**GPT, **STILL}, "transposed", model_type="gpt2"),
    _encoder("mixtral classifier", {**LLAMA, **EXPERTS}, "experts", model_type="mixtral"),
    _encoder("t5", T5, "encoder-decoder", fast=True, end=True),
    _encoder("umt5", T5, "encoder-decoder", end=True),
    _encoder("bart", SEQ2SEQ, "encoder-decoder", end=True),
    _encoder("mbart", SEQ2SEQ, "encoder-decoder", end=True),
    _vision("vit", VIT, fast=True),
    _vision("vit, float16", VIT, "half precision", model_type="vit", dtype="float16"),
    _vision("deit", {**VIT, "architectures": ["DeiTForImageClassification"]}),
    _vision("beit", {**VIT, "use_mean_pooling": True}),
    _vision("beit, bfloat16", VIT, "half precision", model_type="beit", dtype="bfloat16"),
    _vision("data2vec-vision", VIT),
    _vision("dinov2", {**VIT, "mlp_ratio": 2}),
    _vision("vit_msn", VIT),
    _vision("ijepa", VIT),
    _vision("swin", SWIN, side=32),
    _vision("swin, bfloat16", SWIN, "half precision", model_type="swin", dtype="bfloat16", side=32),
    _vision("swinv2", SWIN, side=32),
    _vision("swinv2, float16", SWIN, "half precision", model_type="swinv2", dtype="float16", side=32),
    _vision("convnext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "convolution", fast=True),
    _vision(
        "convnext, bfloat16",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "half precision",
        model_type="convnext",
        dtype="bfloat16",
        fast=True,
    ),
    _vision("convnextv2", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, "convolution"),
    _vision("resnet", STAGES, "batch norm"),
    _vision("regnet", {**STAGES, "groups_width": 8}, "batch norm"),
    _vision("mobilenet_v2", {"image_size": 32, "depth_multiplier": 0.1}, "batch norm", side=32),
    _vision(
        "mobilevit",
        {
            "image_size": 32,
            "patch_size": 2,
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
            "num_attention_heads": 2,
            "expand_ratio": 1.0,
        },
        "batch norm",
        side=32,
        fast=True,
    ),
    _vision("mobilevitv2", {"image_size": 64, "width_multiplier": 0.125, "patch_size": 2}, "batch norm", side=64),
    _vision(
        "levit",
        {
            "image_size": 32,
            "patch_size": 16,
            "hidden_sizes": [16, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
            "mlp_ratio": [2, 2, 2],
            "attention_ratio": [2, 2, 2],
            "drop_path_rate": 0,
            "architectures": ["LevitForImageClassification"],
        },
        "batch norm",
        side=32,
    ),
    _vision(
        "swiftformer",
        {"image_size": 32, "depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16]},
        "batch norm",
        side=32,
    ),
    _vision(
        "efficientnet",
        {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
        "batch norm",
        side=32,
    ),
    _vision(
        "pvt",
        {
            "image_size": 32,
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        side=32,
    ),
    _vision(
        "segformer",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
        "batch norm",
        side=32,
    ),
    _vision("poolformer", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, "convolution", side=32),
    _vision("focalnet", {"image_size": 32, "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, side=32),
    _vision(
        "hiera",
        {
            "image_size": [32, 32],
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "query_stride": [2, 2],
            "num_query_pool": 1,
        },
        side=32,
    ),
    _vision("clip", _towers("clip"), "two towers", fast=True),
    _vision("siglip", _towers("siglip"), "two towers"),
)
