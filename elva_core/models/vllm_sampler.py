"""Sampling by vLLM instead of transformers: the other `generation.Sampler`.

Untested on hardware; written for vLLM 0.33.0.

vLLM holds a second copy of the merged stage-2 model. Before every step it is given what stage 3 trains, the
adapter and the row of [RET], and gives back tokens, nothing else: log-probabilities, entropy and embeddings
are the trainer's own, by teacher forcing. So the ratio to the sampling policy is 1 at the first pass, as with
transformers, and what differs is that vLLM's arithmetic makes the samples slightly off-policy; `engine_log_p`
says by how much, and the guard bounds it.

    sampler = VllmSampler(encoder, stage3.lora, stage3.vllm, folder)    # before encoder.add_lora
    parts = sampler(encoder, [items], [torch.rand(len(items), 8, cap)], 1.0)
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import patch_environment
from accelerate.utils.other import get_free_port
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from elva_core import distributed, sharding
from elva_core.data.images import open_image
from elva_core.data.items import Item
from elva_core.models import generation
from elva_core.models.encoder import SPLICED, Encoder
from elva_core.training_settings import LoraSettings, VllmSettings

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
            f"stage3.sampler is vllm, which is not installed; run: pip install vllm=={VERSION}, "
            "or set stage3.sampler: transformers",
            name="vllm",
        ) from None
    return vllm


class VllmSampler:
    """A `generation.Sampler` with an engine inside this process, on its GPU, as TRL's colocate mode has it.

    Each of several processes has an engine of its own for its own queries; one GPU per process is assumed,
    and a folder that all of them see. A summary depends on its item's noise and, on hardware, on rounding
    that differs with what else is in vLLM's batch.

    Args:
        encoder: the merged model of the stage before, without an adapter; vLLM loads its weights.
        folder: of this run, emptied first.

    Raises:
        ValueError: a model of another family, whose prompts vLLM would be given in a form that was not
            written for them.
    """

    def __init__(self, encoder: Encoder, lora: LoraSettings, settings: VllmSettings, folder: Path) -> None:
        if not encoder.vision:
            kind = encoder.backbone.config.model_type
            raise ValueError(
                f"stage3.sampler is vllm, which is given prompts of {', '.join(SPLICED)}, not of {kind}; "
                "set it to transformers"
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
                # of the distribution sampled from: tempered, without banned tokens
                logprobs_mode="processed_logprobs",
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
        items = list(itertools.chain(*parts))
        rows = [row for part in parts for row in token_rows(encoder, part)]
        requests = [self._request(encoder, noise, temperature) for noise in itertools.chain(*noises)]
        adapter = self._push(encoder)
        inputs = prompts(encoder, items, rows)
        answers = self._engine.generate(inputs, requests, lora_request=adapter, use_tqdm=False)
        shutil.rmtree(adapter.lora_path)
        for item, row, answer in zip(items, rows, answers, strict=True):
            if list(answer.prompt_token_ids) != row:
                raise ValueError(
                    f"vLLM read {len(answer.prompt_token_ids)} prompt tokens where the trainer has "
                    f"{len(row)}, or other ones, for {item}; compare the image processors of vllm "
                    f"{getattr(self._vllm, '__version__', '?')} and of {self._folder / 'base'}"
                )
        rest = iter(answers)
        groups = [(part, list(itertools.islice(rest, len(part)))) for part in parts]
        return [_rollouts(encoder, *group, temperature) for group in groups]

    def close(self) -> None:
        """Frees the GPU memory and the disk."""
        self._engine = None
        gc.collect()
        torch.cuda.empty_cache()
        if distributed.processes().is_main_process:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _request(self, encoder: Encoder, noise: torch.Tensor, temperature: float):
        """One item's request, a SamplingParams."""
        return self._vllm.SamplingParams(
            n=len(noise),
            seed=seed_of(noise),
            temperature=temperature,
            max_tokens=encoder.settings.max_summary_tokens,
            stop_token_ids=[encoder.end_id],
            # some 420 of Qwen2-VL's ids are banned, 151,000 allowed; vLLM takes 1,024 of either kind
            logit_bias=dict.fromkeys(encoder.banned_ids.tolist(), float("-inf")),
            logprobs=0,  # of the sampled token alone
            detokenize=False,
        )

    def _push(self, encoder: Encoder):
        """Hands over the weights of this moment; returns their LoRARequest.

        Name, number and path are new each time: vLLM reads an adapter once per number and caches prompts by
        name and path.
        """
        from vllm.lora.request import LoRARequest

        number = next(self._pushes)
        folder = self._folder / f"adapter-{distributed.processes().process_index}-{number}"
        row = write_adapter(encoder, folder)
        self._engine.apply_model(partial(_set_row, encoder.ret_id, row))
        return LoRARequest(folder.name, number, str(folder))


