"""ELVA: ranking-driven universal multimodal retrieval (arXiv 2606.20280), re-implemented.

Modules import one way, from the bottom of this list to the top (held by tests/test_layers.py):

    settings, artifacts, runtime                 values, stage folders, seeds and the training loop
    mbeir, emoji_collection, nli, prepare        data on disk
    objectives, rewards, metrics                 pure mathematics, import nothing of ours
    encoder, backbone                            Qwen2-VL as an embedder, and a small one to start from
    rollout, retrieval, negatives                what is built on an encoder
    annotate, verification, mrbench, release     the benchmark: who names its grains, who checks them, how it is given away
    contrastive, rlvr                            the three training stages
    evaluate, grains                             what a model is worth, and what it is blind to
    study, comparisons                           many trainings side by side, over seeds
    claims, figures, report                      how it is shown
    workbook                                     the chain of notebooks and the command line
"""
