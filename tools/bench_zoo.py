"""Training and inference of every family against its dense teacher's architecture and against plain loops of itself.

    python tools/bench_zoo.py [--families spikelm spikegpt] [--quick] [--output zoo.json]

All are 6 x 384 with random weights and 30,522 tokens, as the zoo's mini entries are. A training step distils: teacher
and student, KL, cross-entropy and hidden states, backward, clipped gradients, fused AdamW, bfloat16 autocast on a GPU.
Encoders train on 128 texts of 32 tokens, SpikeGPT on 8 of 512. "/ dense" is the throughput over that of a dense student
(BERT; for SpikeGPT the same model without neurons) of the same teacher. "/ loop" is that over the same model with its
ops replaced by the reference, one time step after another (a converted model's: by plain operations, which is what runs
on a CPU anyway). Models of 1.58 bits are packed for inference, their loops are not. "Peak" is what a training step
allocates above weights, optimizer state and inputs; GPU only.

No family is timed before its loop's logits agree, on the same weights in float32 (a converted model's from the kernel's
counts, where rounding alone tells them from the loop's: one count changes many behind it), nor reported unless both
first losses agree, in the precision of training.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from _bench import Watched, clock, loops
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

import snlp_zoo
from snlp_zoo.distill.distiller import Distiller
from snlp_zoo.layers import ElasticBiSpike
from snlp_zoo.layers.quant import pack
from snlp_zoo.registry import task_of

OBJECTIVES: dict[str, dict] = {"forward_kl": {}, "cross_entropy": {}, "hidden_mse": {}}
# neurons equal their loops to the last bit, other sums do not; in bfloat16, as trained, that flips spikes
LOGITS_OFF, LOSS_OFF = 1e-2, 2e-2
FAMILIES: dict[str, tuple[str, dict]] = {  # name -> zoo entry, and what of its configuration is changed
    "spikelm": ("spikelm_base", {"time_steps": 4}),
    "spikelm_t1": ("spikelm_base", {"time_steps": 1}),
    "spikelm_158": ("spikelm_base", {"time_steps": 4, "weight_bits": 1.58}),
    "spikingbert": ("spikingbert_mini_sst2", {}),
    "spikingbert_158": ("spikingbert_mini_158_sst2", {}),
    "spikebert": ("spikebert_mini_sst2", {}),
    "spiking_minilm": ("spiking_minilm", {}),
    "spikegpt": ("spikegpt_46m", {"v_threshold": 0.35}),  # of random weights few reach the published 1.0
}


@dataclass(frozen=True)
class Sizes:
    """Of models, and of what is timed: texts x tokens."""

    layers: int = 6
    width: int = 384
    vocabulary: int = 30522
    train: tuple[int, int] = (128, 32)
    train_causal: tuple[int, int] = (8, 512)
    infer: tuple[tuple[int, int], ...] = ((32, 64), (1, 32))
    warmups: int = 3
    repeats: int = 10
    limit_s: float = 1.5  # after which a call is not repeated; at least one warms up and one is timed

    def config(self, causal: bool) -> dict:
        shared = {"vocab_size": self.vocabulary, "hidden_size": self.width, "num_hidden_layers": self.layers}
        shared |= {"intermediate_size": 4 * self.width, "hidden_dropout_prob": 0.0}
        heads = {"num_attention_heads": self.width // 32, "attention_probs_dropout_prob": 0.0}
        return shared if causal else shared | heads


FULL = Sizes()
QUICK = Sizes(train=(16, 32), train_causal=(2, 128), infer=((8, 64), (1, 32)), warmups=1, repeats=3, limit_s=60)
TINY = Sizes(2, 64, 97, (2, 8), (2, 8), ((2, 8), (1, 4)), warmups=1, repeats=1)
Calls = dict[str, Callable[[], object]]


class Disagreement(Exception):
    """Kernels and loops compute different things."""


class Bench:
    """Times models of one size on one device."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes, self.device = sizes, device
        self.teachers: dict[bool, PreTrainedModel] = {}  # causal or not

    def teacher(self, causal: bool) -> PreTrainedModel:
        if causal not in self.teachers:
            self.teachers[causal] = self.make_dense(causal, seed=1)
        return self.teachers[causal]

    def make_dense(self, causal: bool, seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = self.sizes.config(causal)
        if causal:
            return snlp_zoo.build("spikegpt_46m", **config, spiking=False).to(self.device)
        return BertForSequenceClassification(BertConfig(**config)).to(self.device)

    def make(self, name: str) -> PreTrainedModel:
        """A student of random weights, whose amplitudes (if it has any) are measured."""
        entry, changes = FAMILIES[name]
        torch.manual_seed(0)
        task = None if name == "spikegpt" else "sequence-classification"
        model = snlp_zoo.build(entry, task=task, **self.sizes.config(name == "spikegpt"), **changes).to(self.device)
        with torch.no_grad():
            for parameter in model.parameters():
                if name == "spikegpt" and parameter.ndim == 2:  # as it starts its neurons are silent
                    torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            model.train()(self.ids(*self.sizes.infer[0]))
        return model

    def ids(self, texts: int, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.sizes.vocabulary, (texts, tokens), generator=generator).to(self.device)

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def rounds(self, calls: Calls) -> dict[str, list[float]]:
        """Milliseconds of every call, which take turns: what else the machine does then reaches all of them."""
        limit = self.sizes.limit_s * 1e3

        def once(name: str) -> float:
            with loops() if name == "loop" else nullcontext():
                return clock(calls[name], self.device)

        for name in calls:
            spent = 0.0
            for _ in range(self.sizes.warmups):
                if spent < limit:
                    spent += once(name)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.sizes.repeats):
            for name, taken in times.items():
                if sum(taken) < limit:
                    taken.append(once(name))
        return times

    # ---- what is timed

    def training_step(self, student: PreTrainedModel, causal: bool) -> Callable[[], Tensor]:
        """A function that makes one step and returns its loss."""
        texts, tokens = self.sizes.train_causal if causal else self.sizes.train
        ids = self.ids(texts, tokens + 1)
        labels = ids[:, 1:] if causal else torch.arange(texts, device=self.device) % 2
        batch = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1]), "labels": labels}
        distiller = Distiller(student, self.teacher(causal), OBJECTIVES).to(self.device).train()
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-5, fused=True)

        def step() -> Tensor:
            with self.autocast():
                loss = distiller(batch).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    def training(self, name: str, students: dict[str, PreTrainedModel], causal: bool) -> dict:
        """Examples per second and their ratios, and the peak of the kernels' step."""
        losses: dict[str, list[Tensor]] = {key: [] for key in students}
        steps = {key: self.training_step(student, causal) for key, student in students.items()}
        calls: Calls = {key: lambda key=key: losses[key].append(steps[key]()) for key in students}
        texts, _ = self.sizes.train_causal if causal else self.sizes.train
        row = speeds(self.rounds(calls), texts)
        first = {key: made[0].item() for key, made in losses.items()}
        if "loop" in first and not abs(first["loop"] / first["kernels"] - 1) <= LOSS_OFF:
            raise Disagreement(f"{name}: the first loss is {first['kernels']:.4f}, by loops {first['loop']:.4f}")
        if self.device == "cuda":  # a CPU's allocator keeps what was freed
            with Watched(torch.device(self.device)) as memory:
                steps["kernels"]()
            row["peak_gb"] = memory.rise / 2**30
        return row | {"first_loss": first}

    def inference(self, models: dict[str, PreTrainedModel], texts: int, tokens: int, causal: bool) -> dict:
        """Tokens per second and their ratios."""
        ids, more = self.ids(texts, tokens), {"use_cache": False} if causal else {}

        def forward(model: PreTrainedModel) -> None:
            with torch.no_grad(), self.autocast():
                model(ids, **more)

        calls: Calls = {key: partial(forward, model.eval()) for key, model in models.items()}
        return {"size": f"{texts} x {tokens}", **speeds(self.rounds(calls), texts * tokens)}

    # ---- families

    def check(self, name: str, model: PreTrainedModel) -> float:
        """How far the loop's logits are off, relative to all of them; too far is an error."""
        ids = self.ids(*self.sizes.infer[0])
        model.eval()
        # without gradients low-bit layers scale sums of signs: rounded otherwise, and one flipped spike flips many
        with torch.set_grad_enabled(_low_bit(model)):
            ours = model(ids).logits.detach().double()
            with loops(settled=True):
                theirs = model(ids).logits.detach().double()
        off = ((ours - theirs).norm() / theirs.norm()).item()
        if not off <= LOGITS_OFF:
            raise Disagreement(f"{name}: the loop's logits are off by {off:.1e}, at most {LOGITS_OFF:.0e} is right")
        return off

    def measure(self, name: str) -> dict:
        """One family: training and inference, by kernels and by loops, and beside the dense model."""
        model = self.make(name)
        causal = task_of(model) == "causal-lm"
        off = self.check(name, model)
        models = {"kernels": model, "dense": self.make_dense(causal, seed=0)}
        if self.device == "cuda" or name != "spiking_minilm":  # whose loop is what runs on a CPU
            models["loop"] = self.make(name)
            for module in models["loop"].modules():
                if isinstance(module, ElasticBiSpike):
                    module.alpha_mode = "first_batch"  # a loop does not measure
        training = self.training(name, models, causal)
        if _low_bit(model):
            pack(model)
        inference = [self.inference(models, *size, causal) for size in self.sizes.infer]
        return {"family": name, "causal": causal, "logits_off": off, "training": training, "inference": inference}


