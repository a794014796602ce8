"""On a CUDA device: ops equal their CPU results, SpikeLM trains under bfloat16 autocast. Run with `pytest -m gpu`."""

import pytest
import torch

import snlp_zoo
from snlp_zoo.ops import elastic_bispike, lif

pytestmark = pytest.mark.gpu


def run(op, device, shape, **options):
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(shape, generator=generator).to(device).requires_grad_()
    v_init = torch.randn(shape[1:], generator=generator).to(device).requires_grad_()
    output = op(current, v_init, **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()})
    grads = [torch.randn(t.shape, generator=generator).to(device) for t in output]
    return [t.cpu() for t in (*output, *torch.autograd.grad(output, [current, v_init], grads))]


@pytest.mark.parametrize("shape", [(1, 1), (4, 3, 17, 33), (7, 2, 100)])
@pytest.mark.parametrize(
    ("op", "options"),
    [
        (lif, {"tau": 2.0, "v_threshold": 1.0}),
        (lif, {"tau": 2.0, "v_threshold": 0.5, "v_reset": None, "decay_input": False, "detach_reset": False}),
        (elastic_bispike, {"reset": "symmetric"}),
        (elastic_bispike, {"reset": "reference"}),
    ],
)
def test_op_equals_cpu(op, options, shape):
    if op is elastic_bispike:
        options = options | {"alpha": torch.linspace(0.5, 1.5, shape[0])}
    here, there = run(op, "cpu", shape, **options), run(op, "cuda", shape, **options)
    assert torch.equal(here[0], there[0])
    for a, b in zip(here[1:], there[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_model_equals_cpu():
    model = snlp_zoo.build("spikelm_tiny").double()
    ids = torch.randint(1, 120, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    here = model(ids, mask).logits
    torch.testing.assert_close(model.cuda()(ids.cuda(), mask.cuda()).logits.cpu(), here)


@pytest.mark.parametrize("alpha_mode", ["first_batch", "ema", "learned"])
def test_bfloat16_autocast_step_lowers_the_loss(alpha_mode):
    torch.manual_seed(0)
    model = snlp_zoo.build("spikelm_tiny", alpha_mode=alpha_mode).cuda().train()
    ids, labels = torch.randint(1, 120, (8, 12), device="cuda"), torch.arange(8, device="cuda") % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.isfinite(torch.stack([p.norm() for p in model.parameters()])).all()
