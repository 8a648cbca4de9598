"""The Hugging Face worker: any causal LM of transformers behind the worker protocol (src/worker_protocol/messages.h).

`python -m hosted_tinker.pytorch_worker` is started by the server for `--backend pytorch`, never by hand.
"""
