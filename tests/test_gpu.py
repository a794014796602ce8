"""On a CUDA device: what only a device shows of the kernels, SpikeLM under bfloat16 autocast. Run with `pytest -m gpu`.

That a kernel equals its reference is tested in ops/test_kernels.py, there on a device too.
"""

from importlib.util import find_spec

import pytest
import torch

import snlp_zoo
from snlp_zoo.ops import elastic_bispike, lif
from snlp_zoo.ops.backend import KERNELS, resolve

pytestmark = pytest.mark.gpu
MEMBRANE = {"tau": 2.0, "v_threshold": 1.0}


@pytest.fixture(params=KERNELS)
def backend(request):
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


def ternary(current, v_init=None, **options):
    return elastic_bispike(current, v_init, torch.ones(len(current), device=current.device), **options)


def binary(current, v_init=None, **options):
    return lif(current, v_init, **MEMBRANE, **options)


OPS = pytest.mark.parametrize("op", [ternary, binary])


def outcome(op, current, v_init, weight, **options):
    """Spikes, membrane, and the gradients of both inputs where every spike weighs `weight`."""
    output = op(current, v_init, **options)
    return [*output, *torch.autograd.grad(output, [current, v_init], [weight, torch.ones_like(output.v)])]


@pytest.mark.parametrize("op", ["lif", "bispike"])
def test_auto_takes_a_kernel(op):
    if not any(find_spec(kernel) for kernel in KERNELS):
        pytest.skip("no kernel is installed")
    assert resolve("auto", torch.zeros(1, device="cuda"), op) in KERNELS


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2**17, 2**18, 2**20 + 8, 2**18 + 2, 2**18 + 1])
def test_large_inputs_of_any_alignment(backend, op, size, dtype):
    for steps, offset in ((4, 0), (4, 1), (3, 8), (18, 0)):
        flat = torch.randn(2, steps * size + offset, device="cuda").to(dtype)
        current, weight = (x[offset:].view(steps, size).requires_grad_() for x in flat)
        v_init = torch.randn(size + offset, device="cuda")[offset:].requires_grad_()
        got = outcome(op, current, v_init, weight, backend=backend)
        expected = outcome(op, current, v_init, weight, backend="torch")
        assert torch.equal(got[0], expected[0])
        precision = max(1e-5, torch.finfo(dtype).eps)
        for one, other in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=precision, atol=precision)


@OPS
def test_more_elements_than_32_bits_count(backend, op):
    steps, size = 5, 2**29 + 8
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    current = torch.empty(steps, size, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    spikes, v = op(current, backend=backend)
    (grad,) = torch.autograd.grad(spikes, current, torch.ones((), dtype=spikes.dtype, device="cuda").expand_as(spikes))
    for part in (slice(1000), slice(-1000, None), slice(2**28 - 500, 2**28 + 500)):
        some = current.detach()[:, part].requires_grad_()
        few, few_v = op(some, backend="torch")
        assert torch.equal(spikes[:, part], few)
        torch.testing.assert_close(v[part], few_v, rtol=1e-6, atol=1e-6)
        (few_grad,) = torch.autograd.grad(few, some, torch.ones_like(few))
        torch.testing.assert_close(grad[:, part], few_grad, rtol=0.01, atol=0.01)


@OPS
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_never_waits(backend, op):
    current = torch.randn(4, 1000, device="cuda", requires_grad=True)
    alpha = torch.ones(4, device="cuda", requires_grad=True)
    tau = torch.full((), 2.0, device="cuda", requires_grad=True)

    def step():
        if op is ternary:
            spikes, v = elastic_bispike(current, None, alpha, backend=backend)
        else:
            spikes, v = lif(current, None, tau=tau, v_threshold=1.0, backend=backend)
        (spikes.sum() + v.sum()).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@OPS
def test_runs_in_order_on_the_current_stream(backend, op):
    late = torch.randn(4, 1000, device="cuda")
    expected = op(late, backend=backend).spikes
    current = torch.zeros(4, 1000, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            current.copy_(late)
        spikes = op(current, backend=backend).spikes
        (grad,) = torch.autograd.grad(spikes.sum(), current)
    stream.synchronize()
    assert torch.equal(spikes, expected)
    assert grad.any()


@OPS
def test_a_graph_can_capture_it(backend, op):
    current = torch.randn(4, 1000, device="cuda")

    def step():
        leaf = current.detach().requires_grad_()  # of the stream that is current now
        spikes, v = op(leaf, backend=backend)
        return spikes, v, *torch.autograd.grad(spikes.sum() + v.sum(), leaf)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    current.normal_()
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)


@OPS
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_inductor_compiles_it_whole(backend, op):
    pytest.importorskip("triton")

    def rate(x):
        spikes, v = op(x * 2, backend=backend)
        return (spikes * x).sum() + v.square().sum()

    x = torch.randn(4, 33, 20, device="cuda", requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(rate, fullgraph=True)
    torch.testing.assert_close(compiled(x), rate(x))
    (got,), (expected,) = (torch.autograd.grad(function(x), x) for function in (compiled, rate))
    torch.testing.assert_close(got, expected)


@OPS
def test_runs_on_the_device_of_its_tensors(backend, op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    current = torch.randn(4, 1000, device="cuda:1", requires_grad=True)
    spikes, v = op(current, backend=backend)
    (grad,) = torch.autograd.grad(spikes.sum(), current)
    assert {x.device for x in (spikes, v, grad)} == {current.device}
    assert torch.equal(spikes, op(current, backend="torch").spikes)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("entry", ["spikelm_tiny", "spikingbert_tiny"])
def test_model_equals_cpu(entry):
    torch.manual_seed(1)  # with 0 a membrane of SpikingBERT meets its threshold exactly: rounding decides
    model = snlp_zoo.build(entry).double()
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
