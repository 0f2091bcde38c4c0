"""ELVA: ranking-driven universal multimodal retrieval (arXiv 2606.20280), re-implemented.

Modules import one way: a module only those that stand before it here (held by tests/test_layers.py).

    settings, artifacts                          profiles, stage folders and manifests
    mbeir, clips, lint                           data on disk: M-BEIR's format, video frames, every violation with its line
    sharding, zero, runtime                      processes that train together, seeds and the training loop
    emoji_collection, nli, prepare               where the laptop's data come from
    objectives, rewards, metrics                 pure mathematics, import nothing of ours
    tower, chat, encoder                         a vision-language model as an embedder: Qwen2-VL quickly, any other as its processor says
    backbone, second_backbone                    two small ones to start from
    rollout, search, retrieval, store            what is built on an encoder
    negatives                                    hard and random ones, for stage 3
    annotate, verification, mrbench, release     the benchmark: who names its grains, who checks them, how it is given away
    contrastive, vllm_rollout, rlvr              the three stages of training
    distil, rerank, training                     two more: an embedding in one pass, a second look; and how a notebook starts any of them
    evaluate, grains, explorer                   what a model is worth, and what it is blind to
    claims                                       one row, one verdict
    unseen_files, unseen_sets, unseen            the paper's Table 2
    video_sets, video                            the paper's Table 7
    study, comparisons                           many trainings side by side, over seeds
    figures, report                              how it is shown
    sizes, catalogue, workload, plan             what a profile costs before it starts
    publish, inputs, sentence_module, export     models for other libraries
    mteb_encoder, answers, index                 models for other people's tasks, queries and pools
    throughput, fusion                           what an answer costs, and what a second look adds
    workbook, commands                           the chain of notebooks, the command line
"""
