"""What the fused heads share: how many rows of logits are in memory at once, and sums over the chunks.

Axes: N rows, M rows of a chunk, C channels, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Logits in memory at once. CPU: 8 MiB of bf16. CUDA: 512 MiB of bf16, 2048 rows of a vocabulary of 128k:
# each chunk reads the whole head three times and its gradient twice, which 2048 rows of FLOPs outweigh.
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}
# Fewer rows make matrix products, and sums of the head's gradient, that are bound by memory.
# PERF: CPU, loss and gradients, bf16, one core. 8192 rows, C 256, V 4096, time against chunks of 2^22: 2^18
# 2.4, 2^20 1.15, 2^21 1.03, 2^23 1.03. 2048 rows, C 512, V 32768, time against 512 rows: 128 1.8, 256 1.4,
# 1024 0.9; C 192, V 50304: 128 1.8, 256 1.25, 1024 1.1.
MIN_ROWS = 512
_ROWS_STEP = 128  # whole tiles of a matrix product


def chunks(num_rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Yield the rows of each chunk."""
    rows = CHUNK_LOGITS.get(device.type, CHUNK_LOGITS["cuda"]) // vocab_size
    rows = max(MIN_ROWS, rows // _ROWS_STEP * _ROWS_STEP)
    for start in range(0, num_rows, rows):
        yield slice(start, min(num_rows, start + rows))


class WeightGradient:
    """The sum of grad_MV^T @ hidden_MC over chunks, in fp32: in bf16 the sum would lose the small ones."""

    def __init__(self, grad_VC: Tensor) -> None:
        """`grad_VC` is what `finish` fills; a view of what the operator returns."""
        self._grad_VC, self._sum_VC = grad_VC, None

    _grad_VC: Tensor
    _sum_VC: Tensor | None

    def add(self, grad_MV: Tensor, hidden_MC: Tensor, *, is_only: bool) -> None:
        """Add a chunk; the only one needs no sum."""
        wide = torch.promote_types(hidden_MC.dtype, torch.float32)
        grad_VM = grad_MV.T
        if is_only:
            torch.mm(grad_VM, hidden_MC, out=self._grad_VC)
        elif hidden_MC.is_cuda and hidden_MC.dtype != wide:  # fp32 sums inside the matrix product
            if self._sum_VC is None:
                self._sum_VC = torch.empty_like(self._grad_VC, dtype=wide)
                torch.mm(grad_VM, hidden_MC, out_dtype=wide, out=self._sum_VC)
            else:
                torch.addmm(self._sum_VC, grad_VM, hidden_MC, out_dtype=wide, out=self._sum_VC)
        elif self._sum_VC is None:
            self._sum_VC = torch.mm(grad_VM, hidden_MC).to(wide)
        else:
            self._sum_VC += torch.mm(grad_VM, hidden_MC)

    def finish(self) -> None:
        """Round the sum to the gradient's dtype."""
        if self._sum_VC is not None:
            self._grad_VC.copy_(self._sum_VC)
