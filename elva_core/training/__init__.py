"""The three stages of the paper and their relatives: losses, rewards, GRPO, negatives, the training loop."""
