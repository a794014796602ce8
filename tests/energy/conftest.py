import pytest
import torch

from snlp_zoo.layers import pack
from snlp_zoo.registry import build


def make_model(entry, *, packed=False, **overrides):
    """A classifier whose amplitudes have seen one training batch, in evaluation mode."""
    torch.manual_seed(0)
    model = build(entry, **overrides)
    with torch.no_grad():
        model.train()(torch.randint(5, 100, (4, 12)))
    return pack(model.eval(), int8_embeddings=False) if packed else model.eval()


def make_batch(*lengths, width=None):
    """Texts of these lengths, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    width = width or max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    return {
        "input_ids": torch.randint(5, 100, (len(lengths), width), generator=generator) * mask,
        "attention_mask": mask,
    }


@pytest.fixture
def model_of():
    return make_model


@pytest.fixture
def batch_of():
    return make_batch
