"""What RNN, LSTM and GRU share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from ..checks import problem
from ..recurrent_checks import check_options, check_resets, check_state_ranks, two_states


def _check_batch(hx: Any, mode: str, batch: int) -> None:
    """Raises where the states' rows could not be put into another order."""
    states = two_states(hx) if mode == "LSTM" else (hx,)
    check_state_ranks(states, 3)
    for state in states:
        if state.shape[1] < batch:
            raise RuntimeError(
                problem(
                    f"hx of shape {tuple(state.shape)} for a packed batch of {batch}",
                    f"shape (layers * directions, {batch}, size)",
                    "a state for each sequence of the PackedSequence",
                )
            )


class RecurrentModule(RNNBase):
    """torch.nn's parameters, names and initial values, without its flat buffer of weights.

    RNNBase keeps a second list of its weights for cuDNN. Here the parameters are looked up by name at every
    call, so that parametrized, tied, replaced and functional parameters are seen; all that serves that list
    is undone.
    """

    # Modules that were pickled, or made of torch.nn's, before these were there have none of them.
    grad_clip: float | None = None
    truncate: int | None = None
    memory: str = "fast"

    def _set_options(self, grad_clip: float | None, truncate: int | None, memory: str) -> None:
        check_options(grad_clip=grad_clip, truncate=truncate, memory=memory)
        self.grad_clip, self.truncate, self.memory = grad_clip, truncate, memory

    def extra_repr(self) -> str:
        options = {"grad_clip": self.grad_clip, "truncate": self.truncate}
        more = [f", {name}={value!r}" for name, value in options.items() if value is not None]
        more += [f", memory={self.memory!r}"] * (self.memory != "fast")
        return super().extra_repr() + "".join(more)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Any]:
        if not isinstance(input, PackedSequence):
            return self._run(input, hx, None, lengths=lengths, resets=resets)
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is not None:
            if sorted_indices is not None:
                _check_batch(hx, self.mode, sorted_indices.shape[0])
            hx = self.permute_hidden(hx, sorted_indices)
        if resets is not None and sorted_indices is not None:
            check_resets(resets, batch_sizes)
            resets = resets.index_select(1, sorted_indices)
        output, hidden = self._run(data, hx, batch_sizes, lengths=lengths, resets=resets)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden(hidden, unsorted_indices)

    def _run(
        self, input: Tensor, hx: Any, batch_sizes: Tensor | None, **rows: Tensor | None
    ) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def _shared(self) -> dict[str, Any]:
        """What functional.rnn, lstm and gru all take."""
        return {
            "bidirectional": self.bidirectional,
            "batch_first": self.batch_first,
            "dropout": self.dropout,
            "training": self.training,
            "grad_clip": self.grad_clip,
            "truncate": self.truncate,
            "memory": self.memory,
        }

    def _weights(self) -> list[list[Tensor]]:
        parameters = self._parameters
        try:
            return [[parameters[name] for name in names] for names in self._all_weights]  # type: ignore[misc]
        except KeyError:  # parametrized, or replaced by a plain tensor
            return self.all_weights

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """The state, or both states, with the batch in another order."""
        if permutation is None:
            return hx
        if isinstance(hx, Tensor):
            return hx.index_select(1, permutation)
        return tuple(state.index_select(1, permutation) for state in hx)

    def flatten_parameters(self) -> None:
        """Does nothing: the weights need not lie in one buffer. It is here because torch.nn has it."""

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass

    __setattr__ = nn.Module.__setattr__
    __setstate__ = nn.Module.__setstate__
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()
