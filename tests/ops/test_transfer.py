import torch

from detr_exp.ops.transfer import filled, to_device


def test_filled_are_the_same_numbers_as_those_of_a_copy():
    made = filled([3, -1, 2**40], torch.device("cpu"))
    assert made.dtype == torch.int64
    assert made.equal(torch.tensor([3, -1, 2**40]))


def test_arrays_and_tensors_of_the_host_are_not_copied_for_the_host():
    tensor = torch.arange(4)
    assert to_device(tensor, torch.device("cpu")) is tensor
    assert to_device(tensor.numpy(), torch.device("cpu")).data_ptr() == tensor.data_ptr()
