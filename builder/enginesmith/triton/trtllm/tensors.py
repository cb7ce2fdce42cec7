"""The inputs and outputs of the five models of a TensorRT-LLM deployment, as NVIDIA names and shapes them.

Tables, and the few types that depend on the deployment. Source: the templates in
``triton_backend/all_models/inflight_batcher_llm`` of TensorRT-LLM 1.2 (commits 2a9abd9, 808059d, 89fd9b7, bff88ea).
A client written for that repository talks to ours unchanged.
"""

from __future__ import annotations

from enginesmith.triton.config import DataType, Tensor


def _number(name: str, data_type: DataType, *, optional: bool = True) -> Tensor:
    """One number per row, which the engine's backend sees without a dimension of its own."""
    return Tensor(name, data_type, (1,), optional=optional, reshape=())


def _ragged(name: str, data_type: DataType, dims: tuple[int, ...] = (-1,)) -> Tensor:
    return Tensor(name, data_type, dims, optional=True, ragged=True)


def _optional(name: str, data_type: DataType, dims: tuple[int, ...] = (1,)) -> Tensor:
    return Tensor(name, data_type, dims, optional=True)


PREPROCESSING_INPUTS = (
    Tensor("QUERY", "TYPE_STRING"),
    _optional("DECODER_QUERY", "TYPE_STRING"),
    _optional("IMAGE_BYTES", "TYPE_UINT8", (-1, -1, -1, -1)),
    _optional("IMAGE_URL", "TYPE_STRING", (-1,)),
    _optional("IMAGE_SIZES", "TYPE_INT64", (-1, 2)),
    _optional("VIDEO_BYTES", "TYPE_UINT8", (-1, -1, -1, -1)),
    Tensor("REQUEST_OUTPUT_LEN", "TYPE_INT32"),
    _optional("BAD_WORDS_DICT", "TYPE_STRING", (-1,)),
    _optional("STOP_WORDS_DICT", "TYPE_STRING", (-1,)),
    _optional("EMBEDDING_BIAS_WORDS", "TYPE_STRING", (-1,)),
    _optional("EMBEDDING_BIAS_WEIGHTS", "TYPE_FP32", (-1,)),
    _optional("END_ID", "TYPE_INT32"),
    _optional("PAD_ID", "TYPE_INT32"),
    _optional("PROMPT_TABLE_EXTRA_ID", "TYPE_UINT64"),
)
PREPROCESSING_OUTPUTS = (
    Tensor("INPUT_ID", "TYPE_INT32", (-1,)),
    Tensor("REQUEST_INPUT_LEN", "TYPE_INT32"),
    Tensor("DECODER_INPUT_ID", "TYPE_INT32", (-1,)),
    Tensor("REQUEST_DECODER_INPUT_LEN", "TYPE_INT32"),
    Tensor("BAD_WORDS_IDS", "TYPE_INT32", (2, -1)),
    Tensor("STOP_WORDS_IDS", "TYPE_INT32", (2, -1)),
    Tensor("EMBEDDING_BIAS", "TYPE_FP32", (-1,)),
    Tensor("REQUEST_OUTPUT_LEN", "TYPE_INT32", (-1,)),
    Tensor("OUT_END_ID", "TYPE_INT32"),
    Tensor("OUT_PAD_ID", "TYPE_INT32"),
    Tensor("OUT_PROMPT_TABLE_EXTRA_IDS", "TYPE_UINT64", (-1,)),
    Tensor("PIXEL_VALUES", "TYPE_FP16", (-1, -1, -1, -1)),
    Tensor("ASPECT_RATIO_IDS", "TYPE_INT64", (-1,)),
    Tensor("ASPECT_RATIO_MASK", "TYPE_INT64", (-1, -1)),
    Tensor("CROSS_ATTENTION_MASK", "TYPE_INT64", (-1, -1, -1)),
    Tensor("IMAGE_SIZES", "TYPE_INT64", (-1, 2)),
    Tensor("IS_VIDEO_INPUT", "TYPE_BOOL"),
    Tensor("ATTENTION_MASK", "TYPE_INT64", (-1,)),
    Tensor("IMAGE_GRID_THW", "TYPE_INT64", (3,)),
    Tensor("VISION_INPUT_ID", "TYPE_INT32", (-1,)),
)
POSTPROCESSING_INPUTS = (
    Tensor("TOKENS_BATCH", "TYPE_INT32", (-1, -1)),
    Tensor("SEQUENCE_LENGTH", "TYPE_INT32", (-1,)),
)
POSTPROCESSING_OUTPUTS = (Tensor("OUTPUT", "TYPE_STRING", (-1,)),)


