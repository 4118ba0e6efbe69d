"""What vLLM's ``FlexKVConnectorV1`` imports."""
