"""Special tokens: the row of [RET], what the policy must never sample."""

from __future__ import annotations

import torch


@torch.no_grad()
def add_ret_token(model, tokenizer, token: str) -> None:
    """Puts [RET] on a spare vocabulary row, started from the mean of the used rows; nothing is resized.

    Raises:
        ValueError: the matrix has no spare row.
    """
    used, rows = len(tokenizer), model.get_input_embeddings().weight
    if used >= len(rows):
        raise ValueError(
            f"the embedding matrix has {len(rows)} rows for {used} tokens: no spare row for {token}; give "
            "the model some with transformers "
            f"(model.resize_token_embeddings({used + 1}, pad_to_multiple_of=64)) and save it"
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    rows[used] = rows[:used].mean(0)


def banned_ids(tokenizer, end_id: int, rows: int) -> torch.Tensor:
    """Ids the policy must never sample: every special token but the end of turn, and the spare rows.

    A sampled vision placeholder would make the next forward fail on a token/feature mismatch; [RET] is
    appended by us and is no action.
    """
    special = {token_id for token_id in tokenizer.get_added_vocab().values() if token_id != end_id}
    return torch.tensor(sorted(special | set(range(len(tokenizer), rows))), dtype=torch.long)