def engine_inputs(model_type: DataType, logits_type: DataType) -> tuple[Tensor, ...]:
    """What ``tensorrt_llm`` takes; ``model_type`` is the dtype of its activations."""
    return (
        _ragged("input_ids", "TYPE_INT32"),
        _ragged("encoder_input_features", model_type, (-1, -1)),
        _number("encoder_output_lengths", "TYPE_INT32"),
        _number("input_lengths", "TYPE_INT32", optional=False),
        _number("request_output_len", "TYPE_INT32", optional=False),
        _number("num_return_sequences", "TYPE_INT32"),
        _ragged("draft_input_ids", "TYPE_INT32"),
        _ragged("decoder_input_ids", "TYPE_INT32"),
        _number("decoder_input_lengths", "TYPE_INT32"),
        _ragged("draft_logits", logits_type, (-1, -1)),
        _number("draft_acceptance_threshold", "TYPE_FP32"),
        _number("end_id", "TYPE_INT32"),
        _number("pad_id", "TYPE_INT32"),
        _ragged("stop_words_list", "TYPE_INT32", (2, -1)),
        _ragged("bad_words_list", "TYPE_INT32", (2, -1)),
        _ragged("embedding_bias", "TYPE_FP32"),
        _number("beam_width", "TYPE_INT32"),
        _number("temperature", "TYPE_FP32"),
        _number("runtime_top_k", "TYPE_INT32"),
        _number("runtime_top_p", "TYPE_FP32"),
        _number("runtime_top_p_min", "TYPE_FP32"),
        _number("runtime_top_p_decay", "TYPE_FP32"),
        _number("runtime_top_p_reset_ids", "TYPE_INT32"),
        _number("len_penalty", "TYPE_FP32"),
        _number("early_stopping", "TYPE_BOOL"),
        _number("repetition_penalty", "TYPE_FP32"),
        _number("min_tokens", "TYPE_INT32"),
        _number("beam_search_diversity_rate", "TYPE_FP32"),
        _number("presence_penalty", "TYPE_FP32"),
        _number("frequency_penalty", "TYPE_FP32"),
        _number("seed", "TYPE_UINT64"),
        *(_number(name, "TYPE_BOOL") for name in RETURN_FLAGS),
        _number("exclude_input_in_output", "TYPE_BOOL"),
        _number("stop", "TYPE_BOOL"),
        _number("streaming", "TYPE_BOOL"),
        _ragged("prompt_embedding_table", model_type, (-1, -1)),
        _ragged("prompt_table_extra_ids", "TYPE_UINT64"),
        _number("prompt_vocab_size", "TYPE_INT32"),
        _ragged("cross_attention_mask", "TYPE_BOOL", (-1, -1)),
        _optional("mrope_rotary_cos_sin", "TYPE_FP32", (-1,)),
        _optional("mrope_position_deltas", "TYPE_INT64"),
        _number("lora_task_id", "TYPE_UINT64"),
        _ragged("lora_weights", "TYPE_FP16", (-1, -1)),
        _ragged("lora_config", "TYPE_INT32", (-1, 3)),
        _ragged("context_phase_params", "TYPE_UINT8"),
        _ragged("skip_cross_attn_blocks", "TYPE_BOOL", (1,)),
        _ragged("retention_token_range_starts", "TYPE_INT32"),
        _ragged("retention_token_range_ends", "TYPE_INT32"),
        _ragged("retention_token_range_priorities", "TYPE_INT32"),
        _ragged("retention_token_range_durations_ms", "TYPE_INT32"),
        _ragged("retention_decode_priority", "TYPE_INT32", (1,)),
        _ragged("retention_decode_duration_ms", "TYPE_INT32", (1,)),
        _ragged("guided_decoding_guide_type", "TYPE_STRING", (1,)),
        _ragged("guided_decoding_guide", "TYPE_STRING", (1,)),
        _ragged("lookahead_window_size", "TYPE_INT32", (1,)),
        _ragged("lookahead_ngram_size", "TYPE_INT32", (1,)),
        _ragged("lookahead_verification_set_size", "TYPE_INT32", (1,)),
    )


RETURN_FLAGS = (
    "return_log_probs",
    "return_context_logits",
    "return_generation_logits",
    "return_perf_metrics",
    "return_num_input_tokens",
    "return_num_output_tokens",
)


def engine_outputs(logits_type: DataType) -> tuple[Tensor, ...]:
    """What ``tensorrt_llm`` gives."""
    return (
        Tensor("output_ids", "TYPE_INT32", (-1, -1)),
        Tensor("sequence_length", "TYPE_INT32", (-1,)),
        *_scores(logits_type),
        Tensor("context_phase_params", "TYPE_UINT8", (-1,)),
        *_COUNTERS,
    )