def _rollouts(
    encoder: Encoder, items: Sequence[Item], answers: Sequence, temperature: float
) -> generation.Rollouts:
    """Tokens and actions as `generation.generate` has them, and the trainer's own view of them.

    Args:
        answers: vLLM's RequestOutput of each item, with G completions.
    """
    completions = [completion for answer in answers for completion in answer.outputs]

    def stacked(rows: Sequence[Sequence], filler: float) -> torch.Tensor:
        """(B, G, T), padded on the right."""
        padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)
        return padded.unflatten(0, (len(items), -1)).to(encoder.device)

    ids = [list(completion.token_ids) for completion in completions]
    tokens, actions = stacked(ids, encoder.pad_id), stacked([[True] * len(row) for row in ids], False)
    out = generation.completed(encoder, items, tokens, actions, temperature=temperature)
    chosen = (zip(c.token_ids, c.logprobs, strict=True) for c in completions)
    out.engine_log_p = stacked([[at[token].logprob for token, at in row] for row in chosen], 0.0)
    return out


def seed_of(noise: torch.Tensor) -> int:
    """Seed of an item, 48 bits of its (G, T) uniform noise, as in a resumed run; rollout g gets this plus g.

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
    """Prompts for vLLM: token ids with one placeholder per image, which vLLM repeats, and the images."""
    image_id, out = encoder.backbone.config.image_token_id, []
    for item, row in zip(items, rows, strict=True):
        ids = [t for t, before in zip(row, [None, *row], strict=False) if not t == before == image_id]
        images = [open_image(path) for path in item.images]
        out.append({"prompt_token_ids": ids} | ({"multi_modal_data": {"image": images}} if images else {}))
    return out


def write_adapter(encoder: Encoder, folder: Path) -> torch.Tensor:
    """Writes the adapter for PEFT and vLLM, in the model's dtype, and returns the trained row of [RET], (D,).

    The row is not in the folder: vLLM's loader refuses it. It matters, as the paper's request names [RET].
    """
    dtype = encoder.backbone.dtype
    tensors = get_peft_model_state_dict(encoder.model, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    ((row,),) = [tensors.pop(name) for name in list(tensors) if name.endswith(ROW)]
    trained = encoder.model.peft_config["default"]
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = LoraConfig(r=trained.r, lora_alpha=trained.lora_alpha, target_modules=trained.target_modules)
    config.save_pretrained(folder)
    return row


def _set_row(ret_id: int, row: torch.Tensor, model) -> None:
    """Sets the embedding of [RET] in vLLM's model, where this runs."""
    model.get_language_model().model.embed_tokens.weight.data[ret_id].copy_(row)


def _launch() -> dict[str, object]:
    """Environment variables that vLLM's `external_launcher` needs and no launcher has set."""
    state = distributed.processes()
    names = {
        "RANK": state.process_index,
        "LOCAL_RANK": state.local_process_index,
        "WORLD_SIZE": state.num_processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": get_free_port(),
    }
    return {name: value for name, value in names.items() if name not in os.environ}
