"""The loss of a micro-batch: what a decoder's piece computes from packed rows, on one rank or many.

    rows --tp--> own tokens --> embedding ... head --> sum of nats over own targets

The sum is divided by the step's targets, of all ranks and micro-batches, before the backward: k ragged
micro-batches over any ranks then give the gradient of one big batch. The logits are never whole.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from marrow.kernels.attention.attention import attention, pack
from marrow.kernels.losses.linear_cross_entropy import linear_cross_entropy
from marrow.loader.batch import Batch
from marrow.models.decoder import Attend, Decoder
from marrow.models.experts import Route, balance_loss, choose_experts
from marrow.train.parallel.mesh import Mesh

ALONE = Mesh.alone()


class Computed(NamedTuple):
    """What the forward of a stage gives.

    stream_NC: for the stage behind; None from the last. loss: what to go backward from, in summed nats, with
    the experts' balance; None where the stage has neither. nats: the cross-entropy alone, no gradient.
    """

    stream_NC: Tensor | None
    loss: Tensor | None
    nats: float


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a micro-batch over one stage of a decoder, on this rank's tokens.

    balance: weight of the experts' load-balance loss, per target: see `models/experts.py`.
    """

    decoder: Decoder
    mesh: Mesh = ALONE
    balance: float = 0.0

    def __call__(self, batch: Batch, stream_NC: Tensor | None = None) -> Computed:
        """Compute it; documents of a row do not see each other. stream_NC: from the stage before, if any."""
        terms: list[Tensor] = []
        hidden_NC = self.decoder(
            self.own(batch.tokens_N) if stream_NC is None else stream_NC,
            batch.positions_N,
            self._attend(batch),
            self._route(batch, terms),
        )
        loss, nats = None, 0.0
        if self.decoder.is_last:
            targets_N = self.own(batch.targets_N)
            loss, _ = linear_cross_entropy(hidden_NC, self.decoder.output_weight, targets_N)
            nats = float(loss.detach())
        for term in terms:
            loss = term if loss is None else loss + term
        return Computed(None if self.decoder.is_last else hidden_NC, loss, nats)

    def own(self, numbers_N: Tensor) -> Tensor:
        """Return this rank's tokens of those that tensor parallelism shares."""
        return numbers_N.chunk(self.mesh.size("tp"))[self.mesh.rank("tp")]

    def stream_shape(self, batch: Batch) -> tuple[int, int]:
        """Return the shape of what goes from stage to stage: [N, C] of this rank's tokens."""
        return batch.rows * batch.T // self.mesh.size("tp"), self.decoder.config.hidden_size

    def _attend(self, batch: Batch) -> Attend:
        """Return attention within the batch's documents."""
        packing, config = pack(batch.document_N, batch.T), self.decoder.config

        def attend(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
            return attention(q_NHD, k_NKD, v_NKD, packing, window=config.window(layer))

        return attend

    def _route(self, batch: Batch, terms: list[Tensor]) -> Route | None:
        """Return the choice of experts that also appends each layer's balance loss to `terms`.

        Under tensor parallelism each of its ranks sees all tokens and takes its share of the loss.
        """
        config = self.decoder.config
        if not config.num_experts or not self.balance:
            return None
        # Per target, as the cross-entropy is; a row of T tokens has about T targets.
        weight = self.balance * batch.T / (config.num_layers * self.mesh.size("tp"))

        def route(layer: int, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
            weights_NA, experts_NA = choose_experts(config, logits_NE)
            probabilities_NE = logits_NE.softmax(-1, dtype=torch.float32)
            terms.append(weight * balance_loss(probabilities_NE, experts_NA, batch.T))
            return weights_NA, experts_NA

        return route
