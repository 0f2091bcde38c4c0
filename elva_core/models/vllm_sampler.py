"""Summaries by vLLM instead of transformers: the other `rollout.Sampler`. Untested on hardware; written for vLLM 0.33.0.

vLLM holds a second copy of the merged stage-2 model. Before every step it is given what stage 3 trains, the adapter and
the row of [RET], and gives back tokens, nothing else: log-probabilities, entropy and embeddings are the trainer's own,
by teacher forcing. So the ratio to the sampling policy is 1 at the first pass, as with transformers, and what differs is
that vLLM's arithmetic makes the samples slightly off-policy; `engine_log_p` says by how much, and the guard bounds it.

    sampler = VllmSampler(encoder, stage3.lora, stage3.vllm, folder)    # before encoder.add_lora
    parts = sampler(encoder, [items], [torch.rand(len(items), 8, cap)], 1.0)
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import patch_environment
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from elva_core import distributed, sharding
from elva_core.config import LoraSettings, VllmSettings
from elva_core.data.images import open_image
from elva_core.data.items import Item
from elva_core.models import generation
from elva_core.models.encoder import SPLICED, Encoder

VERSION = "0.33.0"  # whose source this module was written from
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the sizes that vLLM keeps room for
ROW = "token_adapter.trainable_tokens_delta"  # PEFT's name of the trained rows, which vLLM's loader refuses


def library():
    """The vllm module.

    Raises:
        ModuleNotFoundError: it is not installed; the message has both ways out.
    """
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ModuleNotFoundError(
            f"stage3.sampler is vllm, which is not installed; run: pip install vllm=={VERSION}, or set stage3.sampler: transformers",
            name="vllm",
        ) from None
    return vllm


class VllmSampler:
    """A `rollout.Sampler` with an engine inside this process, on its GPU, as TRL's colocate mode has it.

    Each of several processes has an engine of its own for its own queries; one GPU per process is assumed, and a folder
    that all of them see. A summary depends on its item's noise and, on hardware, on rounding that differs with what
    else is in vLLM's batch.

    Args:
        encoder: the merged model of the stage before, without an adapter; its weights are written for vLLM to load.
        folder: of this run, emptied first.

    Raises:
        ValueError: a model of another family, whose prompts vLLM would be given in a form that was not written for them.
    """

    def __init__(self, encoder: Encoder, lora: LoraSettings, settings: VllmSettings, folder: Path) -> None:
        if not encoder.splices:
            kind = encoder.backbone.config.model_type
            raise ValueError(
                f"stage3.sampler is vllm, which is given prompts of {', '.join(SPLICED)}, not of {kind}; set it to transformers"
            )
        self._vllm, self._folder, self._pushes = library(), folder, itertools.count(1)
        weights = sharding.full_state_dict(encoder.model)
        if distributed.processes().is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            encoder.model.save_pretrained(folder / "base", state_dict=weights)
            encoder.processor.save_pretrained(folder / "base")  # with our limits of pixels
        distributed.processes().wait_for_everyone()
        with patch_environment(**_launch()):
            self._engine = self._vllm.LLM(
                model=str(folder / "base"),
                distributed_executor_backend="external_launcher",
                gpu_memory_utilization=settings.gpu_memory_utilization,
                enable_lora=True,
                max_lora_rank=min((r for r in RANKS if r >= lora.rank), default=RANKS[-1]),
                limit_mm_per_prompt={"image": 1, "video": 0},
                logprobs_mode="processed_logprobs",  # of the distribution sampled from: tempered, without banned tokens
            )
        distributed.processes().wait_for_everyone()

    def __call__(
        self,
        encoder: Encoder,
        parts: Sequence[Sequence[Item]],
        noises: Sequence[torch.Tensor],
        temperature: float,
    ) -> list[generation.Rollouts]:
        """Rollouts of each part under the weights of this moment, all asked of vLLM at once.

        Args:
            noises: (items, G, T) of each part, G at least 2; vLLM's seeds are taken from it.

        Raises:
            ValueError: vLLM read another prompt than the trainer.
        """
        items, rows = (
            list(itertools.chain(*parts)),
            list(itertools.chain(*(token_rows(encoder, part) for part in parts))),
        )
        wanted = [self._wanted(encoder, noise, temperature) for noise in itertools.chain(*noises)]
        adapter = self._push(encoder)
        found = self._engine.generate(
            prompts(encoder, items, rows), wanted, lora_request=adapter, use_tqdm=False
        )
        shutil.rmtree(adapter.lora_path)
        for item, row, out in zip(items, rows, found, strict=True):
            if list(out.prompt_token_ids) != row:
                raise ValueError(
                    f"vLLM read {len(out.prompt_token_ids)} prompt tokens where the trainer has {len(row)}, or other ones, for {item}; "
                    f"compare the image processors of vllm {getattr(self._vllm, '__version__', '?')} and of {self._folder / 'base'}"
                )
        found = iter(found)
        return [
            self._rollouts(encoder, part, [next(found).outputs for _ in part], temperature) for part in parts
        ]

    def close(self) -> None:
        """Frees the GPU memory and the disk."""
        self._engine = None
        gc.collect()
        torch.cuda.empty_cache()
        if distributed.processes().is_main_process:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _wanted(self, encoder: Encoder, noise: torch.Tensor, temperature: float):
        """One item's request, a SamplingParams."""
        return self._vllm.SamplingParams(
            n=len(noise),
            seed=seed_of(noise),
            temperature=temperature,
            max_tokens=encoder.settings.max_summary_tokens,
            stop_token_ids=[encoder.end_id],
            # about 420 of Qwen2-VL's ids are banned; vLLM takes 1,024 of them, and as many of allowed ones, which are 151,000
            logit_bias=dict.fromkeys(encoder.banned_ids.tolist(), float("-inf")),
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )

    def _push(self, encoder: Encoder):
        """Hands over the weights of this moment; returns their LoRARequest.

        Name, number and path are new each time: vLLM reads an adapter once per number and caches prompts by name and path.
        """
        from vllm.lora.request import LoRARequest

        number = next(self._pushes)
        folder = self._folder / f"adapter-{distributed.processes().process_index}-{number}"
        row = write_adapter(encoder, folder)
        self._engine.apply_model(partial(_set_row, encoder.ret_id, row))
        return LoRARequest(folder.name, number, str(folder))

    def _rollouts(
        self, encoder: Encoder, part: Sequence[Item], found: Sequence[Sequence], temperature: float
    ) -> generation.Rollouts:
        """Tokens and actions as `rollout.generate` has them, and the trainer's own view of them."""
        width = max(len(one.token_ids) for group in found for one in group)
        said = [
            [[at[t].logprob for t, at in zip(one.token_ids, one.logprobs, strict=True)] for one in group]
            for group in found
        ]
        tokens = _padded(
            [[one.token_ids for one in group] for group in found], width, encoder.pad_id, encoder
        )
        actions = _padded(
            [[[True] * len(one.token_ids) for one in group] for group in found], width, False, encoder
        )
        out = generation.completed(encoder, part, tokens, actions, temperature=temperature)
        out.engine_log_p = _padded(said, width, 0.0, encoder)
        return out