def text_outputs(logits_type: DataType) -> tuple[Tensor, ...]:
    """What ``ensemble`` and ``tensorrt_llm_bls`` give: text, and the engine's other outputs as they are."""
    return (Tensor("text_output", "TYPE_STRING", (-1,)), *_scores(logits_type), *_COUNTERS)


def _scores(logits_type: DataType) -> tuple[Tensor, ...]:
    return (
        Tensor("cum_log_probs", "TYPE_FP32", (-1,)),
        Tensor("output_log_probs", "TYPE_FP32", (-1, -1)),
        Tensor("context_logits", logits_type, (-1, -1)),
        Tensor("generation_logits", logits_type, (-1, -1, -1)),
        Tensor("batch_index", "TYPE_INT32"),
        Tensor("sequence_index", "TYPE_INT32"),
    )


_COUNTERS = (
    Tensor("kv_cache_alloc_new_blocks", "TYPE_INT32"),
    Tensor("kv_cache_reused_blocks", "TYPE_INT32"),
    Tensor("kv_cache_alloc_total_blocks", "TYPE_INT32"),
    Tensor("arrival_time_ns", "TYPE_INT64"),
    Tensor("first_scheduled_time_ns", "TYPE_INT64"),
    Tensor("first_token_time_ns", "TYPE_INT64"),
    Tensor("last_token_time_ns", "TYPE_INT64"),
    Tensor("acceptance_rate", "TYPE_FP32"),
    Tensor("total_accepted_draft_tokens", "TYPE_INT32"),
    Tensor("total_draft_tokens", "TYPE_INT32"),
    Tensor("num_input_tokens", "TYPE_INT32"),
    Tensor("num_output_tokens", "TYPE_INT32"),
)


def ensemble_inputs(model_type: DataType) -> tuple[Tensor, ...]:
    """What ``ensemble`` takes."""
    return (
        Tensor("text_input", "TYPE_STRING"),
        _optional("decoder_text_input", "TYPE_STRING"),
        Tensor("max_tokens", "TYPE_INT32"),
        _optional("num_return_sequences", "TYPE_INT32"),
        *_WORDS_AND_SAMPLING,
        *(_optional(name, "TYPE_BOOL") for name in RETURN_FLAGS),
        _optional("beam_width", "TYPE_INT32"),
        _optional("stream", "TYPE_BOOL"),
        _optional("prompt_embedding_table", model_type, (-1, -1)),
        _optional("prompt_table_extra_id", "TYPE_UINT64"),
        _optional("prompt_vocab_size", "TYPE_INT32"),
        _optional("embedding_bias_words", "TYPE_STRING", (-1,)),
        _optional("embedding_bias_weights", "TYPE_FP32", (-1,)),
        _optional("lora_task_id", "TYPE_UINT64"),
        _ragged("lora_weights", "TYPE_FP16", (-1, -1)),
        _ragged("lora_config", "TYPE_INT32", (-1, 3)),
        _ragged("guided_decoding_guide_type", "TYPE_STRING", (1,)),
        _ragged("guided_decoding_guide", "TYPE_STRING", (1,)),
    )


def bls_inputs(model_type: DataType) -> tuple[Tensor, ...]:
    """What ``tensorrt_llm_bls`` takes."""
    return (
        Tensor("text_input", "TYPE_STRING"),
        _optional("decoder_text_input", "TYPE_STRING"),
        _optional("image_input", "TYPE_FP16", (-1, 3, -1, -1)),
        _optional("image_bytes_input", "TYPE_UINT8", (-1, -1, -1, -1)),
        _optional("image_url_input", "TYPE_STRING"),
        _optional("image_sizes_input", "TYPE_INT64", (-1, 2)),
        _optional("video_bytes_input", "TYPE_UINT8", (-1, -1, -1, -1)),
        Tensor("max_tokens", "TYPE_INT32"),
        *_WORDS_AND_SAMPLING,
        *(_number(name, "TYPE_BOOL") for name in RETURN_FLAGS),
        _number("num_return_sequences", "TYPE_INT32"),
        _optional("beam_width", "TYPE_INT32"),
        _optional("stream", "TYPE_BOOL"),
        _optional("prompt_embedding_table", model_type, (-1, -1)),
        _optional("prompt_vocab_size", "TYPE_INT32"),
        _optional("prompt_table_extra_id", "TYPE_UINT64"),
        _optional("embedding_bias_words", "TYPE_STRING", (-1,)),
        _optional("embedding_bias_weights", "TYPE_FP32", (-1,)),
        _optional("num_draft_tokens", "TYPE_INT32"),
        _number("use_draft_logits", "TYPE_BOOL"),
        _number("lora_task_id", "TYPE_UINT64"),
        _ragged("lora_weights", "TYPE_FP16", (-1, -1)),
        _ragged("lora_config", "TYPE_INT32", (-1, 3)),
        _optional("guided_decoding_guide_type", "TYPE_STRING"),
        _optional("guided_decoding_guide", "TYPE_STRING"),
    )