def _low_bit(model: PreTrainedModel) -> bool:
    return getattr(model.config, "weight_bits", 32) != 32


def speeds(times: dict[str, list[float]], size: int) -> dict:
    """Of `size` examples or tokens a call: per second, and by how much that is faster, median of all rounds."""
    ours = times["kernels"]
    row: dict = {f"{name}_per_s": size / statistics.median(taken) * 1e3 for name, taken in times.items()}
    for name in ("dense", "loop"):
        if name in times:
            row[f"over_{name}"] = statistics.median(b / a for a, b in zip(ours, times[name], strict=False))
    return row


def table(rows: list[dict]) -> str:
    """Markdown: first the dense models, as they were beside the first of their students, then the families."""
    titles = ["family", "training examples/s", "/ dense", "/ loop"]
    for part in rows[0]["inference"] if rows else []:
        titles += [f"inference tokens/s, {part['size']}", "/ dense", "/ loop"]
    lines = [[*titles, "peak GB"], ["---"] * (len(titles) + 1)]
    for causal, label in ((False, "dense BERT"), (True, "dense RWKV-4")):
        first = next((row for row in rows if row["causal"] == causal), None)
        lines += [_cells(label, first, "dense")] if first else []
    lines += [_cells(row["family"], row, "kernels") for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(label: str, row: dict, key: str) -> list[str]:
    cells = [label]
    for part in (row["training"], *row["inference"]):
        value = part[f"{key}_per_s"]
        ratios = [part.get(f"over_{other}") if key == "kernels" else None for other in ("dense", "loop")]
        cells += [f"{value:,.0f}" if value >= 10 else f"{value:.2g}"]
        cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
    peak = row["training"].get("peak_gb") if key == "kernels" else None
    return [*cells, "" if peak is None else f"{peak:.2f}"]


def report(rows: list[dict], sizes: Sizes, device: str, output: Path | None) -> None:
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    print(f"{machine}, torch {torch.__version__}\n\n{table(rows)}")
    if output:
        content = {"machine": machine, "torch": torch.__version__, "sizes": asdict(sizes), "rows": rows}
        output.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="NAME")
    parser.add_argument("--quick", dest="sizes", action="store_const", const=QUICK, default=FULL, help="for a CPU")
    parser.add_argument("--tiny", dest="sizes", action="store_const", const=TINY, help="shows that it works")
    parser.add_argument("--output", type=Path, help="JSON of all that is measured")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench, rows, wrong = Bench(options.sizes, device), [], []
    try:
        for name in options.families:
            try:
                rows.append(bench.measure(name))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            except Disagreement as error:
                wrong.append(str(error))
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    finally:  # what is measured is not lost where a family fails
        report(rows, options.sizes, device, options.output)
    if wrong:
        raise SystemExit(f"bench_zoo: not reported: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
