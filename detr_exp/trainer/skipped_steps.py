"""Steps whose loss or gradients were not finite: they changed no weights, and too many in a row end the run."""

from __future__ import annotations

import torch

from detr_exp.trainer import distributed
from detr_exp.trainer.checkpoint_content import NonFiniteError
from detr_exp.trainer.settings import Settings
from detr_exp.trainer.state import State, floating_buffers


def check_skipped_steps(settings: Settings, state: State) -> int:
    """Read which steps since the last call were skipped, and undo their changes of batch statistics.

    Returns:
        the number of skipped steps.

    Raises:
        NonFiniteError: `nonfinite_limit` skipped steps in a row, or all steps of a shorter run.
    """
    if not state.unread:
        return 0
    flags = torch.stack([skipped for _, _, skipped in state.unread]).tolist()
    buffers = floating_buffers(state.network)
    if any(flags):
        # forward passes with NaN put it into the running statistics; restore those of the last interval without one
        for buffer, good in zip(buffers, state.good_buffers):
            buffer.copy_(good)
    else:
        state.good_buffers = [buffer.clone() for buffer in buffers]
    for (step, image_ids, _), flag in zip(state.unread, flags):
        state.bad_in_a_row = state.bad_in_a_row + 1 if flag else 0
        if state.bad_in_a_row >= min(settings.nonfinite_limit, state.total_steps):
            all_ids = [i for ids in distributed.gather(image_ids[:16]) for i in ids]
            raise NonFiniteError(
                f"loss or gradients were not finite in {state.bad_in_a_row} steps in a row, the last at step "
                f"{step} on images {all_ids}; the weights are those before these steps. Lower optim.lr, or try "
                "trainer.hardware.amp=null"
            )
    state.unread.clear()
    return int(sum(flags))
