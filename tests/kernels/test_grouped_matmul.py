"""Rows of experts: each expert multiplies its own, and one without rows changes nothing."""

import torch

from keysieve.kernels.reference import grouped_matmul


def test_every_expert_multiplies_its_own_rows():
    rows, weight = torch.randn(7, 5), torch.randn(4, 5, 3)
    found = grouped_matmul(rows, weight, torch.tensor([2, 2, 6, 7]))
    for row, expert in enumerate([0, 0, 2, 2, 2, 2, 3]):
        torch.testing.assert_close(found[row], rows[row] @ weight[expert])


def test_no_rows_at_all():
    assert grouped_matmul(torch.zeros(0, 5), torch.randn(2, 5, 3), torch.tensor([0, 0])).shape == (0, 3)
