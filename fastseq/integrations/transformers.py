"""fastseq as an attention implementation of Hugging Face transformers.

register() enters two functions into transformers' tables, under one name:

    attention    in AttentionInterface: what a layer calls with its heads
    mask         in AttentionMaskInterface, see transformers_masks.py: what a model calls once for all layers

What they get, and what it means, is as for transformers' own "sdpa".
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import scaled_dot_product_attention
from ..checks import problem
from .transformers_masks import Mask, Structure, mask

# What changes the result where a model passes it, and is not computed here.
_NOT_HERE = ("head_mask", "indices", "block_indices", "sinks", "cache")


def register(name: str = "fastseq") -> None:
    """Makes `attn_implementation="fastseq"` known to transformers.

    Afterwards `AutoModel.from_config(config, attn_implementation="fastseq")`, `from_pretrained(...)` with the
    same argument, and `model.set_attn_implementation("fastseq")` use fastseq's attention in every model that
    asks transformers' AttentionInterface. It may be called again.

    Outputs and gradients are those of "eager", but for rows of padding, where eager has the mean of what is
    hidden and fastseq 0. Causal masks, sliding windows and padding on the right reach the kernels as such,
    and other padding as one row for each sequence; no mask of all queries and keys is made of them. Soft caps
    (Gemma 2), sinks (GPT-OSS), position biases with their gradients (T5) and grouped heads are computed in
    the kernel; several sequences in one row, told apart by position_ids, are packed sequences. Other masks,
    those of chunks for instance, are made by transformers as for "sdpa". So are all masks while torch.compile
    traces a model.

    Args:
        name: what `attn_implementation` will be.

    Raises:
        ImportError: transformers is not installed, or is older than 5.

    A layer called with something that it does not compute (head_mask, sparse indices, sinks that depend on
    the query, the cache of continuous batching) raises NotImplementedError.

    Example, which needs transformers:

        fastseq.integrations.transformers.register()
        config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="fastseq")
        model.generate(tokens, max_new_tokens=20)
    """
    try:
        import transformers
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            problem(
                "no transformers with AttentionInterface and AttentionMaskInterface",
                "transformers from 5 on",
                "pip install 'transformers>=5'",
            )
        ) from error
    if not {"q_length", "q_offset"} <= inspect.signature(sdpa_mask).parameters.keys():
        raise ImportError(
            problem(
                f"transformers {transformers.__version__}, whose masks are made in another way",
                "transformers from 5 on",
                "pip install 'transformers>=5'",
            )
        )
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a layer of transformers calls.

    query is (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), s_aux the sinks, (Hq,); the mask is
    what mask() returned, or one of the user's, (B, 1 or Hq, Sq, Sk): bool, True where visible, or added to
    the scores. Returned are the output (B, Sq, Hq, Dv) and the weights, if output_attentions.

    A window comes with the mask only: as for "sdpa", sliding_window says nothing that the mask does not.
    """
    for name in _NOT_HERE:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                problem(
                    f"{name} for attn_implementation='fastseq'",
                    "masks, windows, position_bias, softcap and s_aux",
                    "attn_implementation='eager' for this model",
                )
            )
    options: dict[str, Any] = {}
    structure = attention_mask.structure(query, key) if isinstance(attention_mask, Mask) else None
    if structure is not None and structure.starts is not None:
        if position_bias is None and not output_attentions:
            return _packed(query, key, value, structure, dropout, scaling, softcap, s_aux), None
        structure = None
    if structure is not None:
        key, value = key[:, :, : structure.keys], value[:, :, : structure.keys]
        if position_bias is not None:
            position_bias = position_bias[..., : structure.keys]
        attention_mask = structure.padding
        options = {"causal": structure.causal, "window": structure.window, "key_lengths": structure.lengths}
    elif isinstance(attention_mask, Mask):
        attention_mask = attention_mask.dense()
    elif attention_mask is None and query.shape[2] > 1:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        options = {"causal": "top_left" if causal else None}
    if attention_mask is not None and attention_mask.dtype not in (torch.bool, torch.float32):
        attention_mask = attention_mask.to(query.dtype)
    if position_bias is not None:
        attention_mask = _with_bias(position_bias.to(query.dtype), attention_mask)
    result = scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        scale=scaling,
        enable_gqa=True,
        softcap=softcap,
        sinks=s_aux,
        return_weights=bool(output_attentions),
        **options,
    )
    output, weights = result if output_attentions else (result, None)
    return output.transpose(1, 2).contiguous(), weights


def _with_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """One mask that is added to the scores; the gradient of the bias goes through it."""
    if mask is None:
        return bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype is torch.bool else bias + mask


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    structure: Structure,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The output, (B, S, Hq, Dv), of rows that hold several sequences each, of which none sees another."""
    output = scaled_dot_product_attention(
        *(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)),
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=True,
        causal=structure.causal,
        window=structure.window,
        softcap=softcap,
        sinks=sinks,
        cu_seqlens_q=structure.starts,
        cu_seqlens_k=structure.starts,
    )
    return output.unflatten(0, (query.shape[0], query.shape[2])).contiguous()
