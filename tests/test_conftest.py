"""What the rest of the tests relies on."""

import torch

from trm_helpers.training.devices import choose_device


def test_tests_that_are_not_for_a_gpu_see_none(trainer):
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
    assert choose_device("auto").type == trainer.device.type == "cpu"
