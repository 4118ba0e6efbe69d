"""FlexKV for vLLM: ``--kv-transfer-config '{"kv_connector":"FlexKVConnector","kv_role":"kv_both"}'``."""
