"""The policy loss against TRL's own, on the same log-probabilities, masks and advantages."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from elva_core.training import losses

trl = pytest.importorskip("trl", reason="TRL is not installed; make setup")

ROWS, LENGTH, CLIP, KL_WEIGHT = 6, 5, 0.2, 0.04
LOSS_TYPES = ("grpo", "dr_grpo", "dapo")


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    log_p, log_old, log_reference = (-3 * torch.rand(ROWS, LENGTH, generator=generator) for _ in range(3))
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (ROWS, 1), generator=generator)
    return log_p.requires_grad_(), log_old, log_reference, mask.long(), torch.randn(ROWS, generator=generator)


@pytest.fixture
def trainer(model_folder, tmp_path, request):
    """A real GRPOTrainer; its model is never asked, the log-probabilities are given."""
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=ROWS,
        num_generations=ROWS,
        max_completion_length=LENGTH,
        loss_type=request.param,
        beta=KL_WEIGHT,
        epsilon=CLIP,
        use_bias_correction_kl=False,  # a variant of TRL that weights the KL by the ratio
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "model")
    made = trl.GRPOTrainer(
        model=str(tmp_path / "model"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=tokenizer,
    )
    made.model.eval()
    return made


@pytest.mark.parametrize(("trainer", "loss_type"), [(name, name) for name in LOSS_TYPES], indirect=["trainer"])
def test_the_loss_its_gradient_and_what_is_logged_equal_trls(trainer, loss_type, inputs, monkeypatch):
    log_p, log_old, log_reference, mask, advantage = inputs
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (log_p, torch.zeros_like(log_p), None))
    batch = {
        "prompt_ids": torch.ones(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "completion_mask": mask,
        "advantages": advantage,
        "old_per_token_logps": log_old,
        "ref_per_token_logps": log_reference,
        "num_items_in_batch": mask.sum(),
    }
    theirs = trainer._compute_loss(trainer.model, batch)
    (their_gradient,) = torch.autograd.grad(theirs, log_p)
    ours, facts = losses.policy_loss(
        log_p, log_old, log_reference, mask, advantage, clip=CLIP, beta=KL_WEIGHT, loss_type=loss_type, max_length=LENGTH
    )
    (our_gradient,) = torch.autograd.grad(ours, log_p)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-6, rtol=0)
    logged = [trainer._metrics["eval"][name][-1] for name in ("kl", "clip_ratio/region_mean")]
    assert [facts["kl"], facts["clip_fraction"]] == pytest.approx(logged, rel=1e-5) and min(logged) > 0
