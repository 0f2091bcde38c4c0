"""A stand-in for vllm 0.33.0 with the arguments that its source has, and a transformers model where the engine would be.

Read there: entrypoints/llm.py, engine/arg_utils.py, sampling_params.py, lora/{request,peft_helper,lora_model,utils,
worker_manager}.py, v1/engine/{parallel_sampling,detokenizer,output_processor}.py, v1/executor/uniproc_executor.py. What
is kept of it: one placeholder an image, which the engine expands with the processor of its own folder; adapters read
from disk, once per id, with the names, ranks and refusals of vLLM's loader; child i of a request has its seed plus i;
the stop token is the last of the tokens; the log-probability of the sampled token stands beside it.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    logit_bias: dict[int, float] | None = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class Logprob:
    logprob: float


class LLM:
    def __init__(
        self,
        model: str,
        *,
        gpu_memory_utilization: float = 0.92,
        distributed_executor_backend: str | None = None,
        enable_lora: bool = False,
        max_lora_rank: int = 16,
        limit_mm_per_prompt: dict[str, int] | None = None,
        logprobs_mode: str = "raw_logprobs",
    ) -> None:
        assert distributed_executor_backend == "external_launcher" and enable_lora and logprobs_mode == "processed_logprobs"
        assert {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512) and limit_mm_per_prompt["image"] == 1
        self._hf = AutoModelForImageTextToText.from_pretrained(model).eval()
        self._processor, self._max_rank = AutoProcessor.from_pretrained(model), max_lora_rank
        self._peft, self._loaded = None, set()

    def apply_model(self, func) -> list:
        model = SimpleNamespace(get_language_model=lambda: SimpleNamespace(model=self._hf.model.language_model))
        return [func(model)]

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None) -> list:
        self._use(lora_request)
        return [self._complete(prompt, wanted) for prompt, wanted in zip(prompts, sampling_params, strict=True)]

    def _use(self, request: LoRARequest) -> None:
        name = f"adapter{request.lora_int_id}"
        if request.lora_int_id not in self._loaded:
            check_adapter(Path(request.lora_path), self._max_rank)
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._hf, request.lora_path, adapter_name=name)
            else:
                self._peft.load_adapter(request.lora_path, adapter_name=name)
            self._loaded.add(request.lora_int_id)
        self._peft.set_adapter(name)

    @torch.no_grad()
    def _complete(self, prompt: dict, wanted: SamplingParams) -> SimpleNamespace:
        ids, image_id, vision = list(prompt["prompt_token_ids"]), self._hf.config.image_token_id, {}
        if "multi_modal_data" in prompt:
            inputs = self._processor.image_processor(prompt["multi_modal_data"]["image"], return_tensors="pt")
            size = int(inputs.image_grid_thw.prod()) // self._hf.config.vision_config.spatial_merge_size**2
            (at,) = [i for i, t in enumerate(ids) if t == image_id]  # a second one would be an image that is not there
            ids[at : at + 1] = [image_id] * size
            pixels = inputs.pixel_values
            vision = {"pixel_values": pixels.repeat(wanted.n, 1), "image_grid_thw": inputs.image_grid_thw.repeat(wanted.n, 1)}
        bias = torch.zeros(self._hf.config.get_text_config().vocab_size)
        bias[list(wanted.logit_bias)] = torch.tensor(list(wanted.logit_bias.values()))
        generators = [torch.Generator().manual_seed(wanted.seed + i) for i in range(wanted.n)]
        rows, found = torch.tensor([ids] * wanted.n), [SimpleNamespace(token_ids=[], logprobs=[], done=False) for _ in generators]
        for _ in range(wanted.max_tokens):
            logits = self._hf(input_ids=rows, mm_token_type_ids=(rows == image_id).int(), **vision).logits[:, -1].float()
            log_p = torch.log_softmax((logits + bias) / wanted.temperature, dim=-1)
            tokens = torch.stack([torch.multinomial(p, 1, generator=g) for p, g in zip(log_p.exp(), generators, strict=True)])
            rows = torch.cat([rows, tokens], dim=1)
            for one, token, chances in zip(found, tokens[:, 0].tolist(), log_p, strict=True):
                if not one.done:
                    one.token_ids.append(token)
                    one.logprobs.append({token: Logprob(float(chances[token]))})
                    one.done = token in wanted.stop_token_ids
            if all(one.done for one in found):
                break
        return SimpleNamespace(prompt_token_ids=ids, outputs=found)


def check_adapter(folder: Path, max_rank: int) -> None:
    """What vLLM's loader refuses."""
    config = json.loads((folder / "adapter_config.json").read_text())
    if config["r"] > max_rank or config["bias"] != "none" or config["modules_to_save"] or config["use_dora"]:
        raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {max_rank}, or another feature that vLLM lacks")
    for name in load_file(folder / "adapter_model.safetensors"):
        *module, kind, last = name.removeprefix("base_model.model.").split(".")
        if kind not in ("lora_A", "lora_B") or last != "weight":
            raise ValueError(f"{name} is unsupported LoRA weight")
        if module[:2] != ["model", "language_model"] or module[-1] not in MODULES:
            raise ValueError(f"expected target modules in {MODULES} but received {'.'.join(module)}")