_WORDS_AND_SAMPLING = (
    _optional("bad_words", "TYPE_STRING", (-1,)),
    _optional("stop_words", "TYPE_STRING", (-1,)),
    _optional("exclude_input_in_output", "TYPE_BOOL"),
    _optional("end_id", "TYPE_INT32"),
    _optional("pad_id", "TYPE_INT32"),
    _optional("top_k", "TYPE_INT32"),
    _optional("top_p", "TYPE_FP32"),
    _optional("temperature", "TYPE_FP32"),
    _optional("length_penalty", "TYPE_FP32"),
    _optional("repetition_penalty", "TYPE_FP32"),
    _optional("min_tokens", "TYPE_INT32"),
    _optional("presence_penalty", "TYPE_FP32"),
    _optional("frequency_penalty", "TYPE_FP32"),
    _optional("seed", "TYPE_UINT64"),
)

# The tensors of each step of the ensemble: the model's name for it, the ensemble's name for it.
PREPROCESSING_MAP = (
    {
        "QUERY": "text_input",
        "DECODER_QUERY": "decoder_text_input",
        "REQUEST_OUTPUT_LEN": "max_tokens",
        "BAD_WORDS_DICT": "bad_words",
        "STOP_WORDS_DICT": "stop_words",
        "EMBEDDING_BIAS_WORDS": "embedding_bias_words",
        "EMBEDDING_BIAS_WEIGHTS": "embedding_bias_weights",
        "END_ID": "end_id",
        "PAD_ID": "pad_id",
        "PROMPT_TABLE_EXTRA_ID": "prompt_table_extra_id",
    },
    {
        "REQUEST_INPUT_LEN": "_REQUEST_INPUT_LEN",
        "INPUT_ID": "_INPUT_ID",
        "REQUEST_DECODER_INPUT_LEN": "_REQUEST_DECODER_INPUT_LEN",
        "DECODER_INPUT_ID": "_DECODER_INPUT_ID",
        "REQUEST_OUTPUT_LEN": "_REQUEST_OUTPUT_LEN",
        "STOP_WORDS_IDS": "_STOP_WORDS_IDS",
        "BAD_WORDS_IDS": "_BAD_WORDS_IDS",
        "EMBEDDING_BIAS": "_EMBEDDING_BIAS",
        "OUT_END_ID": "_PREPROCESSOR_END_ID",
        "OUT_PAD_ID": "_PREPROCESSOR_PAD_ID",
        "OUT_PROMPT_TABLE_EXTRA_IDS": "_OUT_PROMPT_TABLE_EXTRA_IDS",
    },
)
_PASSED_ON = (
    "exclude_input_in_output",
    "temperature",
    "repetition_penalty",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    *RETURN_FLAGS,
    "num_return_sequences",
    "beam_width",
    "prompt_embedding_table",
    "prompt_vocab_size",
    "lora_task_id",
    "lora_weights",
    "lora_config",
    "guided_decoding_guide_type",
    "guided_decoding_guide",
)
ENGINE_MAP = (
    {
        "input_ids": "_INPUT_ID",
        "decoder_input_ids": "_DECODER_INPUT_ID",
        "input_lengths": "_REQUEST_INPUT_LEN",
        "decoder_input_lengths": "_REQUEST_DECODER_INPUT_LEN",
        "request_output_len": "_REQUEST_OUTPUT_LEN",
        "end_id": "_PREPROCESSOR_END_ID",
        "pad_id": "_PREPROCESSOR_PAD_ID",
        "embedding_bias": "_EMBEDDING_BIAS",
        "stop_words_list": "_STOP_WORDS_IDS",
        "bad_words_list": "_BAD_WORDS_IDS",
        "prompt_table_extra_ids": "_OUT_PROMPT_TABLE_EXTRA_IDS",
        "runtime_top_k": "top_k",
        "runtime_top_p": "top_p",
        "len_penalty": "length_penalty",
        "streaming": "stream",
        **{name: name for name in _PASSED_ON},
    },
    {
        "output_ids": "_TOKENS_BATCH",
        "sequence_length": "_SEQUENCE_LENGTH",
        **{tensor.name: tensor.name for tensor in (*_scores("TYPE_FP32"), *_COUNTERS)},
    },
)
POSTPROCESSING_MAP = (
    {"TOKENS_BATCH": "_TOKENS_BATCH", "SEQUENCE_LENGTH": "_SEQUENCE_LENGTH"},
    {"OUTPUT": "text_output"},
)
