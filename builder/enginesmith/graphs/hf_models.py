"""Hugging Face encoders as models to export: text in, an embedding, classes or a score out.

The original is the checkpoint's own class in float32 with its own attention; what is exported is the same weights
with attention in plain arithmetic, which gives a smaller graph and operators that every runtime fuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from enginesmith.errors import SourceError
from enginesmith.graphs.original import Arrays, Original
from enginesmith.graphs.pooling import Head, Normalize, Pooling, head_of
from enginesmith.graphs.samples import pad_id_of, text_input_names
from enginesmith.graphs.signature import AxisRange, GraphTensor
from enginesmith.torch_models import third_party_warnings

_FULL_ATTENTION = frozenset(("bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"))
"""Model types that add a float mask [batch, 1, 1, sequence] to their attention scores and have no other mask
(transformers 5; ModernBERT slides a window, DeBERTa computes with the mask)."""
_TOKEN_TYPES = frozenset(("bert", "electra", "camembert", "roberta", "xlm-roberta"))
"""Model types that add ``token_type_embeddings(token_type_ids)`` to the words'; one row of zeros broadcasts."""
_LONGEST_PROBE = 1024
"""Attention needs memory with the square of the length; what is right up to here is right beyond."""
_MASKED = -1e4
"""What is added to the score of padding: e^-10000 is 0 in every float format, and float16 can hold the number."""


def original_of_checkpoint(checkpoint: Path, params: Mapping[str, Any]) -> Original:
    """The model in ``checkpoint`` doing ``params["task"]``.

    Raises:
        SourceError: transformers cannot load it, weights are missing, or its head is of an unknown kind.
    """
    task = params["task"]
    model = _load(checkpoint, task)
    names = text_input_names(checkpoint, task)
    longest = int(params["max_sequence_length"])
    head: nn.Module
    if task == "embedding":
        described = head_of(checkpoint, pooling=params["pooling"], normalize=params["normalize"])
        head, output = EmbeddingHead(described), "embedding"
        facts = {"pooling": described.pooling, "normalize": described.normalize, "head": described.source}
    else:
        head, output, facts = _class_head(model, task, probabilities=bool(params["probabilities"]))
    graph = EncoderGraph(model, head, names)

    def run(feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        with torch.no_grad(), third_party_warnings():
            (result,) = graph(*(torch.from_numpy(feeds[name]) for name in names))
        return {output: result.numpy()}

    return Original(
        inputs=tuple(GraphTensor(name, "int64", ("batch", "sequence")) for name in names),
        outputs=(output,),
        axes={"sequence": AxisRange(1, max(1, longest // 4), longest)},
        run=run,
        exportable=graph.in_plain_arithmetic,
        what=f"{model.config.architectures[0]}",
        labels=_labels(model) if task == "classification" else (),
        pad_id=pad_id_of(checkpoint),
        longest_probe=_LONGEST_PROBE,
        facts={**facts, "architecture": model.config.architectures[0], "model_type": model.config.model_type},
    )


class EncoderGraph(nn.Module):  # type: ignore[misc]  # torch is not followed.
    """An encoder with what the task makes of its output. ``forward`` takes the graph's inputs in order."""

    def __init__(self, model: Any, head: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self._names = names
        self._plain = False

    def in_plain_arithmetic(self) -> EncoderGraph:
        """The same function, from now on with attention as products, sums and one softmax."""
        with third_party_warnings():
            self.model.set_attn_implementation("eager")
        self._plain = True
        return self

    def forward(self, *inputs: Any) -> tuple[Any]:
        """One output: [batch, hidden] or [batch, classes]."""
        arguments = dict(zip(self._names, inputs, strict=True))
        mask = arguments["attention_mask"]
        kind = self.model.config.model_type
        if self._plain and kind in _FULL_ATTENTION:
            arguments["attention_mask"] = (1.0 - mask[:, None, None, :].to(torch.float32)) * _MASKED
        if self._plain and kind in _TOKEN_TYPES and "token_type_ids" not in arguments:
            arguments["token_type_ids"] = torch.zeros((1, 1), dtype=torch.int64)
        return (self.head(self.model(**arguments), mask),)


class EmbeddingHead(nn.Module):  # type: ignore[misc]  # torch is not followed.
    """Pooling and normalization."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.pooling = Pooling(head.pooling)
        self.normalize = Normalize() if head.normalize else None

    def forward(self, outputs: Any, mask: Any) -> Any:
        """float32 [batch, hidden]."""
        vectors = self.pooling(outputs.last_hidden_state, mask)
        return vectors if self.normalize is None else self.normalize(vectors)


class ClassHead(nn.Module):  # type: ignore[misc]  # torch is not followed.
    """Logits, or probabilities made of them."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, outputs: Any, mask: Any) -> Any:  # noqa: ARG002 - all heads are called alike.
        """float32 [batch, classes]."""
        return self.activation(outputs.logits)


def _class_head(model: Any, task: str, *, probabilities: bool) -> tuple[nn.Module, str, dict[str, Any]]:
    classes = model.config.num_labels
    activation: nn.Module = nn.Identity()
    if probabilities:
        independent = classes == 1 or model.config.problem_type == "multi_label_classification"
        activation = nn.Sigmoid() if independent else nn.Softmax(dim=-1)
    output = "probabilities" if probabilities else "logits"
    facts = {"classes": classes, "activation": type(activation).__name__.lower()}
    return ClassHead(activation), "score" if task == "reranking" else output, facts


def _labels(model: Any) -> tuple[str, ...]:
    labels = model.config.id2label
    return tuple(str(labels[index]) for index in range(model.config.num_labels))


def _load(checkpoint: Path, task: str) -> Any:
    """The float32 model in evaluation mode, with every weight of the task from the checkpoint."""
    import transformers

    wanted = (
        transformers.AutoModel if task == "embedding" else transformers.AutoModelForSequenceClassification
    )
    transformers.utils.logging.disable_progress_bar()
    try:
        with third_party_warnings():
            model, found = wanted.from_pretrained(
                checkpoint, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SourceError(
            f"transformers cannot load checkpoint {checkpoint} for task {task}: {str(error).strip().splitlines()[0]}",
            hint="embedding takes an encoder, classification and reranking a model for sequence classification",
        ) from error
    # An embedding is pooled by us; a pooler on top of the encoder is not used, whether it is stored or not.
    missing = sorted(
        name for name in found["missing_keys"] if task != "embedding" or not name.startswith("pooler.")
    )
    if missing:
        raise SourceError(
            f"checkpoint {checkpoint} has no weight {missing[0]}, which {type(model).__name__} needs ({len(missing)} are missing)",
            hint="its config.json and its weights belong to different models, or the checkpoint is not made for this task",
        )
    return model.requires_grad_(False).eval()
