"""The three stages of the paper and their relatives: losses, rewards, GRPO, negatives, and the loop that all share."""
