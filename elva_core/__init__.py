"""ELVA: ranking-driven universal multimodal retrieval (arXiv 2606.20280), re-implemented.

Where each item of the paper is; numbers it prints stand in params/reported.yaml.

    grains of a query                   data.mbeir.grains
    grain blindness, Definition 2       evaluation.grains.distances
    InfoNCE, stages 1 and 2             training.losses.infonce
    stage 1, text pairs                 training.contrastive.triplet_pairs, training.contrastive.train
    stage 2, instruction tuning         training.contrastive.union_pairs, training.contrastive.train
    EOL embedding ("in one word")       models.encoder.Encoder.embed_eol
    embedding at [RET] after a summary  models.encoder.Encoder.embed_summaries
    rollouts, G summaries a query       models.generation.generate, training.rollouts.sides
    R_margin                            training.rewards.margin_reward
    R_rank                              training.rewards.rank_reward
    R_total, weights alpha and epsilon  training.rewards.total_reward
    advantages in a rollout group       training.losses.advantages
    GRPO objective with KL weight beta  training.losses.policy_loss, training.losses.k3
    stage 3, RLVR                       training.grpo.train
    filtered hard negatives, 50 + 50    training.hard_negatives.choose, training.hard_negatives.select
    MRBench: naming the grains          mrbench.annotate.annotator
    MRBench: an equal number per task   mrbench.build.build
    MRBench: people verify a sample     mrbench.verify.agreement
    hit rate, R@k of the tables         retrieval.metrics.hit_rate_at_k
    Table 1, M-BEIR                     evaluation.benchmark.official_table, notebooks/50_evaluate.ipynb
    Table 2, unseen sets                evaluation.captions.table2, notebooks/80_generalise.ipynb
    Table 3, held-out tasks             experiments.compare.on_units, notebooks/82_transfer.ipynb
    Table 4, reward weights             experiments.compare.differences, notebooks/60_ablate.ipynb
    Table 5, another retriever          models.small_models.build_from, notebooks/82_transfer.ipynb
    Table 6, MRBench                    evaluation.benchmark.mrbench_table, notebooks/50_evaluate.ipynb
    Table 7, text to video              evaluation.video.measure, notebooks/82_transfer.ipynb
    Table 8, ablation                   experiments.compare.differences, notebooks/60_ablate.ipynb
    Figure 4, grain distances           experiments.figures.grain_distances, notebooks/70_analyse_grains.ipynb
    t-SNE of one query's candidates     evaluation.grains.neighbourhood, notebooks/70_analyse_grains.ipynb
    reranking the retrieved list        training.reranker.score, evaluation.reranking.fuse
    hours and devices of each stage     experiments.plan.show
    printed averages, computed again    evaluation.statistics.audit, notebooks/90_report.ipynb

A folder imports only folders above it here (held by tests/test_layers.py).

    config, files, distributed  profiles; files written whole; seeds and processes that train together
    data                        M-BEIR roots, images, clips, the emoji collection, readers of unseen sets
    models                      a vision-language model as an embedder: prompts, encoding, generation
    retrieval                   vectors and ranks: exact search, metrics, cached embeddings
    training                    the three stages: losses, rewards, GRPO, negatives; distillation, reranker
    mrbench                     the Multi-gRain Benchmark: annotation, construction, verification, data card
    evaluation                  hit rates, grain blindness, unseen sets, reranking, throughput, statistics
    experiments                 chain of notebooks, multi-seed ablation study, claims, report, figures, plan
    export                      models and vectors for the hub, sentence-transformers, mteb, FAISS
    apps                        a free query against a pool, the explorer
    cli                         the command line
"""
