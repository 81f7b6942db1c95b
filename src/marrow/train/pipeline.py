"""A pipeline's step: each rank plays its list of actions; activations and gradients go between ranks.

    forward of stage s:  receive the stream from s - 1 -> compute -> send it to s + 1
    backward of stage s: receive its gradient from s + 1 -> go backward -> send the input's to s - 1

What is done when stands in `schedule.py`. Sends do not wait; each is kept until the step's end.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from marrow.loader.batch import Batch
from marrow.train.loss import Computed, Loss
from marrow.train.parallel.mesh import Mesh, rank_of
from marrow.train.parallel.schedule import BACKWARD, FORWARD, actions


class Pipeline:
    """The stages of this rank. stages: by their number among all."""

    def __init__(self, stages: dict[int, Loss], mesh: Mesh, dtype: torch.dtype) -> None:
        self.stages, self.mesh, self.dtype = stages, mesh, dtype
        self.last = mesh.size("pp") * len(stages) - 1
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def run(self, batches: Sequence[Batch], targets: int, collect: Callable[[], None]) -> float:
        """Go forward and backward through all micro-batches.

        Args: targets: of the whole step, by which the loss is divided. collect: called behind each backward.
        Returns: this rank's summed nats: 0 where it has not the last stage.
        """
        kept: dict[tuple[int, int], tuple[Tensor | None, Computed]] = {}
        nats = 0.0
        for kind, stage, micro in actions(
            self.mesh.rank("pp"), self.mesh.size("pp"), len(batches), len(self.stages)
        ):
            loss, batch, at = self.stages[stage], batches[micro], stage * len(batches) + micro
            if kind == FORWARD:
                stream_NC = None
                if stage > 0:
                    stream_NC = self._receive(loss.stream_shape(batch), stage - 1, 2 * (at - len(batches)))
                    stream_NC.requires_grad_()
                computed = loss(batch, stream_NC)
                nats += computed.nats
                if computed.stream_NC is not None:
                    self._send(computed.stream_NC.detach(), stage + 1, 2 * at)
                kept[stage, micro] = stream_NC, computed
            else:
                assert kind == BACKWARD
                stream_NC, computed = kept.pop((stage, micro))
                self._backward(computed, targets, stage, at, len(batches))
                collect()
                if stream_NC is not None:
                    assert stream_NC.grad is not None
                    self._send(stream_NC.grad, stage - 1, 2 * at + 1)
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
        return nats

    def _backward(self, computed: Computed, targets: int, stage: int, at: int, micros: int) -> None:
        roots: list[Tensor] = []
        gradients: list[Tensor | None] = []
        if computed.loss is not None:
            roots.append(computed.loss / max(1, targets))
            gradients.append(None)
        if computed.stream_NC is not None:
            shape = computed.stream_NC.shape
            roots.append(computed.stream_NC)
            gradients.append(self._receive(tuple(shape), stage + 1, 2 * (at + micros) + 1))
        torch.autograd.backward(roots, gradients)

    def _send(self, tensor: Tensor, stage: int, tag: int) -> None:
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._rank_of(stage), group=self.mesh.group("pp"), tag=tag)
        assert work is not None
        self._sent.append((work, tensor))

    def _receive(self, shape: tuple[int, ...], stage: int, tag: int) -> Tensor:
        device = next(iter(self.stages.values())).decoder.device
        tensor = torch.empty(shape, dtype=self.dtype, device=device)
        dist.recv(tensor, self._rank_of(stage), group=self.mesh.group("pp"), tag=tag)
        return tensor

    def _rank_of(self, stage: int) -> int:
        return rank_of(dict(self.mesh.place) | {"pp": stage % self.mesh.size("pp")}, self.mesh.sizes)
