import os

# Before any import of the libraries that read them: nothing may reach for the network.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

if not torch.cuda.is_available():  # before any import of Triton, which then runs its kernels in Python
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # small tensors: a second thread costs more than it gives, and tests may run side by side


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class SavedForBackward:
    """Context: counts the bytes autograd keeps, each storage once."""

    def __enter__(self):
        self._kept = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def _pack(self, tensor):
        self._kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def nbytes(self):
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


@pytest.fixture
def saved_for_backward():
    return SavedForBackward


@pytest.fixture
def graph_nodes():
    """Function: names of the autograd nodes behind a tensor, leaves left out."""

    def names(tensor):
        found, waiting = {}, [tensor.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in found:
                found[node] = node.name()
                waiting += [following for following, _ in node.next_functions]
        return sorted(name for name in found.values() if "AccumulateGrad" not in name)

    return names
