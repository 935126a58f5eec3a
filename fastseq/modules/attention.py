from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import scaled_dot_product_attention
from ..attention_checks import is_causal_bias
from ..checks import problem, require_tensor


def must_be_called(module: nn.Module, inputs: Any) -> None:
    """A hook that does nothing: torch's layers call a module that has one, see MultiheadAttention."""


class MultiheadAttention(nn.MultiheadAttention):
    r"""Attention with several heads, in place of `torch.nn.MultiheadAttention`.

    Each head h has its own rows of the projections, and every query looks at every key:

        q = W_q query + b_q      k = W_k key + b_k      v = W_v value + b_v      cut into H heads of D = E / H
        weights_h = dropout(softmax(q_h k_h^T / sqrt(D) + mask))                 softmax over the keys
        output = W_o concatenate(weights_1 v_1, ..., weights_H v_H) + b_o

    A. Vaswani et al., Attention is all you need, NeurIPS 2017.

    Args:
        embed_dim: features of the query and of the output, E.
        num_heads: heads, H; must divide embed_dim.
        dropout: probability of zeroing an attention weight, in training.
        bias: whether the projections have b_q, b_k, b_v and b_o.
        add_bias_kv: whether every sequence of keys gets one more key and value at its end, which are learnt.
        add_zero_attn: whether it gets one more, of zeros, at its very end.
        kdim, vdim: features of key and value; embed_dim if None.
        batch_first: whether batched inputs and the output are (B, length, features).
        device, dtype: of the parameters: float32, float64, bfloat16 or float16.

    Inputs:
        - `query`: (L, B, E); (B, L, E) if `batch_first`; (L, E) for one sequence without a batch.
        - `key`: (S, B, kdim), likewise.
        - `value`: (S, B, vdim), likewise. Self-attention is fastest with one tensor for all three: it has one
          product with W_q, W_k and W_v together.
        - `key_padding_mask`: (B, S), or (S) without a batch. bool: True is a key that nobody sees. Float:
          added to the scores.
        - `need_weights`: whether the weights are returned. Without them no L x S matrix is made of them.
        - `attn_mask`: (L, S), or `(B*H, L, S)` for a mask of each sequence and head. bool: True is NOT
          allowed, the reverse of what `fastseq.scaled_dot_product_attention` takes. Float: added to the
          scores; has a gradient.
        - `average_attn_weights`: whether the weights returned are the mean over the heads.
        - `is_causal`: says that attn_mask is the causal one, that is, query i sees the keys up to i. It is
          then not read (unless it requires a gradient), which is faster, and need not be given.

    Nested tensors are taken too, with batch_first, without weights, masks and add_bias_kv: then no time is
    spent on padding.

    Returns:
        output, weights: the output has the shape of query. The weights, None unless need_weights, are
        (B, L, S), or (B, H, L, S) if average_attn_weights is False, without B for an input without a batch.
        They are those that the output was made of, after dropout, and have gradients. S counts the keys
        that add_bias_kv and add_zero_attn add.

    Raises:
        ValueError: sizes below 1, in the constructor.
        AssertionError: num_heads that does not divide embed_dim; inputs or masks of the wrong rank, a query
            of other than E features, key and value of different lengths, a key_padding_mask of the wrong
            shape or a mask of integers; a nested tensor beside what it cannot be combined with.
        RuntimeError: an attn_mask of the wrong shape, other wrong sizes, mixed dtypes or devices; or a third
            derivative.
        NotImplementedError: a device, or a tensor layout, for which there is no kernel.

    Attributes:
        in_proj_weight: (3E, E), rows in the order q, k, v; None if kdim or vdim differ from embed_dim, then
            q_proj_weight (E, E), k_proj_weight (E, kdim) and v_proj_weight (E, vdim).
        in_proj_bias: (3E), or None.
        out_proj: torch.nn.Linear, (E, E) and (E). It is called as a module, so its hooks run.
        bias_k, bias_v: (1, 1, E), or None.
        All start as in torch.nn for the same seed; state_dicts go both ways.

    Differences from torch.nn: a query that sees no key gets b_o, weights of 0 and gradients of 0, where torch
    has NaN if need_weights, in the gradients of all parameters too. With is_causal, an attn_mask beside it is
    not read, as where torch has need_weights=False. NaN in a masked key or value reaches no output. A bool
    mask beside a float one is no cause for a warning. In `torch.nn.TransformerEncoderLayer` this
    module is called in inference too; torch.nn's own is bypassed there.

    Saved for the backward pass, when any gradient is needed: the inputs, the projections q, k and v, the
    mask, the output of the heads, in 16-bit dtypes what rounding took from it, and two numbers for each row
    of each softmax, 2 * B * H * L elements; the weights only if need_weights.

    Example:
        >>> attention = fastseq.MultiheadAttention(embed_dim=16, num_heads=4, batch_first=True)
        >>> x = torch.randn(2, 5, 16)
        >>> padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        >>> output, weights = attention(x, x, x, key_padding_mask=padding)
        >>> output.shape, weights.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]))
        >>> output.sum().backward()
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        # In inference torch.nn.TransformerEncoderLayer takes the parameters out of its self_attn and computes
        # the whole layer itself, unless a module in it has a hook: then somebody wants that module called.
        self.register_forward_pre_hook(must_be_called)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
            for name, given in (("query", query), ("key", key), ("value", value)):
                require_tensor(name, given)
        if query.is_nested or key.is_nested or value.is_nested:
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, is_causal
            )
        batched = query.dim() == 3
        self._check_inputs(query, key, value)
        _check_mask("key_padding_mask", key_padding_mask, (2,) if batched else (1,))
        _check_mask("attn_mask", attn_mask, (2, 3))

        q, k, v = (self._split(x, batched) for x in self._project(query, key, value))
        # A key of zeros has the score 0 and its value adds nothing: a sink, unless weights have to show it.
        zeros = self.add_zero_attn and need_weights
        sinks = q.new_zeros(self.num_heads) if self.add_zero_attn and not need_weights else None
        extra_keys = (self.bias_k is not None) + zeros
        if attn_mask is not None:  # also where it is not read
            _check_attn_mask_shape(attn_mask, q, k)
        if is_causal and not extra_keys and (attn_mask is None or not attn_mask.requires_grad):
            attn_mask = None
        elif is_causal:  # as a mask, for the kernel's diagonal would hide the extra keys
            is_causal = False
            if attn_mask is None:
                attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        mask = _merge(key_padding_mask, attn_mask, q, k, extra_keys)
        if extra_keys:
            k, v = _extend(k, self.bias_k, zeros), _extend(v, self.bias_v, zeros)

        dropout = self.dropout if self.training else 0.0
        result = scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            dropout,
            is_causal,
            sinks=sinks,
            return_weights=need_weights,
            average_weights=average_attn_weights,
        )
        output, weights = result if need_weights else (result, None)
        if weights is not None:
            weights = weights if batched else weights.squeeze(0)
        sequence_first = batched and not self.batch_first
        output = output.permute(2, 0, 1, 3) if sequence_first else output.transpose(1, 2)
        output = self.out_proj(output.flatten(-2))
        return output if batched else output.squeeze(0), weights

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, None]:
        """As one packed sequence. torch.nn.TransformerEncoder makes nested tensors of padded batches."""
        obstacles = {
            "key_padding_mask": key_padding_mask is not None,
            "attn_mask": attn_mask is not None,
            "need_weights": need_weights,
            "add_bias_kv": self.bias_k is not None,
            "batch_first=False": not self.batch_first,
            "a tensor that is not": not (query.is_nested and key.is_nested and value.is_nested),
        }
        if any(obstacles.values()):
            raise AssertionError(
                problem(
                    "a nested tensor beside " + ", ".join(name for name, there in obstacles.items() if there),
                    "nested query, key and value, need_weights=False, batch_first=True, nothing else",
                    "x.to_padded_tensor(0.0) and a key_padding_mask",
                )
            )
        packed_query = _pack(query)
        packed_key = packed_query if key is query else _pack(key)
        packed_value = packed_key if value is key else _pack(value)
        if value is not key and not torch.equal(packed_key[1], packed_value[1]):
            raise AssertionError(
                problem("nested key and value of different lengths", "the same lengths", "check both")
            )
        q, k, v = self._project(packed_query[0], packed_key[0], packed_value[0])
        output = scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            sinks=q.new_zeros(self.num_heads) if self.add_zero_attn else None,
            cu_seqlens_q=packed_query[1],
            cu_seqlens_k=packed_key[1],
        )
        return _unpack(self.out_proj(output.flatten(-2)), packed_query[1], query), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """q, k and v as (..., H, D), those of one tensor as views of one product."""
        heads, bias = (self.num_heads, self.head_dim), self.in_proj_bias
        if self._qkv_same_embed_dim:
            weight = self.in_proj_weight
            if query is key and key is value:
                return F.linear(query, weight, bias).unflatten(-1, (3, *heads)).unbind(-3)
            if key is value:
                sizes = (self.embed_dim, 2 * self.embed_dim)
                w_q, w_kv = weight.split(sizes)
                b_q, b_kv = (None, None) if bias is None else bias.split(sizes)
                k, v = F.linear(key, w_kv, b_kv).unflatten(-1, (2, *heads)).unbind(-3)
                return F.linear(query, w_q, b_q).unflatten(-1, heads), k, v
            weights = weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None, None, None) if bias is None else bias.chunk(3)
        given = zip((query, key, value), weights, biases, strict=True)
        return [F.linear(x, w, b).unflatten(-1, heads) for x, w, b in given]

    def _split(self, x: Tensor, batched: bool) -> Tensor:
        """A projection as (B, H, length, D), a view that the kernels take as it lies in memory."""
        if not batched:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raises what torch.nn.MultiheadAttention raises, in three lines."""
        rank = query.dim()
        if rank not in (2, 3) or key.dim() != rank or value.dim() != rank:
            raise AssertionError(
                problem(
                    _shapes(query, key, value),
                    "3 dimensions each, or 2 each without a batch",
                    "query.unsqueeze(...)",
                )
            )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                problem(
                    f"query of shape {tuple(query.shape)}, with {query.shape[-1]} features",
                    f"embed_dim={self.embed_dim} features in the last dimension",
                    f"a query of shape (..., {self.embed_dim}), or embed_dim={query.shape[-1]}",
                )
            )
        compared = None if self._qkv_same_embed_dim else -1
        if key.shape[:compared] != value.shape[:compared]:
            raise AssertionError(
                problem(
                    _shapes(query, key, value),
                    "key and value of the same " + ("shape" if compared is None else "lengths and batch"),
                    "check both",
                )
            )
        for name, x, size in (("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != size:
                raise (RuntimeError if self._qkv_same_embed_dim else AssertionError)(
                    problem(
                        f"{name} of shape {tuple(x.shape)}, with {x.shape[-1]} features",
                        f"{name[0]}dim={size} features in the last dimension",
                        f"a {name} of shape (..., {size}), or {name[0]}dim={x.shape[-1]}",
                    )
                )
        batch = 0 if self.batch_first else 1
        if rank == 3 and query.shape[batch] != key.shape[batch]:
            raise RuntimeError(
                problem(
                    _shapes(query, key, value),
                    f"one batch size in dimension {batch}, for batch_first={self.batch_first}",
                    "key.expand(...), or the other batch_first",
                )
            )


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return (
        f"query of shape {tuple(query.shape)}, key of shape {tuple(key.shape)}, "
        f"value of shape {tuple(value.shape)}"
    )


def _check_mask(name: str, mask: Tensor | None, ranks: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(
            problem(f"{name} of dtype {mask.dtype}", "torch.bool or floats", f"{name}.bool()")
        )
    if is_causal_bias(mask):
        raise TypeError(problem(f"{name} of type CausalBias", "a mask of its own elements", "is_causal=True"))
    if mask.dim() not in ranks:
        raise AssertionError(
            problem(
                f"{name} with {mask.dim()} dimensions",
                f"{' or '.join(map(str, ranks))} beside this query",
                f"{name}.reshape(...)",
            )
        )


def _check_mask_shape(
    name: str, mask: Tensor, shape: tuple[int, ...], meaning: str, error: type[Exception]
) -> None:
    if mask.shape != shape:
        raise error(
            problem(
                f"{name} of shape {tuple(mask.shape)}",
                f"shape {shape}, that is {meaning}",
                f"check the sizes, and the order of the dimensions, of {name}",
            )
        )


def _check_attn_mask_shape(mask: Tensor, q: Tensor, k: Tensor) -> None:
    (batch, heads, queries), keys = q.shape[:3], k.shape[2]
    if mask.dim() == 2:
        _check_mask_shape("attn_mask", mask, (queries, keys), "(L, S)", RuntimeError)
    else:
        shape = (batch * heads, queries, keys)
        _check_mask_shape("attn_mask", mask, shape, "(B * num_heads, L, S)", RuntimeError)


def _merge(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor, k: Tensor, extra_keys: int
) -> Tensor | None:
    """Both masks as one that can be broadcast to (B, H, L, S), no larger than it must be.

    Two of bool stay bool, with True for what is allowed, as the kernels have it. The extra keys are seen.
    """
    batch, heads, keys = q.shape[0], q.shape[1], k.shape[2]
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads)))
    if key_padding_mask is not None:
        padding = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask.unsqueeze(0)
        _check_mask_shape("key_padding_mask", padding, (batch, keys), "(B, S)", AssertionError)
        masks.append(padding[:, None, None, :])
    if not masks:
        return None
    if extra_keys:
        masks = [F.pad(mask, (0, extra_keys)) for mask in masks]
    hidden = [mask for mask in masks if mask.dtype == torch.bool]
    added = [mask for mask in masks if mask.dtype != torch.bool]
    if not added:
        return ~(hidden[0] if len(hidden) == 1 else hidden[0] | hidden[1])
    bias = added[0] if len(added) == 1 else added[0] + added[1]
    return bias if not hidden else torch.where(hidden[0], -math.inf, bias)


def _extend(x: Tensor, bias: Tensor | None, zeros: bool) -> Tensor:
    """Keys or values (B, H, S, D) with the learnt one, and the one of zeros, at their end."""
    batch, heads, _, size = x.shape
    rows = [x]
    if bias is not None:
        rows.append(bias.to(x.dtype).view(1, heads, 1, size).expand(batch, -1, -1, -1))
    if zeros:
        rows.append(x.new_zeros(batch, heads, 1, size))
    return torch.cat(rows, dim=2)


def _pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences of a nested tensor one behind the other, and where each begins and the last ends."""
    if x.layout == torch.jagged:
        x = x.contiguous()
        return x.values(), x.offsets()
    sequences = x.unbind()
    ends = torch.tensor([0] + [sequence.shape[0] for sequence in sequences], device=x.device).cumsum(0)
    return torch.cat(sequences), ends


def _unpack(rows: Tensor, offsets: Tensor, like: Tensor) -> Tensor:
    """The opposite of _pack."""
    if like.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(rows, offsets)
    lengths = [sequence.shape[0] for sequence in like.unbind()]
    return torch.nested.as_nested_tensor(list(rows.split(lengths)))
