"""Evaluation: hit rates, grains, unseen sets, reranking, throughput, and the statistics behind them."""
