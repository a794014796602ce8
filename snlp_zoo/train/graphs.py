"""Training steps replayed from CUDA graphs: one launch instead of some thousand, for models that wait for Python.

the first batch of a shape runs as it is -> the second is captured, forward and backward -> from then on replayed
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from snlp_zoo.errors import RecipeError
from snlp_zoo.train.parts import TrainPart

if TYPE_CHECKING:
    from accelerate import Accelerator

MULTIPLE = 8  # tokens to which batches are padded, so that there are few shapes


def can_replay(accelerator: "Accelerator", settings: TrainPart) -> bool:
    """Whether steps of this run are replayed: asked for, and on one GPU, without accumulation or a scaled loss."""
    return (
        settings.cuda_graphs
        and accelerator.device.type == "cuda"
        and accelerator.distributed_type == "NO"
        and settings.gradient_accumulation_steps == 1
        and accelerator.mixed_precision != "fp16"
        and isinstance(settings.surrogate_temperature, int | float)  # a number is part of the kernels' arguments
    )


class ReplayedSteps:
    """Losses of a batch, and its gradients in the module's parameters.

    Graphs share one pool of memory; every shape has gradients of its own, 4 bytes a parameter.

    Args:
        module: what is trained.
        losses: batch on the device -> loss of each objective, detached; runs the backward of their weighted sum.
    Raises:
        RecipeError: something in the model looks at a value on the GPU, which a graph cannot.
    """

    def __init__(self, module: nn.Module, losses: Callable[[dict[str, Tensor]], Tensor]) -> None:
        self.losses = losses
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor, list[Tensor | None]]] = {}
        self.seen: set[Any] = set()

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        shape = tuple((name, tuple(values.shape), values.dtype) for name, values in batch.items())
        if shape not in self.seen:  # kernels are compiled and memory is found
            self.seen.add(shape)
            return self.losses(batch)
        if shape not in self.graphs:
            self.graphs[shape] = self._capture(batch)
        graph, inputs, losses, gradients = self.graphs[shape]
        for name, values in batch.items():
            inputs[name].copy_(values)
        graph.replay()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return losses

    def forget(self) -> None:
        """Capture anew: something that is no tensor has changed."""
        self.graphs.clear()
        self.seen.clear()
        self.pool = torch.cuda.graph_pool_handle()  # one whose graphs are all gone takes no others

    def _capture(
        self, batch: dict[str, Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor, list[Tensor | None]]:
        graph, inputs = torch.cuda.CUDAGraph(), {name: values.clone() for name, values in batch.items()}
        for parameter in self.parameters:
            parameter.grad = None  # so that the graph's own backward makes it, and a replay starts from none
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                losses = self.losses(inputs)
        except RuntimeError as error:
            first = str(error.__context__ or error).partition("\n")[0]  # the end of a capture that failed fails too
            raise RecipeError(f"train.cuda_graphs: a step cannot be captured ({first}); set it to false") from error
        return graph, inputs, losses, [parameter.grad for parameter in self.parameters]


def padded(batch: dict[str, Tensor], *configs: PreTrainedConfig) -> dict[str, Tensor]:
    """A batch whose texts [B, N] are padded on the right to a multiple of `MULTIPLE` tokens, or to as many as all of
    these models have positions for, with the first one's padding token.
    """
    length = batch["input_ids"].shape[1]
    whole = -(-length // MULTIPLE) * MULTIPLE
    room = min(getattr(config, "max_position_embeddings", None) or whole for config in configs)
    more = max(min(whole, room) - length, 0)  # a text that is too long is the model's to refuse
    fill = {"input_ids": getattr(configs[0], "pad_token_id", None) or 0, "labels": -100}
    return {
        name: F.pad(values, (0, more), value=fill.get(name, 0)) if values.ndim == 2 else values
        for name, values in batch.items()
    }
