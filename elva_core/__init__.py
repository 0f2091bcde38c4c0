"""ELVA: ranking-driven universal multimodal retrieval (arXiv 2606.20280), re-implemented.

A folder imports only folders above it here (held by tests/test_layers.py).

    config, files, distributed   profiles; files written whole; seeds and processes that train together
    data                         what is on disk
    models                       a vision-language model as an embedder
    retrieval                    vectors and ranks
    training                     the three stages and their relatives
    mrbench                      the benchmark
    evaluation                   what a model is worth
    experiments                  the workbook's machinery
    export                       models for other libraries
    apps                         a free query, the explorer
    cli                          the command line
"""
