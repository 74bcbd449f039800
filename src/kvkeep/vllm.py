"""What vLLM loads: `"kv_connector_module_path": "kvkeep.vllm"`, `"kv_connector": "KVKeepConnector"`."""

from kvkeep.doors.vllm.connector import KVKeepConnector

__all__ = ["KVKeepConnector"]
