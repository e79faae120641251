"""Imports what commands import, for the process that `tests.processes` forks from."""

import importlib
import importlib.util

for name in (
    "datasets",
    "skipwise.cli.main",
    "skipwise.workflows.evaluate",
    "skipwise.report.page",
    "skipwise.study.run",
    "skipwise.workflows.context",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
):
    importlib.import_module(name)
if importlib.util.find_spec("deepspeed"):  # transformers imports it where it is installed
    importlib.import_module("deepspeed")
