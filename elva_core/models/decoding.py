"""Writing summaries a token at a time, without a word from the host between tokens.

All that a token changes is in tensors that keep their shapes and places: a fixed key/value cache
(`prefix.fixed`), the rows' states and what they have written. So on CUDA a token is two recorded graphs, to
choose it and to read it, in place of a thousand launches. Only every CHECK tokens the host looks which rows
are still waiting: when all are done it stops, when half of them are it drops these.

    tensors = Writing(encoder, prefix, torch.rand(len(items), 8, cap), 1.0).write()
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.nn.functional import pad

from elva_core import sharding
from elva_core.models.encoder import Encoder, normalised
from elva_core.models.prefix import Prefix, advance, can_be_fixed, fixed, kept, read_next, repeated

BLOCK = 256  # columns of the vocabulary that are summed together
CHECK = {"cpu": 1, "elsewhere": 8}  # tokens between two looks at what is done; looking is free on a CPU
ROWS = 8  # rows that are left are filled up to a multiple of it by finished ones

log = logging.getLogger("elva")


def sample(chance: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Tokens (R,) by inverting the distribution function of (R, V) probabilities at (R,) uniform numbers.

    Blocks of the vocabulary are summed first, then the one that is hit from its start: float64 takes their
    sums and one block's columns alone, not all of the vocabulary.

    >>> sample(torch.tensor([[0.25, 0.0, 0.5, 0.25]] * 3), torch.tensor([0.1, 0.3, 0.9]))
    tensor([0, 2, 3])
    """
    blocks = pad(chance, (0, -chance.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    reached = pad(blocks.sum(-1).double().cumsum(-1), (1, 0))
    point = noise.to(reached)[:, None] * reached[:, -1:]
    block = torch.searchsorted(reached[:, 1:].contiguous(), point, right=True).clamp_max(blocks.shape[1] - 1)
    low, high = reached.gather(1, block), reached.gather(1, block + 1)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)
    place = torch.searchsorted(inside, (point - low) / (high - low) * inside[:, -1:], right=True)
    return (block * BLOCK + place).clamp_max(chance.shape[-1] - 1)[:, 0]


class _Step:
    """Work on tensors in place, which on CUDA is recorded at its second call and replayed from then on."""

    def __init__(self, work: Callable[[], None], record: bool) -> None:
        self._run, self._work, self._calls, self._record = work, work, 0, record

    def __call__(self) -> None:
        self._calls += 1
        if self._record and self._calls == 2:
            self._run = self._recorded()
        self._run()

    def _recorded(self) -> Callable[[], None]:
        graph, here, aside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        try:
            with torch.cuda.stream(aside):  # not torch.cuda.graph, which empties the allocator's cache
                graph.capture_begin(capture_error_mode="thread_local")  # another thread may pin memory
                try:
                    self._work()
                finally:
                    graph.capture_end()
        except RuntimeError as error:  # a forward that waits for the host
            log.warning("decoding goes on without a CUDA graph, slowly: %s", error)
            return self._work
        here.wait_stream(aside)
        return graph.replay


class Writing:
    """R = B * G summaries that are written together.

    Args:
        prefix: of B prompts. noise: (B, G, T) uniform in [0, 1), or None for the most probable tokens, G = 1.
    """

    def __init__(
        self, encoder: Encoder, prefix: Prefix, noise: torch.Tensor | None, temperature: float
    ) -> None:
        self._encoder, self._model, self._temperature = encoder, encoder.backbone, temperature
        group, cap = 1 if noise is None else noise.shape[1], encoder.settings.max_summary_tokens
        self._fixed = fixed(self._model, prefix, group, cap + 1) if can_be_fixed(prefix) else None
        self._growing = None if self._fixed else repeated(prefix, group)
        state = prefix.last.repeat_interleave(group, dim=0) if self._fixed else self._growing.last
        rows, device = len(state), state.device
        self._tensors = {
            "place": torch.arange(rows, device=device),  # in the batch
            "state": state,  # after what was read
            "next": torch.full((rows,), encoder.pad_id, device=device),  # token that is read next
            "open": torch.ones(rows, dtype=torch.bool, device=device),  # tokens are still chosen
            "waiting": torch.ones(rows, dtype=torch.bool, device=device),  # [RET] is not read yet
            "tokens": torch.full((rows, cap), encoder.pad_id, device=device),
            "actions": torch.zeros(rows, cap, dtype=torch.bool, device=device),
            "log_p": torch.zeros(rows, cap, device=device),
            "entropy": torch.zeros(rows, cap, device=device),
            "embeddings": torch.zeros(state.shape, device=device),
        }
        if noise is not None:
            self._tensors["noise"] = noise.flatten(0, 1).to(device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        # no sampled token is [RET], whose row PEFT's layer would put into a copy of the whole table
        table = self._model.get_input_embeddings()
        self._ret = table(torch.full((1,), encoder.ret_id, device=device))
        self._table = getattr(getattr(table, "token_adapter", None), "base_layer", table)

    def write(self) -> dict[str, torch.Tensor]:
        """Writes all of them: (R, T) tokens, actions, log_p and entropy, (R, D) embeddings."""
        t = self._tensors
        out = {name: t[name].clone() for name in ("tokens", "actions", "log_p", "entropy", "embeddings")}
        every = CHECK["cpu" if self._column.is_cpu else "elsewhere"]
        choose, read = self._steps()
        for column in range(1, self._encoder.settings.max_summary_tokens + 1):
            choose()
            read()
            if column % every == 0:
                waiting = int(self._tensors["waiting"].sum())
                if not waiting:
                    break
                if self._fixed and 2 * waiting <= len(self._tensors["place"]) - ROWS:
                    self._copy_into(out)
                    self._keep(-(-waiting // ROWS) * ROWS)
                    choose, read = self._steps()
        else:
            self._tensors["open"].fill_(False)
            self._tensors["next"].fill_(self._encoder.ret_id)
            read()
        self._copy_into(out)
        return out

    def _steps(self) -> tuple[_Step, _Step]:
        # FSDP's processes agree on every pass, on the host
        record = self._column.is_cuda and self._fixed is not None and not sharding.requested()
        return _Step(self._choose, record), _Step(self._read, record)

    def _copy_into(self, out: dict[str, torch.Tensor]) -> None:
        for name, whole in out.items():
            whole.index_copy_(0, self._tensors["place"], self._tensors[name])

    def _keep(self, count: int) -> None:
        """Goes on with `count` rows, those that wait and some that do not."""
        rows = self._tensors["waiting"].to(torch.uint8).argsort(descending=True, stable=True)[:count]
        self._tensors = {name: tensor[rows] for name, tensor in self._tensors.items()}
        self._fixed = kept(self._fixed, rows)

    def _choose(self) -> None:
        t, encoder = self._tensors, self._encoder
        logits = encoder.logits(t["state"])
        log_p = torch.log_softmax(logits if self._temperature == 1 else logits / self._temperature, dim=-1)
        chance = log_p.exp()
        if "noise" in t:
            token = sample(chance, t["noise"].index_select(1, self._column)[:, 0])
        else:
            token = log_p.argmax(-1)
        written = {
            "tokens": torch.where(t["open"], token, encoder.pad_id),
            "actions": t["open"],
            "log_p": log_p.gather(-1, token[:, None])[:, 0] * t["open"],
            "entropy": torch.special.entr(chance).sum(-1) * t["open"],
        }
        for name, values in written.items():
            t[name].index_copy_(1, self._column, values[:, None])
        t["open"].logical_and_(token != encoder.end_id)
        t["next"].copy_(torch.where(t["open"], token, encoder.ret_id))
        self._column.add_(1)

    def _read(self) -> None:
        t = self._tensors
        if self._fixed:
            words = torch.where(
                (t["next"] == self._encoder.ret_id)[:, None], self._ret, self._table(t["next"])
            )
            state = read_next(self._model, self._fixed, words, t["waiting"])
        else:
            state = advance(self._model, self._growing, t["next"][:, None], t["waiting"][:, None])[:, 0]
        closing = t["waiting"] & ~t["open"]
        here = state if self._encoder.settings.read_out == "ret" else t["state"]  # or the one before [RET]
        t["embeddings"].copy_(torch.where(closing[:, None], normalised(here), t["embeddings"]))
        t["waiting"].logical_and_(t["open"])
        t["state"].copy_(state)
