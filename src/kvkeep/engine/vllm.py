"""The former path of `kvkeep.vllm`, for configurations that still name it. Goes with the next release."""

from kvkeep.doors.vllm.connector import KVKeepConnector

__all__ = ["KVKeepConnector"]