def _padded(rows: Sequence[Sequence[Sequence]], width: int, filler, encoder: Encoder) -> torch.Tensor:
    """(B, G, width) of B groups of G rows."""
    return torch.tensor(
        [[[*row, *[filler] * (width - len(row))] for row in group] for group in rows], device=encoder.device
    )


def seed_of(noise: torch.Tensor) -> int:
    """48 bits of an item's (G, T) uniform noise, so that a resumed run asks for the same; rollout g gets this plus g.

    >>> seed_of(torch.tensor([[0.5], [2.0**-24]])) == 2**47 + 1
    True
    """
    high, low = (noise.flatten()[:2].cpu() * 2**24).long().tolist()  # float32 in [0, 1) has 24 of them
    return high << 24 | low


def token_rows(encoder: Encoder, items: Sequence[Item]) -> list[list[int]]:
    """Prompts as the trainer reads them, an image as all its tokens."""
    batch = encoder.batch(items, encoder.settings.summary_request)
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.mask, strict=True)]


def prompts(encoder: Encoder, items: Sequence[Item], rows: Sequence[Sequence[int]]) -> list[dict]:
    """What vLLM is asked: token ids with one placeholder for an image, which vLLM makes as many as it takes, and the image."""
    image_id, out = encoder.backbone.config.image_token_id, []
    for item, row in zip(items, rows, strict=True):
        ids = [t for t, before in zip(row, [None, *row], strict=False) if not t == before == image_id]
        images = [open_image(path) for path in item.images]
        out.append({"prompt_token_ids": ids} | ({"multi_modal_data": {"image": images}} if images else {}))
    return out


def write_adapter(encoder: Encoder, folder: Path) -> torch.Tensor:
    """Writes the adapter as PEFT and vLLM read it, in the dtype of the model, and returns the trained row of [RET], (D,).

    The row is not in the folder, because vLLM's loader refuses it. It matters: the paper's request names [RET].
    """
    dtype = encoder.backbone.dtype
    tensors = get_peft_model_state_dict(encoder.model, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    ((row,),) = [tensors.pop(name) for name in list(tensors) if name.endswith(ROW)]
    trained = encoder.model.peft_config["default"]
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(
        r=trained.r, lora_alpha=trained.lora_alpha, target_modules=trained.target_modules
    ).save_pretrained(folder)
    return row


def _set_row(ret_id: int, row: torch.Tensor, model) -> None:
    """Runs on vLLM's model."""
    model.get_language_model().model.embed_tokens.weight.data[ret_id].copy_(row)


def _launch() -> dict[str, object]:
    """What vLLM's `external_launcher` asks the environment of a process: a launcher has said it, one process alone says it here."""
    state = distributed.processes()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    names = {
        "RANK": state.process_index,
        "LOCAL_RANK": state.local_process_index,
        "WORLD_SIZE": state.num_processes,
    }
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: value for name, value in names.items() if name not in os.environ}
