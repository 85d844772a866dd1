"""What every form of the Continuum Memory System keeps to, whatever its levels."""

from __future__ import annotations

import torch

from nestlearn.nn import ContinuumMemory

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def assert_rows_are_separate(cms: ContinuumMemory) -> None:
    """Left-padded rows of three lengths, one with a reset, equal each row alone, and so does what follows."""
    width = cms.d_model
    x = torch.randn(3, 15, width, dtype=torch.float64)
    lengths = (15, 6, 12)
    padded, mask = torch.full_like(x, float("nan")), torch.zeros(3, 15, dtype=torch.bool)
    reset = torch.zeros(3, 15, dtype=torch.bool)
    for row, length in enumerate(lengths):
        padded[row, 15 - length :] = x[row, :length]
        mask[row, 15 - length :] = True
    reset[2, 3 + 5] = True  # the third row starts anew at its sixth token
    y, state = cms(padded, mask=mask, reset=reset)
    assert (y[~mask] == 0).all()
    more = torch.randn(3, 9, width, dtype=torch.float64)
    later, _ = cms(more, state)
    for row, length in enumerate(lengths):
        pieces = [x[row : row + 1, :length]] if row < 2 else [x[2:, :5], x[2:, 5:12]]
        alone = torch.cat([cms(piece)[0] for piece in pieces], 1)
        torch.testing.assert_close(y[row : row + 1, 15 - length :], alone, **TOLERANCE)
        alone, _ = cms(torch.cat([pieces[-1], more[row : row + 1]], 1))
        torch.testing.assert_close(later[row : row + 1], alone[:, -9:], **TOLERANCE)


def assert_past_and_other_rows_keep_every_bit(cms: ContinuumMemory) -> None:
    """Other tokens later, or in another row, also large or not finite ones, change no bit."""
    x = torch.randn(3, 13, cms.d_model)
    before, _ = cms(x)
    for value in (3.0, 1e30, float("nan"), float("inf")):
        changed = x.clone()
        changed[:, 7:] = value
        assert torch.equal(cms(changed)[0][:, :7], before[:, :7])
        changed = x.clone()
        changed[1] = value
        assert torch.equal(cms(changed)[0][::2], before[::2])