def modules() -> dict[str, ModuleType]:
    """What `import vllm` finds."""
    vllm, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    vllm.LLM, vllm.SamplingParams, vllm.lora, vllm.__version__ = LLM, SamplingParams, lora, "0.33.0"
    lora.request, request.LoRARequest = request, LoRARequest
    return {"vllm": vllm, "vllm.lora": lora, "vllm.lora.request": request}


def install() -> None:
    sys.modules |= modules()


class Embeddings:
    """`vllm serve FOLDER --runner pooling ...` and what it makes of a body that is posted to v1/embeddings.

    Read in entrypoints/pooling/{base,embed}/protocol.py, entrypoints/chat_utils.py, config/pooler.py and the pooler's heads: the
    generation prompt is off unless asked for, an image is a part without its picture, a prefix is normalised after it is cut.
    """

    def __init__(self, command: str, folder: Path) -> None:
        serve = argparse.ArgumentParser()
        for flag, kind in {"served-model-name": str, "runner": str, "convert": str, "chat-template-content-format": str}.items():
            serve.add_argument(f"--{flag}", type=kind)
        serve.add_argument("--pooler-config", type=json.loads)
        serve.add_argument("--hf-overrides", type=json.loads, default={})
        self.flags = serve.parse_args(shlex.split(command)[3:])  # vllm serve FOLDER
        assert (self.flags.runner, self.flags.convert, self.flags.chat_template_content_format) == ("pooling", "embed", "openai")
        assert self.flags.pooler_config.keys() <= {"seq_pooling_type", "use_activation"}
        self._hf = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self._processor = AutoProcessor.from_pretrained(folder)

    @torch.no_grad()
    def post(self, body: dict) -> tuple[list[int], torch.Tensor]:
        """Token ids of the prompt, and the embedding."""
        body = {"add_generation_prompt": False, "continue_final_message": False, "dimensions": None} | json.loads(json.dumps(body))
        assert body.keys() <= {"model", "messages", "add_generation_prompt", "continue_final_message", "dimensions"}
        assert body["model"] == self.flags.served_model_name and not (body["add_generation_prompt"] and body["continue_final_message"])
        if body["dimensions"] not in (None, *self.flags.hf_overrides.get("matryoshka_dimensions", ())):
            raise ValueError(f"Model does not support matryoshka representation of {body['dimensions']}")
        turns, images = [], []
        for message in body["messages"]:
            parts = [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else message["content"]
            for part in (part for part in parts if part["type"] == "image_url"):
                encoded = part["image_url"]["url"].removeprefix("data:image/png;base64,")
                image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA")  # transparency is white
                images.append(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
            turns.append({"role": message["role"], "content": [{"type": "image"} if p["type"] == "image_url" else p for p in parts]})
        how = {name: body[name] for name in ("add_generation_prompt", "continue_final_message")}
        template = self._processor.chat_template
        prompt = self._processor.tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **how)
        inputs = self._processor(text=[prompt], images=images or None, return_tensors="pt", add_special_tokens=False)
        states = self._hf(**inputs, output_hidden_states=True).hidden_states[-1][0].float()
        vector = {"LAST": states[-1], "CLS": states[0], "MEAN": states.mean(0)}[self.flags.pooler_config["seq_pooling_type"]]
        vector = vector[: body["dimensions"]]
        return inputs.input_ids[0].tolist(), vector / vector.norm() if self.flags.pooler_config["use_activation"] else vector
